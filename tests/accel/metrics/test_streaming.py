"""Statistics by parts are those of the whole; scores against closed forms and torchmetrics."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.metrics.distribution import frechet
from accel.metrics.streaming import (
    ClassSums,
    Moments,
    frechet_jackknife,
    frechet_of,
    inception_score,
)  # fmt: skip

EPS = np.finfo(np.float64).eps


def _normal(seed, n=200, d=5, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


def _probabilities(seed, n=400, classes=7, sharpness=2.0):
    z = sharpness * np.random.default_rng(seed).normal(size=(n, classes))
    e = np.exp(z)
    return e / e.sum(1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_moments_of_parts_are_those_of_the_whole(seed, sizes):
    x = _normal(seed, sum(sizes), 4, shift=1e3)  # far from 0, where naive sums of squares fail
    parts = np.split(x, np.cumsum(sizes)[:-1])
    total = Moments.of(parts[0])
    for part in parts[1:]:
        total = total + Moments.of(part)
    assert total.count == len(x)
    # Chan et al. 1983: relative error of order n eps condition, condition = |mean| / deviation
    bound = 1e2 * len(x) * EPS * 1e3
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=bound)
    if len(x) > 1:
        np.testing.assert_allclose(total.covariance, np.cov(x.T), atol=bound * 10)


def test_frechet_of_moments_is_frechet_of_rows():
    a, b = _normal(0, 500, 8), _normal(1, 500, 8, 1.3, 0.2)
    assert frechet_of(Moments.of(a), Moments.of(b)) == pytest.approx(frechet(a, b), rel=1e-10)


def test_frechet_of_moments_with_dependent_features():
    """A zero eigenvalue comes out of rounding negative, and must not become NaN."""
    a, b = (np.repeat(_normal(i, 300, 3), 2, axis=1) for i in (0, 1))
    assert frechet_of(Moments.of(a), Moments.of(b)) == pytest.approx(frechet(a, b), abs=1e-7)


def test_moments_of_different_features_are_refused():
    with pytest.raises(ValueError, match="features"):
        Moments.of(np.zeros((3, 2))) + Moments.of(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="frechet_of"):
        frechet_of(Moments.of(np.zeros((3, 2))), Moments.of(np.zeros((3, 4))))
    with pytest.raises(ValueError, match="frechet_of"):
        frechet_of(Moments.of(np.zeros((1, 2))), Moments.of(np.zeros((3, 2))))


def test_the_jackknife_interval_holds_the_expected_estimate():
    """95 % asked; at ten groups of 100 rows it held it in 93 to 99 of 100 draws."""
    draws, groups = 100, 10

    def sets(seed):
        x, y = _normal(seed, 1000, 4), _normal(10_000 + seed, 1000, 4, 1.2, 0.3)
        return [[Moments.of(part) for part in np.split(z, groups)] for z in (x, y)]

    found = [frechet_jackknife(*sets(seed)) for seed in range(draws)]
    expected = np.mean([f.estimate for f in found])
    held = sum(f.low <= expected <= f.high for f in found)
    assert held >= 88  # 4 standard deviations of a binomial below 97
    widths = np.mean([f.high - f.low for f in found])
    spread = np.std([f.estimate for f in found])
    assert widths < 2 * 2.26 * spread * 1.3  # Student's 9 degrees of freedom, and no wider


def test_the_jackknife_finds_the_bias():
    """Of samples of one distribution the distance is all bias."""
    sets = [[Moments.of(x) for x in np.split(_normal(seed, 2000, 6), 10)] for seed in (0, 1)]
    found = frechet_jackknife(*sets)
    assert found.estimate > 0
    assert found.bias == pytest.approx(found.estimate, rel=0.7)
    with pytest.raises(ValueError, match="groups"):
        frechet_jackknife(sets[0][:2], sets[1][:2])


def test_inception_score_of_certain_and_even_answers_is_the_number_of_classes():
    assert inception_score(np.eye(5)[np.arange(100) % 5], 1)[0] == pytest.approx(5)


def test_inception_score_of_one_answer_is_one():
    one = np.tile([[0.2, 0.3, 0.5]], (50, 1))
    assert inception_score(one, 1)[0] == pytest.approx(1)


def test_inception_score_by_parts_is_that_of_the_whole():
    p = _probabilities(0)
    parts = [ClassSums.of(x) for x in np.split(p, [3, 170, 171])]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert total.score == pytest.approx(inception_score(p, 1)[0], rel=1e-12)


@pytest.mark.parametrize("wrong", [np.ones((4, 3)), -np.eye(3), [[0.5, 0.4]]])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match="sum to 1"):
        ClassSums.of(wrong)
    with pytest.raises(ValueError, match="splits"):
        inception_score(np.eye(3), 4)


class _Given(torch.nn.Module):
    """A feature extractor that returns what it is given."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, x):
        return x


def _torchmetrics():
    """The package, quietly: it warns on import of things we do not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchmetrics.image.inception")


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_agrees_with_torchmetrics(splits):
    package = _torchmetrics()
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = package.InceptionScore(feature=_Given(7), splits=splits)
        metric.update(logits)
        torch.manual_seed(3)
        order = torch.randperm(len(logits))
        torch.manual_seed(3)  # it shuffles before it splits
        mean, deviation = metric.compute()
    ours = inception_score(logits.softmax(1)[order], splits)
    assert ours[0] == pytest.approx(float(mean), rel=1e-4)
    if splits > 1:  # it divides by splits - 1
        assert ours[1] * np.sqrt(splits / (splits - 1)) == pytest.approx(float(deviation), rel=1e-4)
