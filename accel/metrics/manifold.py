"""Precision, recall, density and coverage: what of one set lies where the other has samples.

Kynkaanniemi et al. 2019 (arXiv 1904.06991) and Naeem et al. 2020 (arXiv 2002.09797). Around each
row of a set lies a ball that reaches to its k-th nearest fellow; their union is where the set is.
Every share comes as one value a row, so that it has an interval and pairs: resampling the rows that
make the balls would not do, as a row and its copy are neighbours at distance 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from accel.metrics.distribution import as_features
from accel.metrics.memorised import nearest

K_PRECISION, K_DENSITY = 3, 5  # of the papers
FEWEST = max(K_PRECISION, K_DENSITY) + 1  # samples that it takes
BLOCK = 1024  # rows of the distance matrix held at a time


class Manifold(NamedTuple):
    """One value a row; the usual figure is the mean of each.

    precision: (n,) bool, sample lies where real ones are. recall: (m,) bool, real one lies where
    samples are. density: (n,), in how many balls of real ones a sample lies, over k; 1 on average
    for samples of the same distribution, and may be more. coverage: (m,) bool, ball has a sample.
    """

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray


def manifold(
    samples: Any, real: Any, *, k_precision: int = K_PRECISION, k_density: int = K_DENSITY
) -> Manifold:
    """Compare (n, d) samples with (m, d) real ones. Costs O((n + m)^2 d) and a block of memory.

    Raises:
        ValueError: other shapes, values not finite, or not more rows than k in either set.
    """
    samples, real = as_features(samples), as_features(real)
    most = max(k_precision, k_density)
    if samples.shape[1] != real.shape[1] or min(len(samples), len(real)) <= most:
        raise ValueError(
            f"manifold: {samples.shape} samples against {real.shape} real ones; wants equal "
            f"features and more than {most} rows of each"
        )
    precise = _within(samples, real, _radii(real, k_precision))
    dense = precise if k_density == k_precision else _within(samples, real, _radii(real, k_density))
    recalled = _within(real, samples, _radii(samples, k_precision))
    return Manifold(
        precision=precise.balls > 0,
        recall=recalled.balls > 0,
        density=dense.balls / k_density,
        coverage=dense.rows > 0,
    )


class _Within(NamedTuple):
    """balls: (n,) in how many balls each point lies; rows: (m,) how many points each ball has."""

    balls: np.ndarray
    rows: np.ndarray


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """(m,) distance of each row to its k-th nearest other row; the first neighbour is itself."""
    return nearest(x, x, k + 1).distance[:, k]


def _within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> _Within:
    balls, rows = np.zeros(len(points), np.int64), np.zeros(len(centres), np.int64)
    middle = centres.mean(0)  # smaller numbers, smaller rounding
    centres = centres - middle
    norms, reach = (centres * centres).sum(1), radii * radii
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK] - middle
        squared = (block * block).sum(1)[:, None] + norms - 2 * block @ centres.T
        inside = squared <= reach
        balls[start : start + BLOCK] = inside.sum(1)
        rows += inside.sum(0)
    return _Within(balls, rows)
