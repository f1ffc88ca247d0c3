"""The timesteps that a pipeline is about to ask for, told from the one it asks for now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.clock import Run
from accel.denoiser import Denoiser

TIMESTEP = "timestep"  # the argument
Time = tuple[Any, ...]

# How pipelines make a denoiser's timestep of the scheduler's: as it is; divided after the cast
# (Flux); divided before it (AuraFlow); reversed (Lumina).
_FORMS: tuple[Callable[[Tensor, torch.dtype], Tensor], ...] = (
    lambda t, dtype: t.to(dtype),
    lambda t, dtype: t.to(dtype) / 1000,
    lambda t, dtype: (t / 1000).to(dtype),
    lambda t, dtype: (1 - t / 1000).to(dtype),
)


def with_tensor_time(
    denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A denoiser's call with its timestep as a tensor, of the type that UNets make of a number."""
    time = denoiser.argument(TIMESTEP, args, kwargs)
    if isinstance(time, Tensor):
        return args, kwargs
    dtype = torch.float64 if isinstance(time, float) else torch.int64
    made = torch.tensor(time, dtype=dtype, device=denoiser.sample(args, kwargs).device)
    return denoiser.replace(args, kwargs, timestep=made)


def time_key(timestep: Tensor) -> Time:
    """A timestep by value: one number where all rows have the same. Waits for the device."""
    values = timestep.flatten().tolist()
    return tuple(values[:1]) if len(set(values)) == 1 else tuple(values)


def steps_to_come(run: Run | None, scheduler: Any, now: Tensor) -> list[Tensor]:
    """What the denoiser is called with from this step on, in the form of ``now``.

    Empty if ``now`` is not what any known pipeline makes of the grid's timestep.
    """
    grid = getattr(scheduler, "timesteps", None)
    if run is None or not isinstance(grid, Tensor) or run.position >= len(grid):
        return []
    key = time_key(now)
    for form in _FORMS:
        made = form(grid[run.position :].to(now.device), now.dtype)
        if (made[0].item(),) == key:
            return [t.expand(now.shape).clone() for t in made]
    return []
