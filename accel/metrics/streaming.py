"""Statistics of more samples than fit in memory: added part by part, merged, then compared.

`Moments` hold what a Frechet distance needs (mean and covariance, d^2 numbers however many samples
there are), `ClassSums` what an inception score needs. Merging is exact (Chan et al. 1979, pairwise
update), so parts may come from any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from accel.metrics.distribution import as_features, spread_distance
from accel.metrics.statistics import SetInterval


@dataclass(frozen=True)
class Moments:
    """Of ``count`` rows: ``mean`` (d,) and ``scatter`` (d, d), the sum of outer products of
    deviations. float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Any) -> Moments:
        """Of (n, d) rows. Raises ValueError as `as_features`."""
        x = as_features(features)
        mean = x.mean(0)
        x = x - mean
        return cls(len(x), mean, x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows. Raises ValueError if they differ in dimension."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Moments: {self.mean.shape} and {other.mean.shape} features")
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        weight = self.count * other.count / count
        scatter = self.scatter + other.scatter + weight * np.outer(shift, shift)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), n - 1 in the denominator."""
        return self.scatter / (self.count - 1)


def frechet_of(a: Moments, b: Moments) -> float:
    """The Frechet distance of two sets by their moments; `distribution.frechet` says what it is.

    Less exact than from the rows: an eigenvalue below eps times the largest is lost, which is
    1e-16 of the distance's scale and shows where features are linearly dependent.

    Raises:
        ValueError: fewer than two rows, or different dimensions.
    """
    if min(a.count, b.count) < 2 or a.mean.shape != b.mean.shape:
        raise ValueError(f"frechet_of: {a.count} and {b.count} rows of {a.mean.shape} features")
    shift = a.mean - b.mean
    return float(shift @ shift) + spread_distance(_root(a.covariance), _root(b.covariance))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R^T R = covariance, by eigenvalues; those that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T


def frechet_jackknife(
    a: Sequence[Moments], b: Sequence[Moments], *, confidence: float = 0.95
) -> SetInterval:
    """Frechet distance with an interval by leaving out one group after the other.

    For sets too large to resample: a[i] and b[i] are the moments of groups of about equal size.
    The standard error is the jackknife's (Efron and Stein 1981); the groups being few, the interval
    has Student's width, by its Cornish-Fisher expansion. ``bias`` is the jackknife's estimate.

    Raises:
        ValueError: not the same number of groups, or fewer than three.
    """
    count = len(a)
    if count != len(b) or count < 3:
        raise ValueError(f"frechet_jackknife: {count} and {len(b)} groups; wants three or more")
    estimate = frechet_of(_total(a), _total(b))
    parts = ((_total(_without(x, i)) for x in (a, b)) for i in range(count))
    left = np.array([frechet_of(*pair) for pair in parts])
    bias = (count - 1) * float(left.mean() - estimate)
    error = float(np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum()))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    width = error * (z + (z**3 + z) / (4 * (count - 1)))
    return SetInterval(estimate, estimate - width, estimate + width, bias)


def _total(groups: Sequence[Moments]) -> Moments:
    total = groups[0]
    for group in groups[1:]:
        total = total + group
    return total


def _without(groups: Sequence[Moments], i: int) -> list[Moments]:
    return [group for j, group in enumerate(groups) if j != i]


@dataclass(frozen=True)
class ClassSums:
    """Sums over ``count`` rows of class probabilities: of p (c,), and of p log p over all."""

    count: int
    total: np.ndarray
    certainty: float

    @classmethod
    def of(cls, probabilities: Any) -> ClassSums:
        """Of (n, c) rows that each sum to 1. Raises ValueError for others."""
        p = as_features(probabilities)
        if (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-3):
            raise ValueError("inception score: wants probabilities, rows that sum to 1")
        p = p / p.sum(1, keepdims=True)  # single precision sums to 1 within 1e-6
        return cls(len(p), p.sum(0), float(_p_log_p(p).sum()))

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.count + other.count, self.total + other.total, self.certainty + other.certainty
        )

    @property
    def score(self) -> float:
        """exp of the mean divergence of a row from the mean row (Salimans et al. 2016)."""
        marginal = self.total / self.count
        return float(np.exp(self.certainty / self.count - _p_log_p(marginal).sum()))


def inception_score(probabilities: Any, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation of the score over ``splits`` consecutive parts, as it is usually given.

    Args:
        probabilities: (n, c) of any classifier, rows summing to 1; shuffle them if they are sorted.

    Raises:
        ValueError: fewer rows than splits, or no probabilities.
    """
    rows = as_features(probabilities)
    if not 1 <= splits <= len(rows):
        raise ValueError(f"inception_score: {splits} splits of {len(rows)} rows")
    scores = [ClassSums.of(part).score for part in np.array_split(rows, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
