"""Epsilon Scaling (Ning et al. 2024, "Elucidating the Exposure Bias in Diffusion Models",
arXiv:2308.15321): the predicted noise divided by a number a little above 1.

A network sees cleaner inputs in training than in sampling, and predicts too much noise there. It
costs nothing, and is what time-shift has to beat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from samplers.predictions import with_sample

PREDICTIONS = ("epsilon", "v_prediction")
PURE_NOISE = 1e3  # a noise level above this has no signal (zero terminal SNR): noise is x itself


@dataclass(frozen=True)
class EpsilonScaling(Method):
    """Predicted noise is divided by ``scale + slope * t / T``, with t the time in T timesteps.

    The paper's constants lie between 1.0005 and 1.02, larger for fewer steps.
    """

    SLOTS = ("denoiser.call",)
    PAPER = "arXiv 2308.15321"

    scale: float = 1.005
    slope: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = (self.scale, self.scale + self.slope)
        if not all(0 < end < float("inf") for end in ends):
            raise ValueError(f"EpsilonScaling: divides by {ends[0]} to {ends[1]}; be above 0")

    def neutral(self) -> EpsilonScaling:
        return EpsilonScaling(scale=1.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        kind = pipe.scheduler.config.get("prediction_type", "flow_prediction")
        if kind not in PREDICTIONS:
            raise ValueError(
                f"EpsilonScaling: {type(pipe).__name__} holds a model of {kind}; it is defined "
                f"for {' and '.join(PREDICTIONS)}"
            )
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"EpsilonScaling: {type(pipe.scheduler).__name__} scales what the network returns "
                "on its own account; it is defined for schedulers with alphas_cumprod"
            )
        return frozenset({("denoiser.call", frozenset(d.slot for d in denoisers(pipe)))})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveScaling(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveScaling)
        live.config = dict(pipe.scheduler.config)
        for denoiser in denoisers(pipe):
            live.around_denoiser(denoiser.slot, live.scaled(denoiser))


class _LiveScaling(Attached):
    config: dict[str, Any]

    def scaled(self, denoiser: Denoiser) -> Callable:
        """A layer that scales what a denoiser predicts."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            out = call_next(*args, **kwargs)
            factor = self.factor()
            if factor == 1:
                return out
            self.count("changed")
            return with_sample(out, self.rescaled(out[0], denoiser.sample(args, kwargs), factor))

        return layer

    def factor(self) -> float:
        """What the noise of this call is multiplied by; 1 where it is known, not predicted."""
        method, run, now = self.method, self.clock.run, self.now
        assert isinstance(method, EpsilonScaling)
        assert run is not None
        assert now is not None
        if now.sigma > PURE_NOISE:
            return 1.0
        time = run.timesteps[run.position] / self.config["num_train_timesteps"]
        return 1 / (method.scale + method.slope * time)

    def rescaled(self, predicted: Any, x: Any, factor: float) -> Any:
        """The prediction with the noise in the channels it shares with x scaled, all (n, c, ...).

        Further ones of the prediction are a variance, further ones of x a mask or another picture.
        """
        import torch

        channels = min(x.shape[1], predicted.shape[1])
        mean, x = predicted[:, :channels], x[:, :channels]
        if self.config["prediction_type"] == "v_prediction":
            now = self.now
            assert now is not None
            # v = (eps - s x) / a, with a = (1 + sigma^2)^(-1/2) and s = sigma a
            a = (1 + now.sigma**2) ** -0.5
            eps = a * mean + now.sigma * a * x
            mean = mean + (factor - 1) * eps / a
        else:
            mean = mean * factor
        return torch.cat([mean, predicted[:, channels:]], dim=1)
