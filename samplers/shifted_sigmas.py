"""Time-shift (``samplers.shifted_time``) for schedulers with a table of sigmas.

The grid itself is moved, so that what a solver remembers stays true, and a batch moves together.
Not UniPC: its corrector goes back to where it was. Variant "dpm", of the official DPM-Solver code,
takes the variance of the network's output and moves the end of a step before it is taken.

The flow form is defined here, in no paper: samples (1 - sigma) x_0 + sigma e have the variance
(1 - sigma)^2 v0 + sigma^2, which falls and rises again; so v0 has to be known, and there is no
shift below the sigma where it is least, v0 / (1 + v0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module of a foreign scheduler.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from torch import Tensor

from samplers.host import refuse
from samplers.shifted_time import SETTINGS, ShiftedTime


class ShiftedSigmas(ShiftedTime):
    """Mixin before a stock scheduler with `sigmas`. Settings as of `ShiftedTime`, by batch only.

    Raises ValueError for settings out of range.
    """

    settings: ClassVar[dict[str, Any]] = {k: v for k, v in SETTINGS.items() if k != "per_sample"}
    variants = ("paper", "dpm", "constant")
    apart = 1  # timesteps at least between two levels: solvers divide by how far they are
    sigmas: Tensor

    def check_stock(self) -> None:
        """Raises ValueError where variant "dpm" would not read noise."""
        reads = self.config.window and self.config.variant == "dpm"
        if reads and self.config.prediction_type != "epsilon":
            refuse(self, "prediction_type", "variant 'dpm' reads the variance of predicted noise")

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the stock scheduler's; forgets the run before."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._grid, self._at, self.shifts = self.timesteps.tolist(), -1, 0

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        """As the stock scheduler's, on a grid that is moved."""
        first, after = self._at < 0, len(self._grid)
        if self.config.window:
            at = self._advance(timestep)
            after, now = at + 1, self.timesteps[at].clone()
            self.timesteps[at] = self._grid[at]
        shifts = after < len(self._grid) and self._grid[after] > self.config.cutoff
        if shifts and self.config.variant == "dpm" and not first:
            self._put(after, self._nearest(model_output, self._grid[after]), now)
        out = super().step(model_output, timestep, sample, *args, **kwargs)  # type: ignore[misc]
        if shifts and self._retimes:
            scale = self._scale(self.sigmas[after])
            self._put(after, self._nearest(out[0] / scale, self._grid[after]), now)
            out[0].mul_(self._scale(self.sigmas[after]) / scale)
        return out

    def _put(self, at: int, time: Tensor, now: Tensor) -> None:
        """A step of the grid to another time, between those of the steps before and after it."""
        following = self._grid[at + 1] if at + 1 < len(self._grid) else -1
        bounded = torch.minimum(time.to(now.device), now - self.apart)
        time = bounded.clamp(min=following + self.apart).to(time.dtype)
        self.timesteps[at] = time
        self.sigmas[at] = self._sigma(time)
        self.shifts = self.shifts + (time != self._grid[at])

    def _sigma(self, time: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[time.to(self.alphas_cumprod.device)]
        return ((1 - alpha) / alpha).sqrt()

    def _scale(self, sigma: Tensor) -> Tensor:
        """What a sample of unit noise and data is multiplied by at this level."""
        return torch.ones_like(sigma)


class TimeShiftEulerDiscreteScheduler(ShiftedSigmas, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` with shifted time."""

    def check_stock(self) -> None:
        """Raises ValueError for times that are no indices of noise levels."""
        super().check_stock()
        if self.config.window and self.config.timestep_type == "continuous":
            refuse(self, "timestep_type", "a shift wants 'discrete' times")

    def _scale(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1).sqrt()


class TimeShiftDPMSolverMultistepScheduler(ShiftedSigmas, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with shifted time, of diffusion models."""

    def check_stock(self) -> None:
        """Raises ValueError for a flow, whose variance is another."""
        super().check_stock()
        if self.config.use_flow_sigmas:
            refuse(self, "use_flow_sigmas", "use TimeShiftFlowMatchEulerDiscreteScheduler")


class TimeShiftFlowMatchEulerDiscreteScheduler(ShiftedSigmas, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with shifted time; wants ``variance_model="signal"``."""

    variants = ("paper", "constant")
    apart = 0
    max_v0 = float("inf")

    def check_stock(self) -> None:
        """Raises ValueError for a flow whose time runs the other way."""
        if self.config.invert_sigmas:
            refuse(self, "invert_sigmas", "noise has to be at sigma 1")

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings (all of them) that are out of range."""
        super().check(settings)
        reads = settings["window"] and settings["variant"] != "constant"
        if reads and settings["variance_model"] != "signal":
            raise ValueError(
                f"{cls.__name__}: variance_model = 'noise'; a flow's variance is told by v0, "
                "too: measure it over clean samples and set 'signal'"
            )

    def _nearest(self, sample: Tensor, centre: float) -> Tensor:
        half, last = self.config.window / 2, self.config.num_train_timesteps
        low, high = max(centre - half, 0.0), min(centre + half, float(last))
        if self.config.variant == "constant":
            return torch.tensor(high)
        v0, variance = self.config.v0, self._variance(sample)
        if centre / last <= v0 / (1 + v0):
            return torch.tensor(centre)
        root = (v0**2 - (1 + v0) * (v0 - variance)).clamp(min=0).sqrt()
        return (last * (v0 + root) / (1 + v0)).clamp(low, high)

    def _sigma(self, time: Tensor) -> Tensor:
        return time / self.config.num_train_timesteps
