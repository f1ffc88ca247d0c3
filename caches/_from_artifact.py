"""Methods whose schedule is an artifact: found once, run on any grid."""

from __future__ import annotations

from typing import Any, Literal

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import denoisers
from accel.method import Attached, Method
from caches._executor import LiveSchedule, Scheduled
from caches.schedule import SKIP, Schedule, constant, of_artifact, resampled

OnGrid = Literal["resample", "error", "bypass"]
GRID_TOLERANCE = 1e-3  # relative, between noise levels that count as equal


class FromArtifact(Scheduled):
    """What such methods have in common, which have fields `artifact` and `on_grid`.

    on_grid: what to do in a run over other noise levels than the schedule was made for:
    "resample" it, raise an "error", or "bypass" it and compute.
    """

    artifact: ArtifactRef
    on_grid: OnGrid

    def columns(self, pipe: Any) -> tuple[str, ...]:
        return self._loaded(pipe)[1].columns

    def _loaded(self, pipe: Any) -> tuple[Artifact, Schedule]:
        """What the file holds. Raises ValueError where it is not for this method and pipeline."""
        assert isinstance(self, Method)
        artifact = Artifact.load(self.artifact)
        artifact.check_method(self.name())
        artifact.check_pipeline(pipe)
        schedule = of_artifact(artifact)
        known = {d.slot: dict(d.module.named_modules()) for d in denoisers(pipe)}
        for column in schedule.columns:
            slot, _, path = column.partition(".")
            if path not in known.get(slot, ()):
                raise ValueError(f"{self.artifact.path}: this pipeline has no {column!r}")
        return artifact, schedule

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveSchedule)
        artifact, live.found = self._loaded(pipe)
        live.grid, live.made_with, live.artifact = artifact.grid, artifact.guidance, artifact
        live.adopt_all(pipe, live.found.columns)
        for j, column in enumerate(live.found.columns):
            skips = any(row[j] == SKIP for rows in live.found.tables() for row in rows)
            if skips and column not in live.skippable:
                raise ValueError(
                    f"{self.artifact.path}: S (skip) at {column!r}, which is no transformer block"
                )

    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        assert live.found is not None
        same = len(live.grid) == len(sigmas) and all(
            abs(a - b) <= GRID_TOLERANCE * max(abs(a), abs(b))
            for a, b in zip(live.grid, sigmas, strict=True)
        )
        if same:
            return live.found
        said = f"the schedule has {len(live.grid)} steps, on other noise levels than this run"
        if self.on_grid == "error":
            raise ValueError(
                f"{type(self).__name__}: {said}, which has {len(sigmas)}; "
                "make one for it, or set on_grid='resample'"
            )
        if self.on_grid == "bypass":
            live.fallback(said)
            return constant(live.found.columns, len(sigmas))
        live.detail["resampled"] = [len(live.grid), len(sigmas)]
        return resampled(live.found, live.grid, sigmas)
