"""What the output of a network stands for, at any noise level, for diffusion and flow models.

A noisy sample is x = alpha x_0 + s e; diffusion has alpha^2 + s^2 = 1, a flow 1 - sigma and sigma.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIFFUSION = ("epsilon", "v_prediction", "sample")
FLOW = "flow"  # v = e - x_0


def split(prediction: str, out: Tensor, x: Tensor, alpha: Any, s: Any) -> tuple[Tensor, Tensor]:
    """The clean sample x_0 and the noise e that an output stands for, both like x.

    alpha, s: numbers, or tensors that broadcast over x. Raises ValueError for another prediction.
    """
    if prediction == "epsilon":
        return (x - s * out) / alpha, out
    if prediction == "sample":
        return out, (x - alpha * out) / s
    if prediction == "v_prediction":
        return alpha * x - s * out, alpha * out + s * x
    if prediction == FLOW:
        return x - s * out, x + alpha * out
    raise ValueError(f"prediction {prediction!r}; one of {', '.join((*DIFFUSION, FLOW))}")


def renoise(x: Tensor, clean: tuple[Any, Any], noisy: tuple[Any, Any], fresh: Tensor) -> Tensor:
    """From one noise level (alpha, s) to a higher one; `fresh` noise is like x.

    Forward noising from the first level: the signal shrinks as alpha does, and noise fills up.
    """
    (a0, s0), (a1, s1) = clean, noisy
    shrunk = a1 / a0
    rest = s1**2 - (shrunk * s0) ** 2
    added = rest.clamp(min=0).sqrt() if isinstance(rest, Tensor) else max(rest, 0.0) ** 0.5
    return shrunk * x + added * fresh


def with_sample(output: Any, sample: Tensor) -> Any:
    """A denoiser's output, tuple or dataclass, with another sample."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return dataclasses.replace(output, sample=sample)


@dataclass(frozen=True)
class Process:
    """Noise levels over the times of a scheduler, which run from 0 to `horizon`.

    alphas: cumulative alpha of each time (count,); None for a flow, whose level is linear in time.
    """

    prediction: str
    horizon: float
    alphas: Tensor | None = None

    @classmethod
    def of(cls, scheduler: Any) -> Process:
        """Of a `FewStepScheduler` or `FewStepFlowScheduler`."""
        config, alphas = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            return cls(FLOW, config.num_train_timesteps)
        return cls(config.prediction_type, config.num_train_timesteps, alphas.double())

    def to(self, device: torch.device) -> Process:
        """The same where levels are found without a copy."""
        alphas = None if self.alphas is None else self.alphas.to(device)
        return dataclasses.replace(self, alphas=alphas)

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and s at times (n,), in shapes that broadcast over `like` (n, ...), in float32."""
        if self.alphas is None:
            s = times.double() / self.horizon
            alpha = 1 - s
        else:
            bar = self.alphas.to(times.device)[times.long()]
            alpha, s = bar.sqrt(), (1 - bar).sqrt()
        shape = (-1, *[1] * (like.ndim - 1))
        return (
            alpha.to(like.device, torch.float32).view(shape),
            s.to(like.device, torch.float32).view(shape),
        )

    def split(self, out: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """`split` for outputs (n, ...) at times (n,)."""
        return split(self.prediction, out, x, *self.levels(times, x))
