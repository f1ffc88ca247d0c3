"""A referee: says of outputs whether they are what was asked for. A value that comes from outside.

The core knows no world, so what is asked, and what is right, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from accel.metrics.distribution import SAMPLES_PER_FEATURE, frechet
from accel.metrics.statistics import Interval, bootstrap, share

Inputs = Sequence[dict[str, Any]]  # pipeline-call arguments, JSON values only


def paired_difference(
    before: np.ndarray, after: np.ndarray, *, confidence: float = 0.95
) -> Interval:
    """Change of a share, after - before, with its interval from the samples that changed.

    Agresti and Min 2005 (Statistics in Medicine 24): the Wald interval of paired shares with half
    a sample added to each cell, so that it has a width where no sample changed.

    Args:
        before, after: bool (n,), the same samples in the same order, n at least 1.

    Raises:
        ValueError: other shapes.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"paired_difference: wants two (n,), got {before.shape}, {after.shape}")
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = len(before) + 2
    centre = (won - lost) / n
    half = NormalDist().inv_cdf((1 + confidence) / 2)
    half *= ((won + lost + 1 - (won - lost) ** 2 / n) ** 0.5) / n
    return Interval((won - lost) / len(before), max(-1.0, centre - half), min(1.0, centre + half))


class Verdict(NamedTuple):
    """What a referee says of n samples: ``right`` (n,) bool, ``features`` (n, d)."""

    right: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Referee:
    """Judges outputs by what was asked for; neither a method nor this file knows how.

    judge: takes samples, (n, h, w, 3) or (n, frames, h, w, 3) uint8, and the inputs they were made
    from. real: takes inputs and the number of a draw, gives features (n, d) of as many real samples
    with the same content; other draws are other samples. ``None`` where there are no real ones.
    """

    name: str
    sha256: str
    judge: Callable[[np.ndarray, Inputs], Verdict]
    real: Callable[[Inputs, int], np.ndarray] | None = None

    def compare(
        self, inputs: Inputs, before: Verdict, after: Verdict, distance: Sequence[float] | None
    ) -> Judged:
        """Figures of two verdicts on the same inputs; ``distance``: of features, by sample."""
        return Judged(
            referee=self.name,
            before=share(before.right),
            after=share(after.right),
            difference=paired_difference(before.right, after.right),
            feature_distance=bootstrap(distance) if distance else None,
            frechet=self._frechet(inputs, before.features, after.features),
        )

    def _frechet(
        self, inputs: Inputs, before: np.ndarray, after: np.ndarray
    ) -> tuple[float, float, float] | None:
        count, size = before.shape
        if self.real is None or count < SAMPLES_PER_FEATURE * size:
            return None
        real, other = (self.real(inputs, draw) for draw in (0, 1))
        return frechet(before, real), frechet(after, real), frechet(other, real)


@dataclass(frozen=True)
class Judged:
    """A referee's figures, plain and accelerated, of the same inputs and seeds.

    difference: of accuracy, accelerated - plain, paired by sample. feature_distance: of each
    accelerated sample to its plain one, in units of unrelated samples. frechet: distance to real
    samples, plain and accelerated, and of real samples to other real ones (the floor), all of
    equal counts; ``None`` where there are no real samples, or too few samples for the features.
    """

    referee: str
    before: Interval
    after: Interval
    difference: Interval
    feature_distance: Interval | None
    frechet: tuple[float, float, float] | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        intervals = {k: getattr(self, k).as_json() for k in ("before", "after", "difference")}
        distances = None
        if self.frechet is not None:
            names = ("before", "after", "floor")
            distances = {k: round(v, 4) for k, v in zip(names, self.frechet, strict=True)}
        return {
            "referee": self.referee,
            "accuracy": intervals,
            "feature_distance": self.feature_distance.as_json() if self.feature_distance else None,
            "frechet": distances,
        }
