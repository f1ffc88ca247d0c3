"""Distances between two sets of features: Frechet distance (FID) and kernel distance (KID).

Heusel et al. 2017 (arXiv 1706.08500, Eq. 6) and Binkowski et al. 2018 (arXiv 1801.01401). Features
come from outside, so the same functions serve Inception, I3D (FVD) and digits-judge. Everything in
float64. Deviation: the root in the Frechet distance is taken by singular values of a product of
factors and not by eigenvalues of a product of covariances, which would square the rounding error.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

SAMPLES_PER_FEATURE = 2  # a covariance from fewer samples is more noise than estimate
KERNEL_BLOCK = 2048  # rows of the kernel matrix held at a time
SUBSETS, SUBSET_SIZE = 100, 1000  # Binkowski et al. 2018, as all libraries have it
_EPSILON = np.finfo(np.float64).eps


class FewSamplesWarning(UserWarning):
    """Too few samples for the dimension of the features: the estimate is far above the truth."""


class Kid(NamedTuple):
    """Kernel distance: ``mean`` over subsets and its ``deviation`` (``None`` of the full sample).

    The deviation is the spread of one subset's estimate, not the error of the mean.
    """

    mean: float
    deviation: float | None


def frechet(a: Any, b: Any, *, unequal: bool = False) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), C with n - 1 in the denominator.
    Biased upwards by about 1/n, so only values of equal sample counts compare. Costs O(n d^2).

    Args:
        a, b: (n, d) arrays or tensors, one row a sample.
        unequal: allow sets of different sizes.

    Raises:
        ValueError: wrong shapes, fewer than two rows, values not finite, or different counts.

    Warns:
        FewSamplesWarning: n < 2 d.
    """
    a, b = _features(a, b)
    if len(a) != len(b) and not unequal:
        raise ValueError(
            f"frechet: {len(a)} against {len(b)} samples, and the bias depends on the count; "
            "take equal counts, or unequal=True"
        )
    if min(len(a), len(b)) < SAMPLES_PER_FEATURE * a.shape[1]:
        warnings.warn(
            f"frechet: {min(len(a), len(b))} samples of {a.shape[1]} features; wants at least "
            f"{SAMPLES_PER_FEATURE} x as many samples",
            FewSamplesWarning,
            stacklevel=2,
        )
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift) + spread_distance(_factor(a), _factor(b))


def kid(
    a: Any,
    b: Any,
    *,
    subsets: int | None = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> Kid:
    """Kernel distance: unbiased squared MMD with the kernel (x . y / d + 1)^3.

    Unbiased, so it may be negative, and needs no equal counts.

    Args:
        a, b: (n, d) and (m, d) arrays or tensors, one row a sample.
        subsets: how many random subsets to average over; ``None`` for the one estimate from all
            pairs, which has the least variance.
        subset_size: rows of a subset, drawn without replacement from either set.

    Raises:
        ValueError: wrong shapes, fewer than two rows, values not finite, or no such subsets.
    """
    a, b = _features(a, b)
    if subsets is None:
        return Kid(_mmd2(a, b), None)
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"kid: {subsets} subsets of {subset_size} from {len(a)} and {len(b)} samples; wants at "
            "least one subset of 2 to all samples, or subsets=None for the full sample"
        )
    rng = np.random.default_rng(seed)
    values = [
        _mmd2(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (a, b)))
        for _ in range(subsets)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)))


def _features(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = (as_features(x) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features differ in dimension: {a.shape}, {b.shape}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} samples; a distribution wants at least two")
    return a, b


def as_features(x: Any) -> np.ndarray:
    """(n, d) float64 of an array or tensor. Raises ValueError for another shape, or not finite."""
    x = x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"features: wants (n, d), got {x.shape}")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"features: {len(bad)} rows are not finite, the first is {bad[0]}")
    return x


def _factor(x: np.ndarray) -> np.ndarray:
    """R (min(n, d), d) with R^T R = covariance of x (n, d)."""
    return np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r"))


def spread_distance(r: np.ndarray, s: np.ndarray) -> float:
    """tr(C + D - 2 (C D)^(1/2)) for C = r^T r and D = s^T s.

    C D = r^T (r s^T) s has the non-zero eigenvalues of (r s^T)(r s^T)^T, so the trace of its root
    is the sum of singular values of r s^T: no root of a rounded eigenvalue, nothing to clip there.
    The trace is at least 0 (arithmetic and geometric mean) and is a difference of numbers of size
    tr C + tr D. Products and QR of d columns and the SVD each have a backward error of order
    d eps of that, so what lies below 4 d eps (tr C + tr D) on either side is 0.
    """
    total = float((r * r).sum() + (s * s).sum())
    value = total - 2 * float(np.linalg.svd(r @ s.T, compute_uv=False).sum())
    return value if value > 4 * r.shape[1] * _EPSILON * total else 0.0


def _mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate (Gretton et al. 2012, Eq. 3): pairs of a row with itself are left out."""
    within = (_off_diagonal(x) / (len(x) * (len(x) - 1)) for x in (a, b))
    return sum(within) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def _off_diagonal(x: np.ndarray) -> float:
    own = ((x * x).sum(1) / x.shape[1] + 1) ** 3
    return _kernel_sum(x, x) - float(own.sum())


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    blocks = (a[i : i + KERNEL_BLOCK] for i in range(0, len(a), KERNEL_BLOCK))
    return float(sum(((block @ b.T / a.shape[1] + 1) ** 3).sum() for block in blocks))
