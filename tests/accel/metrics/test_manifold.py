"""Precision, recall, density and coverage against brute force and what they must say."""

from __future__ import annotations

import numpy as np
import pytest

from accel.metrics import manifold as module
from accel.metrics.manifold import manifold


def _normal(seed, n=300, d=4):
    return np.random.default_rng(seed).normal(size=(n, d))


def _brute(samples, real, k_precision=3, k_density=5):
    """The definitions of the two papers, one pair at a time."""

    def distance(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    def radius(x, k):
        return np.sort(distance(x, x), axis=1)[:, k]

    to_real = distance(samples, real)
    return (
        (to_real <= radius(real, k_precision)).any(1),
        (radius(samples, k_precision) >= to_real.T).any(1),
        (to_real <= radius(real, k_density)).sum(1) / k_density,
        (to_real <= radius(real, k_density)).any(0),
    )


@pytest.mark.parametrize("block", [7, 1024])
def test_it_is_what_the_papers_define(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    samples, real = _normal(0, 90) * 0.8 + 0.3, _normal(1, 70)
    for value, expected in zip(manifold(samples, real), _brute(samples, real), strict=True):
        assert np.array_equal(value, expected)


def test_other_k_are_used():
    samples, real = _normal(0, 80), _normal(1, 60)
    found = manifold(samples, real, k_precision=1, k_density=2)
    for value, expected in zip(found, _brute(samples, real, 1, 2), strict=True):
        assert np.array_equal(value, expected)


def test_the_set_itself_is_precise_recalled_and_covered():
    real = _normal(0)
    found = manifold(real, real)
    assert found.precision.all()
    assert found.recall.all()
    assert found.coverage.all()


def test_density_of_the_same_distribution_is_one():
    """Naeem et al. 2020, section 3.2: its expectation is 1, whatever the distribution."""
    values = [manifold(_normal(i), _normal(100 + i)).density.mean() for i in range(20)]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values) - 1) < 3 * error + 1 / 300  # one row's weight


def test_coverage_of_the_same_distribution_is_as_derived():
    """Naeem et al. 2020, Eq. 8: 1 - (n - 1) ... (n - k) / ((2 n - 1) ... (2 n - k))."""
    n, k = 300, 5
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    values = [manifold(_normal(i, n), _normal(100 + i, n)).coverage.mean() for i in range(20)]
    assert abs(np.mean(values) - expected) < 4 * np.std(values, ddof=1) / np.sqrt(20)


def test_dropping_half_of_the_distribution_costs_recall_and_not_precision():
    real, samples = _normal(0, 400), _normal(1, 800)
    half = samples[samples[:, 0] > 0][:400]
    whole, dropped = manifold(samples[:400], real), manifold(half[:380], real)
    assert dropped.recall.mean() < whole.recall.mean() - 0.2
    assert dropped.precision.mean() > whole.precision.mean() - 0.05


def test_samples_far_away_are_not_precise():
    found = manifold(_normal(0) + 20, _normal(1))
    assert not found.precision.any()
    assert not found.recall.any()
    assert not found.coverage.any()


@pytest.mark.parametrize(
    ("samples", "real"), [((10, 3), (10, 4)), ((5, 3), (10, 3)), ((10, 3), (5, 3))]
)
def test_what_cannot_be_compared_is_refused(samples, real):
    with pytest.raises(ValueError, match="manifold"):
        manifold(np.zeros(samples), np.zeros(real))
