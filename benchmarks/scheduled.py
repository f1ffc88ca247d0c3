"""A cache that runs a schedule made here, not one that was searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accel.clock import sampling_grid
from accel.denoiser import denoisers
from caches.evolution import EvolutionCache
from caches.schedule import Schedule, of_artifact, to_artifact


def scheduled(schedule: Schedule, pipe: Any, file: Path) -> EvolutionCache:
    """On the grid that the pipeline's sampler has for so many steps; kept in ``file``."""
    (denoiser,) = denoisers(pipe)
    pipe.scheduler.set_timesteps(schedule.steps)
    grid = sampling_grid(pipe.scheduler)[1]
    made = to_artifact(schedule, denoiser, method=EvolutionCache.name(), grid=grid)
    assert of_artifact(made) == schedule
    return EvolutionCache(made.save(file))
