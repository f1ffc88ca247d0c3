"""The result of a search: schedules of which none is both faster and better than another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel.artifact import Artifact, ArtifactRef
from accel.files import write_atomically
from caches._resuming import damaged
from caches.schedule import Schedule

FRONT = "front.json"


@dataclass(frozen=True)
class Candidate:
    """A schedule with its predicted speed-up and its quality (dB of PSNR by default)."""

    schedule: Schedule
    speedup: float
    quality: float


@dataclass(frozen=True)
class Front:
    """Candidates from slow to fast, and the folder that holds their artifacts."""

    candidates: tuple[Candidate, ...]
    folder: Path

    @classmethod
    def of(cls, candidates: Sequence[Candidate], folder: Path) -> Front:
        """The best of some candidates."""
        goals = [(1 / c.speedup, -c.quality) for c in candidates]
        best = [c for c, g in zip(candidates, goals, strict=True) if not is_dominated(g, goals)]
        return cls(tuple(sorted(best, key=lambda c: c.speedup)), folder)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Front:
        """A front that a search has written. Raises ``ValueError`` where the file is damaged."""
        file = Path(folder) / FRONT
        try:
            rows = json.loads(file.read_text())["candidates"]
            found = [
                Candidate(_schedule(row["schedule"]), row["speedup"], row["quality"])
                for row in rows
            ]
        except (LookupError, TypeError, ValueError):
            raise damaged(file) from None
        return cls(tuple(found), Path(folder))

    def pick(self, *, speed: float | None = None, quality: float | None = None) -> ArtifactRef:
        """The best candidate at least so fast, or the fastest one at least so good.

        Raises:
            ValueError: both or none asked for, or no candidate, or none is so fast or so good.
        """
        if (speed is None) == (quality is None):
            raise ValueError("Front.pick: ask for a speed or for a quality")
        if not self.candidates:
            raise ValueError("Front.pick: the search found no schedule whose quality is a number")
        if speed is not None:
            good = [c for c in self.candidates if c.speedup >= speed]
            chosen = max(good, key=lambda c: c.quality, default=None)
        else:
            good = [c for c in self.candidates if c.quality >= (quality or 0.0)]
            chosen = max(good, key=lambda c: c.speedup, default=None)
        if chosen is None:
            slow, fast = self.candidates[0], self.candidates[-1]
            raise ValueError(
                f"Front.pick: no schedule is so fast or so good; they go from {slow.speedup:.2f}x "
                f"at {slow.quality:.1f} to {fast.speedup:.2f}x at {fast.quality:.1f}"
            )
        return ArtifactRef.of(self.folder / _file(self.candidates.index(chosen)))

    def write(
        self,
        artifact: Callable[[Schedule], Artifact],
        record: dict[str, Any],
        evaluated: Sequence[tuple[float, float]],
    ) -> None:
        """Artifacts, figures and a picture, below the folder.

        `evaluated`: (speed-up, quality) of everything that was looked at.
        """
        for i, candidate in enumerate(self.candidates):
            artifact(candidate.schedule).save(self.folder / _file(i))
        rows = [{**asdict(c), "file": _file(i)} for i, c in enumerate(self.candidates)]
        text = json.dumps({**record, "candidates": rows}, indent=1) + "\n"
        write_atomically(self.folder / FRONT, text.encode())
        self._draw(evaluated)

    def _draw(self, evaluated: Sequence[tuple[float, float]]) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(*zip(*evaluated, strict=True), s=10, color="0.75", label="evaluated")
        points = [(c.speedup, c.quality) for c in self.candidates]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label="front, all inputs")
        axes.set(xlabel="predicted speed-up", ylabel="quality (dB)", title="Searched schedules")
        axes.legend()
        figure.savefig(self.folder / "front.png", dpi=120)


def is_dominated(goals: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    """Is another one as small in all goals and smaller in one?"""
    return any(
        all(b <= a for a, b in zip(goals, other, strict=True)) and other != goals
        for other in others
    )


def _file(index: int) -> str:
    return f"schedule-{index:02d}.safetensors"


def _schedule(value: dict[str, Any]) -> Schedule:
    branches = tuple((name, tuple(rows)) for name, rows in value["branches"])
    return Schedule(tuple(value["columns"]), tuple(value["rows"]), branches, value["order"])
