"""Curves at equal fidelity are read off between settings, never beyond them."""

from __future__ import annotations

import pytest

from benchmarks.cache_tables import curves, matched, speed_at


def _row(speed, quality):
    return {"speedup": {"estimate": speed}, "psnr": {"estimate": quality}}


ROWS = {
    "evolution: bold": _row(6.0, 20.0),
    "evolution: careful": _row(4.0, 40.0),
    "TaylorSeer, lite: 5": _row(3.0, 40.0),
    "TaylorSeer, lite: 7": _row(4.0, 24.0),
    "control: random": _row(9.0, 50.0),
}


def test_a_curve_is_what_stands_before_the_colon():
    assert curves(ROWS) == {
        "evolution": [(6.0, 20.0), (4.0, 40.0)],
        "TaylorSeer, lite": [(3.0, 40.0), (4.0, 24.0)],
    }


def test_speeds_are_read_off_between_settings():
    assert speed_at([(6.0, 20.0), (4.0, 40.0)], 30.0) == pytest.approx(5.0)
    assert speed_at([(6.0, 20.0), (4.0, 40.0)], 40.0) == 4.0
    assert speed_at([(6.0, 20.0), (4.0, 40.0)], 45.0) is None
    assert speed_at([(6.0, 20.0)], 15.0) == 6.0  # at least: no faster setting is known


def test_ours_over_the_best_peer():
    last = matched({"rows": ROWS}).splitlines()[-1]
    assert last.startswith("| **best of ours")
    at_25, at_30, _, at_40 = (cell.strip() for cell in last.split("|")[2:6])
    assert float(at_25) == pytest.approx(5.5 / 3.9375, abs=0.01)
    assert float(at_30) == pytest.approx(5.0 / 3.625, abs=0.01)
    assert float(at_40) == pytest.approx(4.0 / 3.0, abs=0.01)
