"""The sequential Monte Carlo core: weights, effective sample size, resampling, lineage. Maths only.

Log-weights are carried from step to step and reset only by a resampling, which is systematic. In a
Gaussian toy (target mean 1) 256 particles then have mean 1.0; code that drops the weights of steps
without resampling has 0.0 (tests/samplers/search/test_smc.py).
"""

from __future__ import annotations

import numpy as np


class Population:
    """n particles with log-weights, and the first ancestor of each."""

    def __init__(self, count: int, threshold: float = 0.5) -> None:
        self.log_weights = np.zeros(count)
        self.ancestors = np.arange(count)
        self.threshold = threshold

    def weigh(self, log_potential: np.ndarray) -> None:
        """Multiply weights by exp(log_potential) (n,). -inf is a dead particle."""
        with np.errstate(invalid="ignore"):
            self.log_weights = self.log_weights + log_potential
        self.log_weights[np.isnan(self.log_weights)] = -np.inf

    def weights(self) -> np.ndarray:
        """Normalised (n,); equal if all are dead."""
        top = self.log_weights.max()
        if not np.isfinite(top):
            return np.full(len(self.log_weights), 1 / len(self.log_weights))
        w = np.exp(self.log_weights - top)
        return w / w.sum()

    def effective(self) -> float:
        """Effective sample size, 1 to n."""
        return float(1 / (self.weights() ** 2).sum())

    def resample(self, spot: float) -> np.ndarray | None:
        """Indices of the particles that go on, if too few are effective; else ``None``.

        spot: one uniform number of 0..1.
        """
        if self.effective() >= self.threshold * len(self.log_weights):
            return None
        chosen = systematic(self.weights(), spot)
        self.log_weights = np.zeros(len(chosen))
        self.ancestors = self.ancestors[chosen]
        return chosen


def systematic(weights: np.ndarray, spot: float) -> np.ndarray:
    """n indices, each w_i n times up to one; sorted. One uniform number for all."""
    n = len(weights)
    edges = np.cumsum(weights)
    edges[-1] = 1.0
    return np.searchsorted(edges, (np.arange(n) + spot) / n, side="right").clip(max=n - 1)


def potentials(kind: str, strength: float, history: np.ndarray, *, last: bool) -> np.ndarray:
    """Log of the product of all potentials so far, from scores (times, n) of each lineage.

    "difference", "max" and "sum" end at strength * (final score); "score" adds up what it sees.
    """
    if kind == "score":
        return strength * history.sum(0)
    if last or kind == "difference":
        return strength * history[-1]
    # before the end a lineage is weighed by the best, or all, that it has promised
    if kind == "max":
        return strength * np.maximum.accumulate(history).sum(0)
    return strength * np.cumsum(history, 0).sum(0)
