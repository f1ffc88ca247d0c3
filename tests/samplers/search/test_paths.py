from __future__ import annotations

import pytest

from samplers.search.budget import Budget
from samplers.search.path import Renoise, Run
from samplers.search.paths import Paths
from samplers.search.verifiers.pixels import Brightness


def run(host, call, search, steps=12):
    unguided = {**call, "num_inference_steps": steps, "guidance_scale": 1.0}
    return search.run(host.pipe, [unguided], Brightness(), Budget(renders=1000)).winners[0]


def test_levels_go_up_and_down_and_end(host, call):
    winner = run(host, call, Paths(2, 3, start=0.4, up=0.3, down=0.5))
    levels = winner.report["levels"]
    assert len(levels) == 2  # 0.4 -> 0.2 -> 0
    for here, back, target in levels:
        assert back < here
        assert back < target
    assert levels[-1][2] == 12
    start, (_, back, target), (_, last, _) = levels[0][0], *levels
    cost = 2 * start + 6 * (target - back) + 6 * (12 - last)
    assert winner.ledger.spent().evaluations == cost
    renders = [c for c in winner.candidates if c.purpose == "render"]
    assert len(renders) == 6
    assert winner.best.score == max(c.score for c in renders)


def test_survivors_are_the_best_previews(host, call):
    winner = run(host, call, Paths(2, 3, start=0.4, up=0.3, down=0.5))
    previews = sorted((c for c in winner.candidates if c.purpose == "preview"),
                      key=lambda c: -c.score)[:2]  # fmt: skip
    renders = [c.path for c in winner.candidates if c.purpose == "render"]
    beginnings = [p[: len(previews[0].path)] for p in renders]
    assert set(beginnings) == {c.path for c in previews}
    assert all(isinstance(p[-1], Run) and isinstance(p[-2], Renoise) for p in renders)


def test_a_grid_too_coarse_is_refused(host, call):
    with pytest.raises(ValueError, match="no search"):
        run(host, call, Paths(1, 2, start=0.4, up=0.01, down=0.02), steps=2)
    with pytest.raises(ValueError, match="more than 1000 rounds"):
        run(host, call, Paths(1, 2, start=0.4, up=0.5, down=0.5 + 1e-16), steps=12)


@pytest.mark.parametrize("bad", [{"up": 0.9, "down": 0.8}, {"survivors": 0}, {"start": 0.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Paths"):
        Paths(**bad)
