"""Frechet and kernel distances against closed forms, brute force and torchmetrics."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.metrics import distribution
from accel.metrics.distribution import FewSamplesWarning, Kid, frechet, kid

EPS = np.finfo(np.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def _normal(seed, n=200, d=5):
    return np.random.default_rng(seed).normal(size=(n, d))


def _exact(mean, root, n=400, seed=0):
    """n rows whose sample mean is `mean` (d,) and whose sample covariance is root^T root."""
    x = _normal(seed, n, len(mean))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)
    return x @ root + mean


def _rotation(seed, d):
    return np.linalg.qr(_normal(seed, d, d))[0]


def _close(value, expected, scale):
    """Equal but for rounding of sums of numbers of size `scale`; some thousand operations."""
    assert value == pytest.approx(expected, rel=0, abs=1e4 * EPS * scale)


def test_frechet_in_one_dimension_is_the_distance_of_mean_and_deviation():
    a, b = _exact(np.array([1.0]), np.array([[2.0]])), _exact(np.array([4.0]), np.array([[0.5]]))
    _close(frechet(a, b), 3.0**2 + 1.5**2, 20)


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=25)
def test_frechet_of_diagonal_gaussians(seed, d):
    rng = np.random.default_rng(seed)
    mean, other = rng.normal(size=(2, d))
    sd, sd2 = rng.uniform(0.1, 3, (2, d))
    expected = ((mean - other) ** 2).sum() + ((sd - sd2) ** 2).sum()
    turn = _rotation(seed, d)
    a, b = _exact(mean, np.diag(sd)), _exact(other, np.diag(sd2), seed=1)
    _close(frechet(a, b), expected, 100)
    _close(frechet(a @ turn, b @ turn), expected, 100)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr (CD)^(1/2) = (tr CD + 2 (det CD)^(1/2))^(1/2), by Cayley-Hamilton."""
    zero = np.zeros(2)
    c = _rotation(1, 2) @ np.diag([1.0, 9.0])
    d = _rotation(2, 2) @ np.diag([4.0, 0.25])
    c, d = c @ _rotation(3, 2), d @ _rotation(4, 2)
    C, D = c.T @ c, d.T @ d
    root = np.sqrt(np.trace(C @ D) + 2 * np.sqrt(np.linalg.det(C) * np.linalg.det(D)))
    assert not np.allclose(C @ D, D @ C, atol=0.1)
    _close(frechet(_exact(zero, c), _exact(zero, d)), np.trace(C + D) - 2 * root, 100)


def test_frechet_where_directions_have_no_variance():
    """Rank 2 of 6 against rank 3: eigenvalues of C D would be off by sqrt(eps) each."""
    sd, sd2 = np.array([1, 2, 0, 0, 0, 0.0]), np.array([0, 1, 3, 0, 0, 5.0])
    turn = _rotation(0, 6)
    a, b = _exact(np.zeros(6), np.diag(sd)), _exact(np.zeros(6), np.diag(sd2))
    _close(frechet(a @ turn, b @ turn), ((sd - sd2) ** 2).sum(), 40)
    constant = np.ones((20, 6))
    assert frechet(constant, constant) == 0.0
    assert frechet(constant, constant + 1) == 6.0


@given(SEEDS, st.integers(1, 10), st.floats(0.01, 100))
@settings(max_examples=25)
def test_frechet_properties(seed, d, scale):
    a, b = _normal(seed, 80, d) * scale, _normal(seed + 1, 80, d)
    shift = _normal(seed + 2, 1, d)
    value, size = frechet(a, b), 2 * d * (scale**2 + 1)
    assert value >= 0
    assert frechet(a, a) == 0.0
    _close(frechet(b, a), value, size)
    _close(frechet(a[::-1], b), value, size)
    centred = frechet(a - a.mean(0), b - b.mean(0))
    _close(value, ((a - b).mean(0) ** 2).sum() + centred, size)
    _close(frechet(a, a + shift), (shift**2).sum(), size)
    _close(frechet(3 * a, 3 * b), 9 * value, 9 * size)


def test_frechet_bias_falls_with_the_count():
    """Of equal Gaussians the truth is 0. In one dimension the expectation is 2/n for the means and
    1/n for the deviations; the mean of 400 draws is within 20 % of 3/n."""
    for n in (20, 200):
        values = [frechet(_normal(2 * i, n, 1), _normal(2 * i + 1, n, 1)) for i in range(400)]
        assert np.mean(values) == pytest.approx(3 / n, rel=0.2)


def test_frechet_warns_of_few_samples_and_only_then():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet(_normal(0, 10), _normal(1, 10))
    with pytest.warns(FewSamplesWarning, match="9 samples of 5 features"):
        frechet(_normal(0, 9), _normal(1, 9))


