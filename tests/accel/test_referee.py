"""The change of a share, paired by sample."""

from __future__ import annotations

import numpy as np
import pytest

from accel.referee import paired_difference


def _samples(both: int, lost: int, won: int, neither: int):
    before = np.repeat([True, True, False, False], [both, lost, won, neither])
    after = np.repeat([True, False, True, False], [both, lost, won, neither])
    return before, after


def test_the_estimate_is_the_change_and_lies_inside():
    found = paired_difference(*_samples(150, 20, 10, 20))
    assert found.estimate == pytest.approx(-0.05)
    assert found.low < found.estimate < found.high
    mirrored = paired_difference(*reversed(_samples(150, 20, 10, 20)))
    assert mirrored.low == pytest.approx(-found.high)


def test_no_change_is_not_certainty():
    few, many = (paired_difference(*_samples(n, 0, 0, 0)) for n in (10, 1000))
    assert few.estimate == 0
    assert few.low < 0 < few.high
    assert many.high < few.high / 50


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        u = rng.random(200)
        before, after = u < 0.95, (u < 0.90) | (u > 0.98)  # truly 0.95 and 0.92
        found = paired_difference(before, after)
        covered += found.low <= -0.03 <= found.high
    assert covered / 400 > 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5  # 3 standard errors


def test_samples_must_pair():
    with pytest.raises(ValueError, match="wants two"):
        paired_difference(np.ones(3, bool), np.ones(2, bool))
