from __future__ import annotations

import pytest

from samplers.search.budget import Budget
from samplers.search.rollover import Rollover
from samplers.search.verifiers.pixels import Brightness

STEPS = 6


def run(host, call, search):
    unguided = {**call, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    return search.run(host.pipe, [unguided], Brightness(), Budget(renders=1000)).winners[0]


def test_quotas_roll_over_and_are_conserved(host, call):
    winner = run(host, call, Rollover(starts=4, quota=3))
    (proposed,) = winner.report["proposed"]
    assert len(proposed) == STEPS - 1
    left = 0
    for made in proposed:
        left += 3 - made
        assert left >= 0, "a step took more than was left"
    assert winner.ledger.spent().evaluations == 4 + sum(proposed) + 1


def test_the_first_that_promises_more_is_taken(host, call):
    winner = run(host, call, Rollover(starts=4, quota=3))
    (proposed,) = winner.report["proposed"]
    previews = [c for c in winner.candidates if c.purpose == "preview"]
    best = max(c.score for c in previews[:4])
    at, left = 4, 0
    for made in proposed:
        left += 3
        scores = [c.score for c in previews[at : at + made]]
        assert all(s <= best for s in scores[:-1])
        assert scores[-1] > best or made == left
        at, left, best = at + made, left - made, max([best, *scores])
    assert at == len(previews)


def test_it_ends_above_a_plain_draw(host, call):
    winner = run(host, call, Rollover(starts=4, quota=4))
    first = [c.score for c in winner.candidates if c.purpose == "preview"][:4]
    assert winner.best.purpose == "render"
    assert winner.best.score > min(first)


@pytest.mark.parametrize("bad", [{"starts": 0}, {"quota": 0}, {"eta": 0.0}, {"together": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Rollover"):
        Rollover(**bad)
