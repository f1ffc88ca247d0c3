"""Intervals for paired measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with its bootstrap percentile interval."""

    estimate: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in self._asdict().items()}


def bootstrap(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """``statistic`` over ``values`` with its percentile bootstrap interval.

    Args:
        values: one number a sample (pair); at least one, finite.
        statistic: takes an array and ``axis``.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"bootstrap: wants finite values, got {data.tolist()}")
    draws = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(statistic(data[draws], axis=1), [tail, 100 - tail])
    return Interval(float(statistic(data, axis=0)), float(low), float(high))
