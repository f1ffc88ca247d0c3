"""The guard's constants are those of the measured results."""

from __future__ import annotations

import pytest

from benchmarks.results_file import read
from sparse_attn.speed import expected_ratio, worth_it


def test_break_even_is_what_was_measured():
    result = read("sparse")
    assert result is not None
    for row in result["attention"]:
        if row["density"] < 1:  # there the kernel attends densely, without a copy
            expected = expected_ratio("cpu", tuple(row["blocks"]), row["executed"])
            measured = 1 / row["speedup"]["estimate"]
            # three rounds on a busy machine: their intervals are up to a quarter wide
            assert expected == pytest.approx(measured, rel=0.35, abs=0.03)


def test_short_sequences_and_dense_maps_are_not_worth_it():
    assert worth_it("cpu", 8190, (256, 64), 0.25)
    assert not worth_it("cpu", 1280, (256, 64), 0.25)
    assert not worth_it("cpu", 8190, (256, 64), 0.9)
    assert not worth_it("cuda", 4096, (256, 64), 0.1)