def test_frechet_demands_equal_counts_unless_asked():
    with pytest.raises(ValueError, match="50 against 60"):
        frechet(_normal(0, 50), _normal(1, 60))
    assert frechet(_normal(0, 50), _normal(1, 60), unequal=True) > 0


@pytest.mark.parametrize("metric", [frechet, lambda a, b: kid(a, b, subsets=None)])
def test_refuses_what_has_no_distribution(metric):
    good, bad = _normal(0, 20), _normal(1, 20)
    bad[3, 2] = np.nan
    for broken, message in [
        (bad, "1 rows are not finite, the first is 3"),
        (good[:, :3], "differ in dimension"),
        (good[:1], "at least two"),
        (good[0], "wants .n, d."),
        (good[:, :0], "wants .n, d."),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(good, broken)
        with pytest.raises(ValueError, match=message):
            metric(broken, good)


def test_tensors_and_half_precision():
    a, b = (torch.from_numpy(_normal(i)).half().requires_grad_() for i in (0, 1))
    arrays = [x.detach().double().numpy() for x in (a, b)]
    assert frechet(a, b) == frechet(*arrays)
    assert kid(a, b, subsets=None) == kid(*arrays, subsets=None)


def test_kid_is_the_double_loop(monkeypatch):
    a, b = _normal(0, 13, 3), _normal(1, 9, 3) + 0.5

    def mean(x, y, own):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (own and i == j)]
        return np.mean([(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs])

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    whole = kid(a, b, subsets=None)
    _close(whole.mean, expected, 10)
    assert whole.deviation is None
    monkeypatch.setattr(distribution, "KERNEL_BLOCK", 4)
    _close(kid(a, b, subsets=None).mean, expected, 10)


def test_kid_of_gaussians_is_unbiased():
    """N(0, 1) against N(m, 1): moments of the kernel give the squared MMD; 5 standard errors."""
    for m in (0.0, 0.7):
        raw = (m**3 + 3 * m) ** 2 + 3 * (1 + m * m) ** 2 + 3 * m * m + 1
        truth = 4 + raw - 2 * (3 * (1 + m * m) + 1)
        pairs = [(_normal(2 * i, 50, 1), _normal(2 * i + 1, 50, 1) + m) for i in range(1000)]
        values = np.array([kid(a, b, subsets=None).mean for a, b in pairs])
        assert abs(values.mean() - truth) < 5 * values.std() / np.sqrt(len(values))


def test_kid_subsets():
    a, b = _normal(0, 300), _normal(1, 300) + 0.3
    value = kid(a, b, subsets=50, subset_size=40)
    whole = kid(a, b, subsets=None).mean
    assert value == kid(a, b, subsets=50, subset_size=40)
    assert value != kid(a, b, subsets=50, subset_size=40, seed=1)
    # subsets overlap and are draws from one sample: 5 standard errors of 50 of them
    assert abs(value.mean - whole) < 5 * value.deviation / np.sqrt(50)
    assert isinstance(value, Kid)
    for wrong in ({"subset_size": 301}, {"subset_size": 1}, {"subsets": 0}):
        with pytest.raises(ValueError, match="subsets=None"):
            kid(a, b, **{"subset_size": 40, **wrong})


@given(SEEDS)
@settings(max_examples=20)
def test_kid_does_not_know_the_order(seed):
    a, b = _normal(seed, 30), _normal(seed + 1, 40) + 1
    value = kid(a, b, subsets=None).mean
    _close(kid(b, a, subsets=None).mean, value, 100)
    _close(kid(a[::-1], b[::-1], subsets=None).mean, value, 100)


class _Given(torch.nn.Module):
    """Features that are the input itself."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "d"), [(60, 1), (200, 16), (400, 64)])
def test_agrees_with_torchmetrics(n, d):
    """Its root is of up to 64 eigenvalues, each good to sqrt(eps) = 1.5e-8 of the trace."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    mix = _normal(2, d, d)
    a, b = _normal(0, n, d) @ mix, np.maximum(_normal(1, n, d) @ mix * 1.2 + 0.3, 0)
    fid = FrechetInceptionDistance(_Given(d))
    with pytest.warns(UserWarning, match="save all extracted features"):
        kernel = KernelInceptionDistance(_Given(d), subsets=2, subset_size=n)
    for metric in (fid, kernel):
        metric.set_dtype(torch.float64)
        metric.update(torch.from_numpy(a), real=True)
        metric.update(torch.from_numpy(b), real=False)
    assert frechet(a, b) == pytest.approx(fid.compute().item(), rel=1e-6)
    mean, deviation = kernel.compute()  # of two subsets that are the whole
    assert kid(a, b, subsets=None).mean == pytest.approx(mean.item(), rel=1e-6)
    assert deviation.item() < 1e-6 * mean.item()
