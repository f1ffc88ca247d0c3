"""What is counted is what ran: less under a cache, by itself as much as without being watched."""

import pytest
import torch

import accel
from accel.tiny import STEPS, tiny
from apps.render.watch import watched
from caches.interval import IntervalCache


def _rows(one, recipe):
    with watched(one.pipe) as parts, accel.attached(recipe, one.pipe) as live:
        live.clock.subscribe(lambda event: event.kind == "step" and parts.take())
        one.run()
    return parts.as_json()


@pytest.mark.parametrize("name", ["dit", "wan", "sd"])
def test_everything_runs_without_a_recipe(name):
    one = tiny(name)
    plain = one.run()
    counted = _rows(one, accel.Recipe(()))
    assert len(counted["rows"]) == STEPS
    for row in counted["rows"]:
        assert len(row) == len(counted["parts"])
        assert min(row) > 0
        assert row == counted["rows"][0]
    assert torch.equal(one.run(), plain), "watching left something behind"
    assert not [
        m for _, m in one.pipe.components.items() if "forward" in getattr(m, "__dict__", {})
    ]


def test_what_a_cache_keeps_back_does_not_run():
    one = tiny("dit")
    full = _rows(one, accel.Recipe(()))["rows"]
    cached = _rows(one, IntervalCache(interval=2, warmup=1, tail=0))["rows"]
    assert cached[0] == full[0]
    assert any(sum(row) == 0 for row in cached)
    assert sum(map(sum, cached)) < sum(map(sum, full))


def test_a_pipeline_whose_parts_are_not_known_is_not_watched():
    class Unknown:
        transformer = torch.nn.Linear(1, 1)

    with watched(Unknown()) as parts:
        assert parts is None
