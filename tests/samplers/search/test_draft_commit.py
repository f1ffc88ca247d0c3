from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.method import Recipe, live_on
from accel.settings import Settings
from accel.testing import assert_same_state, host_state, tiny
from caches.native import TaylorSeer
from samplers.search.budget import Budget, Cost
from samplers.search.conduct import SearchSettings
from samplers.search.draft_commit import DraftCommit, calibrate, compared
from samplers.search.player import Player
from samplers.search.verifiers.pixels import Brightness
from samplers.swap import SwapScheduler

FEWER = Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=2),))


def plain(host, seed):
    frames = host.run(generator=torch.Generator().manual_seed(seed), output_type="np")
    return (frames.numpy() * 255).round().astype(np.uint8)


def test_the_winner_is_an_unaccelerated_render_bit_for_bit(host, call):
    host.run()  # pipelines leave caches of their own behind at the first run
    before = host_state(host.pipe)
    winner = DraftCommit(6, commits=2).run(
        host.pipe, [call], Brightness(), Budget(renders=6), FEWER
    ).winners[0]  # fmt: skip
    assert np.array_equal(winner.frames, plain(host, winner.path[0].key)[0])
    assert live_on(host.pipe) == ()
    assert_same_state(before, host_state(host.pipe))
    drafts = [c for c in winner.candidates if c.purpose == "draft"]
    renders = [c for c in winner.candidates if c.purpose == "render"]
    assert (len(drafts), len(renders)) == (6, 2)
    best = sorted(drafts, key=lambda c: -c.score)[:2]
    assert [c.path for c in renders] == [c.path for c in best]
    assert winner.best.score == max(c.score for c in renders)
    costs = winner.ledger.by_purpose
    assert costs["draft"].evaluations == 6 * 2 * 2
    assert costs["render"].evaluations == 2 * 4 * 2
    assert costs["delivery"].evaluations == 0  # what was committed was rendered alone already


def test_the_budget_keeps_the_commit_back(host, call):
    winner = DraftCommit(None).run(
        host.pipe, [call], Brightness(), Budget(renders=3), FEWER
    ).winners[0]  # fmt: skip
    assert winner.ledger.spent().evaluations == 3 * 4 * 2
    assert [c.purpose for c in winner.candidates] == ["draft"] * 4 + ["render"]


def test_a_budget_of_seconds_keeps_the_commits_back(host, call, monkeypatch):
    """Half a second a draft and 0.5 s a step: a render of 4 steps takes 1 s more than a draft."""
    real = Player.frames

    def timed(player, paths, recipe, cost):
        own = Cost()
        frames = real(player, paths, recipe, own)
        own.seconds, own.seconds_decoding = 0.25 * own.evaluations, 0.0
        cost.add(own)
        return frames

    monkeypatch.setattr(Player, "frames", timed)
    monkeypatch.setattr("samplers.search.judging.time.perf_counter", lambda: 0.0)
    winner = DraftCommit(None, commits=2).run(
        host.pipe, [call], Brightness(), Budget(seconds=10), FEWER,
        settings=SearchSettings(batch=1, held_out=()),
    ).winners[0]  # fmt: skip
    assert [c.purpose for c in winner.candidates].count("render") == 2
    assert winner.ledger.spent().seconds <= 10


def test_a_cache_inside_the_network_is_priced_by_its_work():
    """Its evaluations are as many as without."""
    host = tiny("pixart")
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    cache = Recipe((TaylorSeer(interval=4, warmup=2, max_order=1, modules="lite"),))
    calls = [{**call, "num_inference_steps": 10}]
    found = calibrate(host.pipe, calls, Brightness(), cache, candidates=2)
    assert found.price == 1
    assert found.work < 0.8
    assert found.cost == pytest.approx(found.work + 1 / 2)


def test_calibration_sees_a_faithful_and_a_useless_draft(host, call):
    faithful = calibrate(host.pipe, [call], Brightness(), FEWER, candidates=6)
    assert faithful.rank.estimate > 0.5
    assert faithful.price == faithful.work == 0.5
    assert faithful.cost == pytest.approx(0.5 + 1 / 6)


def test_captured_gain_by_hand():
    renders = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    drafts = np.array([[0.0, 2.0, 1.0], [5.0, 1.0, 2.0]])
    found = compared(drafts, renders, price=0.25)
    # input 1: draft picks 1.0 of best 2.0 and mean 1.0; input 2: 3.0 of 3.0 and mean 1.0
    assert found.captured.estimate == pytest.approx((0 + 2) / (1 + 2))
    assert found.top.estimate == 0.5
    assert found.cost == pytest.approx(0.25 + 1 / 3)
    assert compared(renders, renders, price=1.0).captured.estimate == 1
    assert compared(-renders, renders, price=1.0).captured.estimate < 0


def test_what_could_not_be_scored_is_not_drafts_best():
    renders = np.array([[0.0, 1.0, 2.0, np.nan], [3.0, 0.0, 1.0, 2.0]])
    drafts = np.array([[0.0, 1.0, np.nan, 0.5], [3.0, 0.0, 1.0, np.nan]])
    found = compared(drafts, renders, price=0.25)
    # input 1: 1.0, of best 2.0 and mean 1.0; input 2: 3.0 of 3.0 and mean 1.5
    assert found.captured.estimate == pytest.approx((0 + 1.5) / (1 + 1.5))
    assert found.top.estimate == 0.5
    assert found.rank.estimate == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [(0, 1), (2, 3), (8, 0)])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="DraftCommit"):
        DraftCommit(*bad)
