"""Bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from accel.metrics.statistics import bootstrap


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


@pytest.mark.parametrize("values", [[], [1.0, float("inf")], [float("nan")]])
def test_refuses_what_has_no_interval(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap(values)
