from __future__ import annotations

import numpy as np
import pytest

from samplers.search.budget import Budget, Cost
from samplers.search.conduct import SearchSettings
from samplers.search.noise import cosine_between
from samplers.search.path import Turn
from samplers.search.player import Player
from samplers.search.random import Random
from samplers.search.session import PLAIN
from samplers.search.verifiers.pixels import Brightness
from samplers.search.zero_order import ZeroOrder


def run(host, call, search, renders=21):
    budget = Budget(renders=renders)
    return search.run(host.pipe, [call], Brightness(), budget, settings=SearchSettings(batch=4))


def test_it_climbs_and_never_loses_its_pivot(host, call):
    winner = run(host, call, ZeroOrder(cosine=0.8)).winners[0]
    assert winner.report["moves"] >= 1
    best, pivots = -np.inf, []
    for start in (0, *range(1, len(winner.candidates), 4)):
        group = winner.candidates[start : start + (1 if start == 0 else 4)]
        best = max(best, *(c.score for c in group)) if len(group) > 1 else max(best, group[0].score)
        pivots.append(best)
    assert winner.best.score == pivots[-1]
    turns = [len([m for m in c.path if isinstance(m, Turn)]) for c in winner.candidates]
    assert turns[0] == 0
    assert max(turns) == 1 + winner.report["moves"] or max(turns) == winner.report["moves"]


def test_it_beats_random_search_on_a_smooth_score(host, call):
    """Brightness is smooth in the noise; a climb must pay. The control is the same cost."""
    ours = [run(host, call, ZeroOrder(cosine=0.7), 29).winners[0].best.score]
    theirs = [run(host, call, Random(), 29).winners[0].best.score]
    assert np.mean(ours) > np.mean(theirs)


def test_the_floor_bounds_the_drift(host, call):
    winner = run(host, call, ZeroOrder(cosine=0.8, floor=0.6)).winners[0]
    free = run(host, call, ZeroOrder(cosine=0.8)).winners[0]
    with Player(host.pipe, call) as player:

        def drift(found):
            paths = [c.path[:-1] for c in found.candidates]
            states = player.reach([found.candidates[0].path[:1], *paths], PLAIN, Cost())
            return min(cosine_between(states[0].sample, s.sample) for s in states)

        assert drift(winner) >= 0.6 > drift(free)


def test_widening_looks_farther_after_failures(host, call):
    winner = run(host, call, ZeroOrder(cosine=0.95, widen=2.0), 30).winners[0]
    cosines = {m.cosine for c in winner.candidates for m in c.path if isinstance(m, Turn)}
    assert min(cosines) < 0.95
    assert min(cosines) >= 0.5
    winner = run(host, call, ZeroOrder(neighbours=1, cosine=0.1, rounds=4), 30).winners[0]
    cosines = {m.cosine for c in winner.candidates for m in c.path if isinstance(m, Turn)}
    assert cosines == {0.1}


@pytest.mark.parametrize(
    "bad", [{"neighbours": 0}, {"cosine": 1.0}, {"floor": 1.0}, {"widen": 0.5}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="ZeroOrder"):
        ZeroOrder(**bad)
