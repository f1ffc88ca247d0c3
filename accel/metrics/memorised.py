"""Whether samples copy the training set, in any feature space.

A memorising model has excellent Frechet distance and accuracy, so neither can tell. Both measures
here depend on the space and the sets, and mean something only beside the same of held-out data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from accel.metrics.distribution import as_features

BLOCK = 1024  # rows of the distance matrix held at a time


class Nearest(NamedTuple):
    """The nearest rows of a set: ``distance`` and ``index``, each (n, k), nearest first."""

    distance: np.ndarray
    index: np.ndarray


def nearest(a: Any, b: Any, k: int = 1) -> Nearest:
    """The k nearest rows of b of each row of a, Euclidean.

    Candidates are found by a matrix product; their distances are then computed from differences, so
    a copy is at exactly 0 (its rank among near ties is good to rounding of the product).

    Args:
        a, b: (n, d) and (m, d) arrays or tensors.

    Raises:
        ValueError: other shapes, values not finite, or not 1 <= k <= m.
    """
    a, b = as_features(a), as_features(b)
    if a.shape[1] != b.shape[1] or not 1 <= k <= len(b):
        raise ValueError(f"nearest: {k} rows of {b.shape} for {a.shape}")
    parts = [_nearest_rows(a[i : i + BLOCK], b, k) for i in range(0, len(a), BLOCK)]
    return Nearest(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _nearest_rows(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    centre = b.mean(0)  # smaller numbers, smaller rounding
    score = ((b - centre) ** 2).sum(1) - 2 * (a - centre) @ (b - centre).T
    found = np.argpartition(score, k - 1, axis=1)[:, :k]  # (rows, k), unordered
    distance = np.linalg.norm(a[:, None] - b[found], axis=2)
    order = np.argsort(distance, axis=1, kind="stable")
    return np.take_along_axis(distance, order, 1), np.take_along_axis(found, order, 1)


def copied(samples: Any, train: Any) -> np.ndarray:
    """Which samples are nearer to a training item than its nearest fellow is: bool (n,).

    The complement of authenticity (Alaa et al. 2022, arXiv 2102.08921). Held-out data of the same
    distribution have a large share, too, often more than half: a memorising model has a larger one.

    Args:
        samples, train: (n, d) and (m, d), m at least 2. Copies of a row that is in `train` twice
            are not found.

    Raises:
        ValueError: as `nearest`.
    """
    train = as_features(train)
    to_train = nearest(samples, train)
    fellow = nearest(train, train, 2).distance[:, 1]  # the first is the item itself
    return to_train.distance[:, 0] < fellow[to_train.index[:, 0]]


def nearness(samples: Any, heldout: Any, train: Any) -> float:
    """Median distance of samples to the training set over that of held-out data.

    1 for a model of the distribution, 0 for copies; above 1 where samples are off the distribution.

    Args:
        samples, heldout, train: (n, d), (h, d) and (m, d).

    Raises:
        ValueError: as `nearest`, or held-out data of which half are in the training set.
    """
    ours, real = (np.median(nearest(x, train).distance) for x in (samples, heldout))
    if real == 0:
        raise ValueError("nearness: half of the held-out data are in the training set")
    return float(ours / real)
