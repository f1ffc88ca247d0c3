"""What a search finds, as it goes and in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from samplers.search.budget import Ledger
from samplers.search.path import Path, is_plain, path_json

Purpose = Literal["render", "draft", "preview", "baseline"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that was scored.

    score: of the searched verifier, None if it could not be scored; for an ensemble the mean rank
    in the batch it came with. scores: of every searched verifier. held_out: of those never
    searched (not of previews). purpose: "render" is a finished sample, "draft" one made with a
    draft's recipe, "preview" a prediction in the middle of a run. picture: uint8 (h, w, c), of a
    video the middle frame. evaluations: spent on this input when it was known.
    """

    index: int
    path: Path
    purpose: Purpose
    score: float | None
    scores: dict[str, float | None]
    held_out: dict[str, float | None]
    evaluations: int
    picture: np.ndarray | None = field(default=None, repr=False)
    frames: np.ndarray | None = field(default=None, repr=False)  # of a sample rendered alone

    def as_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "path": path_json(self.path),
            "purpose": self.purpose,
            "score": self.score,
            "scores": self.scores,
            "held_out": self.held_out,
            "evaluations": self.evaluations,
        }


@dataclass(frozen=True, eq=False)
class Progress:
    """What an observer is told. ``candidates``: those just scored; ``best``: so far, of the kind
    that could be delivered; ``evaluations`` spent on this input, of ``limit`` (in the budget's own
    unit: ``share`` of it is spent)."""

    kind: Literal["candidates", "winner"]
    input: int
    inputs: int
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    evaluations: int
    share: float


@dataclass(frozen=True, eq=False)
class Winner:
    """The delivered sample of one input, rendered alone (``frames``: uint8, None if it was not
    asked for). ``path`` makes it again.

    candidates: all, in order; best: the one chosen; delivered: its scores as rendered alone;
    report: of the algorithm (lineage, effective sample sizes, ...); stopped: what ended it.
    """

    frames: np.ndarray | None = field(repr=False)
    path: Path
    best: Candidate
    delivered: dict[str, float | None]
    candidates: list[Candidate] = field(repr=False)
    ledger: Ledger
    report: dict[str, Any]
    stopped: str

    def first_draws(self) -> list[Candidate]:
        """Plain finished candidates, else drafts: what the pipeline gives by itself."""
        for purposes in (("render", "baseline"), ("draft",)):
            found = [c for c in self.candidates if c.purpose in purposes and is_plain(c.path)]
            if found:
                return found
        return []

    def curve(self, purpose: str = "render") -> list[tuple[int, float]]:
        """(evaluations, best score so far) of finished candidates; ensembles have none."""
        best, points = -math.inf, []
        if any(len(c.scores) > 1 for c in self.candidates):
            return []  # mean ranks, each within a batch of its own
        for c in self.candidates:
            if c.purpose == purpose and c.score is not None and c.score > best:
                best = c.score
                points.append((c.evaluations, best))
        return points

    def as_json(self) -> dict[str, Any]:
        return {
            "path": path_json(self.path),
            "best": self.best.as_json(),
            "delivered": self.delivered,
            "candidates": [c.as_json() for c in self.candidates],
            "ledger": self.ledger.as_json(),
            "report": self.report,
            "stopped": self.stopped,
        }


@dataclass(frozen=True, eq=False)
class SearchResult:
    """One winner for each input."""

    winners: list[Winner]
    search: dict[str, Any]
    verifier: str
    held_out: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "search": self.search,
            "verifier": self.verifier,
            "held_out": list(self.held_out),
            "winners": [w.as_json() for w in self.winners],
        }
