"""Best of N is what it says, and costs what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.path import Draw
from samplers.search.random import Random
from samplers.search.verifiers.pixels import Brightness

STEP = 2  # evaluations of one guided step of one sample


def plain(host, seed):
    frames = host.run(generator=torch.Generator().manual_seed(seed), output_type="np")
    return (frames.numpy() * 255).round().astype(np.uint8)


def test_one_candidate_is_the_plain_call_with_the_seed(host, call):
    found = Random(1).run(host.pipe, [call], Brightness(), Budget(renders=1),
                          settings=SearchSettings(seed=5))  # fmt: skip
    assert np.array_equal(found.winners[0].frames, plain(host, 5)[0])


def test_best_of_n_is_the_maximum_over_n_runs(host, call):
    winner = Random(5).run(host.pipe, [call], Brightness(), Budget(renders=9)).winners[0]
    keys = [c.path[0].key for c in winner.candidates]
    assert len(set(keys)) == 5
    alone = [plain(host, k) for k in keys]
    scores = [Brightness().score(x, [""])[0] for x in alone]
    assert winner.best.path[0] == Draw(keys[int(np.argmax(scores))])
    assert np.array_equal(winner.frames, alone[int(np.argmax(scores))][0])
    # batches are not bit-equal to single runs: a level of 255 by rounding, at most
    assert np.allclose([c.score for c in winner.candidates], scores, atol=1 / 255)
    assert winner.stopped == "finished"


@pytest.mark.parametrize("budget", [Budget(evaluations=8 * STEP * 4), Budget(renders=8)])
def test_a_budget_in_evaluations_is_kept_to_the_last_one(host, call, budget):
    winner = Random().run(host.pipe, [call], Brightness(), budget,
                          settings=SearchSettings(batch=3)).winners[0]  # fmt: skip
    steps = call["num_inference_steps"]
    assert len(winner.candidates) == 8
    assert winner.ledger.spent().evaluations == 8 * steps * STEP
    assert winner.ledger.by_purpose["delivery"].evaluations == steps * STEP
    assert winner.ledger.by_purpose["probe"].evaluations == STEP
    assert winner.ledger.total().decodes == 9
    assert winner.ledger.spent().verified == 8 * 2  # the searched one and the held-out one
    assert winner.stopped == "the budget is spent"


def test_a_budget_in_seconds_ends(host, call):
    winner = Random().run(host.pipe, [call], Brightness(), Budget(seconds=0.2)).winners[0]
    assert winner.ledger.spent().seconds >= 0.2
    assert winner.candidates


@pytest.mark.parametrize("renders", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_above_nothing_and_finite(renders):
    with pytest.raises(ValueError, match="above 0"):
        Budget(renders=renders)


@pytest.mark.parametrize("candidates", [0, -1])
def test_no_candidates_are_refused(candidates):
    with pytest.raises(ValueError, match="candidates"):
        Random(candidates)
