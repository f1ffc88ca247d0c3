"""What search needs to know of a scheduler: its noise levels, and one stochastic step between two.

A sample at step k is x = alpha_k x_0 + s_k e. Flows have 1 - sigma and sigma, diffusion sqrt(abar)
and sqrt(1 - abar), schedulers in sigma space 1 and sigma. The stochastic step keeps the marginals
of the deterministic one for any eta (diffusers' own stochastic flow step does not):

    x' = alpha' x_0 + sqrt(s'^2 - n^2) e + n z
    n = eta (s' / s) sqrt(s^2 - (alpha / alpha')^2 s'^2)

eta 0 is DDIM and Euler, 1 is ancestral sampling (DDPM).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.host import is_flow
from samplers.predictions import FLOW, split

SIGMA_SPACE = 1.5  # schedulers that start from noise of more than this work in sigma space


@dataclass(frozen=True)
class Levels:
    """(alpha, s) of every step's input and, last, of the result; what the network predicts."""

    table: tuple[tuple[float, float], ...]
    prediction: str
    sigma_space: bool = False
    clip: float | None = None  # clean samples are clipped to -clip..clip

    @property
    def steps(self) -> int:
        return len(self.table) - 1

    @classmethod
    def of(cls, scheduler: Any) -> Levels:
        """Of a scheduler whose grid is laid.

        Raises:
            ValueError: it takes more than one stage a step, or works otherwise.
        """
        if getattr(scheduler, "order", 1) != 1:
            raise ValueError(
                f"{type(scheduler).__name__} makes a step in {scheduler.order} stages; search in "
                "the middle of a run needs one of order 1 (DDIM, Euler, DPMSolverMultistep, UniPC)"
            )
        wanted = _needed(scheduler)
        if wanted != ["model_output", "timestep", "sample"]:
            raise ValueError(
                f"{type(scheduler).__name__}.step takes {', '.join(wanted)}, of which search in "
                "the middle of a run knows nothing; swap it (DDIM, Euler, DPMSolverMultistep)"
            )
        config = scheduler.config
        if config.get("thresholding") or config.get("sigma_data") is not None:
            raise ValueError(f"{type(scheduler).__name__}: search knows no thresholding and no EDM")
        clip = config.clip_sample_range if config.get("clip_sample") else None
        if is_flow(scheduler):
            sigmas = [float(s) for s in scheduler.sigmas]
            return cls(tuple((1 - s, s) for s in sigmas[: len(scheduler.timesteps) + 1]), FLOW)
        prediction = config.get("prediction_type", "epsilon")
        sigmas = getattr(scheduler, "sigmas", None)
        has_sigmas = sigmas is not None and len(sigmas) > len(scheduler.timesteps)
        if not hasattr(scheduler, "init_noise_sigma" if has_sigmas else "alphas_cumprod"):
            raise ValueError(f"{type(scheduler).__name__} has no noise levels that search can read")
        if sigmas is None or not has_sigmas:
            return cls(_by_alphas(scheduler), prediction, clip=clip)
        sigmas = [float(s) for s in sigmas[: len(scheduler.timesteps) + 1]]
        if float(scheduler.init_noise_sigma) > SIGMA_SPACE:
            return cls(tuple((1.0, s) for s in sigmas), prediction, True, clip)
        roots = [(1 + s * s) ** -0.5 for s in sigmas]
        return cls(tuple((a, s * a) for a, s in zip(roots, sigmas, strict=True)), prediction)

    def clean(self, out: Tensor, x: Tensor, step: int) -> Tensor:
        """The clean sample that the network's output at step ``step`` stands for; like x."""
        alpha, s = self.table[step]
        out, x = out.float(), x.float()
        if self.sigma_space:
            alpha = (1 + s * s) ** -0.5
            x, s = x * alpha, s * alpha
        x0, _ = split(self.prediction, out, x, alpha, s)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def fresh_noise(self, step: int, eta: float) -> float:
        """Standard deviation of the noise that a step adds."""
        (alpha, s), (alpha1, s1) = self.table[step], self.table[step + 1]
        if s == 0:
            return 0.0
        return eta * (s1 / s) * max(s**2 - (alpha / alpha1) ** 2 * s1**2, 0.0) ** 0.5

    def follow(self, x: Tensor, clean: Tensor, step: int, *, eta: float, fresh: Any) -> Tensor:
        """The next sample after x (..., at step ``step``) with this clean prediction.

        fresh: standard normal noise like x; unused where eta is 0 or the step the last.
        """
        (alpha, s), (alpha1, s1) = self.table[step], self.table[step + 1]
        e = (x.float() - alpha * clean) / s
        added = self.fresh_noise(step, eta)
        following = alpha1 * clean + max(s1**2 - added**2, 0.0) ** 0.5 * e
        if added > 0:
            following = following + added * fresh.to(x.device)
        return following.to(x.dtype)

    def mixed(
        self, clean: Sequence[Tensor], x: Tensor, step: int, betas: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The clean prediction of a product of densities q_i ** beta_i, and the log-weight (n,)
        that samples x (n, ...) gain in the step at ``step``, from each model's clean prediction.

        Scores add up, but noised products are not products of noised densities. Feynman-Kac
        correctors (arXiv 2503.02819) weigh that: with e_i the predicted noises and sigma = s/alpha,
        (1 - sigma'^2 / sigma^2) / 2 (|sum beta e|^2 - sum beta |e|^2), whatever eta. Where nothing
        of the signal is left nothing is gained: the product is a Gaussian, as the samples are.
        """
        (alpha, s), (alpha1, s1) = self.table[step], self.table[step + 1]
        x = x.float()
        pairs = list(zip(betas, clean, strict=True))
        power = sum(betas)
        mean = sum((b * c for b, c in pairs), torch.zeros_like(x))
        if alpha == 0:
            return mean / power, x.new_zeros(len(x), dtype=torch.float64)
        noises = [(b, (x - alpha * c) / s) for b, c in pairs]
        total = sum((b * e for b, e in noises), torch.zeros_like(x))
        excess = _square(total) - sum(b * _square(e) for b, e in noises)
        gained = 0.5 * (1 - (s1 * alpha / (alpha1 * s)) ** 2) * excess
        return mean + (1 - power) / alpha * x, gained

    def mixed_eta(self, step: int, eta: float, betas: Sequence[float]) -> float:
        """Of a step of a mix: none where samples begin with the noise of a power, to keep it."""
        return 0.0 if self.table[step][0] == 0 and sum(betas) != 1 else eta

    def nearest(self, share: float) -> int:
        """The step whose noise share s / (alpha + s) is nearest (1 is pure noise)."""
        distance = [abs(s / (a + s) - share) for a, s in self.table]
        return distance.index(min(distance))


def _square(x: Tensor) -> Tensor:
    return x.double().flatten(1).square().sum(1)


def _needed(scheduler: Any) -> list[str]:
    """Arguments that a step cannot be made without."""
    known = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in known if p.default is p.empty and p.kind in plain]


def _by_alphas(scheduler: Any) -> tuple[tuple[float, float], ...]:
    """Of a scheduler with discrete times and cumulative alphas (DDIM, DDPM, PNDM)."""
    bars = scheduler.alphas_cumprod.double()
    found = [float(bars[int(t)]) for t in scheduler.timesteps]
    found.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    return tuple((b**0.5, (1 - b) ** 0.5) for b in found)
