"""The study of brightness: what it does to the recipe that is shipped."""

from __future__ import annotations

import accel
from benchmarks.bench_one_more_step import ship
from caches.interval import IntervalCache


def test_what_was_measured_stays_with_the_very_same_recipe(tmp_path):
    path, same = tmp_path / "a.yaml", accel.Recipe((IntervalCache(3),))
    accel.write_recipe(path, same, measured={"speedup": 2.0})
    ship(same, path)
    assert accel.read_recipe(path).measured == {"speedup": 2.0}
    ship(accel.Recipe((IntervalCache(4),)), path)
    assert accel.read_recipe(path).measured is None
