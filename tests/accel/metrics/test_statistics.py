"""Intervals and tests against enumeration, closed forms and coverage."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from accel.metrics import statistics
from accel.metrics.distribution import frechet
from accel.metrics.statistics import FLIPS, bootstrap, bootstrap_sets, paired_test, share


def test_covers_the_mean_as_often_as_it_says():
    """95 % intervals of 40 normal values: coverage is binomial; 5 sigma below 0.93 (bootstrap is
    known to undercover slightly at this size)."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        interval = bootstrap(rng.normal(3.0, 1.0, 40).tolist(), seed=i)
        hits += interval.low <= 3.0 <= interval.high
    assert hits / 400 > 0.93 - 5 * (0.93 * 0.07 / 400) ** 0.5


def test_median_and_constant():
    interval = bootstrap([1.0, 2.0, 100.0], np.median)
    assert interval.estimate == 2.0
    assert bootstrap([4.0] * 5) == (4.0, 4.0, 4.0)


def test_many_values_are_resampled_part_by_part(monkeypatch):
    values = np.random.default_rng(1).normal(1.0, 3.0, 37).tolist()
    whole, test = bootstrap(values), paired_test(values, [0.0] * 37)
    monkeypatch.setattr(statistics, "_BLOCK", 100)  # two resamples at a time
    assert list(statistics._blocks(7, 37, 7)) == [2, 2, 2, 1]
    assert bootstrap(values) == whole
    assert paired_test(values, [0.0] * 37).p == pytest.approx(test.p, abs=0.02)


@pytest.mark.parametrize("values", [[], [1.0, float("inf")], [float("nan")]])
def test_refuses_what_has_no_interval(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap(values)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
@example([44.0, -80.0, -1e-9])  # nearly, but not equal
@settings(max_examples=40)
def test_paired_test_is_all_sign_flips(differences):
    d = np.array(differences)
    exact = [Fraction(v) for v in differences]
    sums = [abs(sum(s * v for s, v in zip(signs, exact, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(d))]  # fmt: skip
    # what differs by less than rounding may count as equal or not
    slack = Fraction(1e-12) * sum(map(abs, exact))
    assume(all(total == sums[0] or abs(total - sums[0]) > slack for total in sums))
    expected = np.mean([total >= sums[0] for total in sums])
    found, back = paired_test(d, 0 * d), paired_test(0 * d, d)
    assert found.p == back.p == expected
    assert found.difference.estimate == d.mean() == -back.difference.estimate


def test_paired_test_of_clear_and_of_no_differences():
    values = np.arange(10.0)
    assert paired_test(values + 1, values).p == 2 / 2**10
    assert paired_test(values, values).p == 1
    more = np.arange(60.0)
    assert paired_test(more + 1, more).p == 1 / (FLIPS + 1)
    assert paired_test(more, more).p == 1
    assert paired_test(more + 1, more).difference == (1.0, 1.0, 1.0)


def test_random_flips_agree_with_all_of_them(monkeypatch):
    """p of 20,000 flips has a standard error of at most 0.5 / sqrt(20000); 5 of them."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 14), rng.normal(0, 1, 14)
    exact = paired_test(a, b).p
    monkeypatch.setattr(statistics, "EXACT_PAIRS", 0)
    assert paired_test(a, b).p == pytest.approx(exact, abs=5 * 0.5 / FLIPS**0.5)
    assert paired_test(a, b) == paired_test(a, b)
    assert paired_test(a, b, seed=1).p != paired_test(a, b).p


def test_paired_test_is_right_as_often_as_it_says():
    """Without a difference p is under 0.1 in a tenth of 400 cases; binomial, 5 sigma."""
    rng = np.random.default_rng(0)
    rejected = np.mean([paired_test(*rng.normal(size=(2, 9))).p < 0.1 for _ in range(400)])
    assert abs(rejected - 0.1) < 5 * (0.1 * 0.9 / 400) ** 0.5


def test_share_solves_wilsons_equation():
    """The ends are the shares p at which the observed one is z standard errors of p away."""
    right = np.arange(50) < 13
    interval = share(right)
    z = 1.959963984540054
    for end in interval[1:]:
        assert abs(0.26 - end) == pytest.approx(z * (end * (1 - end) / 50) ** 0.5, rel=1e-9)
    assert interval.low < interval.estimate == 0.26 < interval.high
    narrow = share(right, confidence=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


@given(st.integers(1, 300), st.data())
@settings(max_examples=40)
def test_share_properties(n, data):
    right = np.arange(n) < data.draw(st.integers(0, n))
    interval, other = share(right), share(~right)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low < interval.high
    assert (other.low, other.high) == pytest.approx((1 - interval.high, 1 - interval.low))
    assert share(right[::-1]) == interval


@pytest.mark.parametrize("right", [np.array([], bool), np.array([0, 1]), np.ones((2, 2), bool)])
def test_share_refuses_what_is_not_right_or_wrong(right):
    with pytest.raises(ValueError, match="wants bool"):
        share(right)


def test_paired_test_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="wants pairs"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        paired_test([1.0, float("nan")], [1.0, 1.0])


def _draw(rng, n=200):
    """Two sets of 8 features whose Frechet distance is 8 x 0.1^2."""
    return rng.normal(size=(n, 8)), rng.normal(size=(n, 8)) * 1.1


def test_set_intervals_cover_the_expected_frechet_distance():
    """The percentiles as they are lie above it; without the bias they cover as they say: binomial
    over 30 cases, 5 sigma. The estimate without the bias is nearer to the truth."""
    rng = np.random.default_rng(0)
    expected = np.mean([frechet(*_draw(rng)) for _ in range(500)])
    found = [bootstrap_sets(_draw(rng), frechet, resamples=60) for _ in range(30)]
    covered = np.mean([x.low <= expected <= x.high for x in found])
    assert covered > 0.95 - 5 * (0.95 * 0.05 / 30) ** 0.5
    raw = np.mean([x.low + x.bias <= expected <= x.high + x.bias for x in found])
    assert raw < 0.5
    assert np.mean([x.bias for x in found]) == pytest.approx(expected - 0.08, rel=0.15)


def test_set_intervals_of_a_mean_are_those_of_the_bootstrap():
    """A mean has no bias: the same percentiles but for the draws, 2000 of either."""
    values = np.random.default_rng(0).normal(3, 1, 50)
    one = bootstrap(values.tolist())
    sets = bootstrap_sets([values[:, None]], lambda x: float(x.mean()), resamples=2000)
    assert sets.estimate == one.estimate
    width = one.high - one.low
    assert abs(sets.bias) < 5 * width / 3.9 / 2000**0.5
    assert sets[1:3] == pytest.approx(one[1:], abs=0.1 * width)


def test_rows_of_one_set_stay_together_and_sets_do_not():
    rng = np.random.default_rng(0)
    pairs = np.repeat(rng.normal(size=(30, 1)), 2, axis=1)
    together = bootstrap_sets([pairs], lambda x: float((x[:, 0] - x[:, 1]).mean()))
    assert together == (0, 0, 0, 0)
    apart = bootstrap_sets([pairs, pairs], lambda x, y: float((x - y).mean()))
    assert apart.low < 0 < apart.high


def test_set_bootstrap_refuses_no_rows():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_sets([np.zeros((3, 2)), np.zeros((0, 2))], frechet)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_sets([], frechet)
