from __future__ import annotations

import numpy as np
import pytest

from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.evolution import Evolution, evaluations
from samplers.search.path import Draw, Rotate, Run, Turn
from samplers.search.verifiers.pixels import Brightness

STEPS = 10


def run(host, call, search, seed=0, steps=STEPS):
    unguided = {**call, "num_inference_steps": steps, "guidance_scale": 1.0}
    return search.run(host.pipe, [unguided], Brightness(), Budget(renders=1000),
                      settings=SearchSettings(seed=seed)).winners[0]  # fmt: skip


@pytest.mark.parametrize(
    ("stops", "populations", "expected"),
    [
        ((0, 20, 30, 40), (42, 26, 26, 26, 30), (5000, 150)),  # Stable Diffusion 2.1
        ((5, 20, 30, 40), (14, 7, 7, 7, 10), (1465, 45)),  # FLUX
        ((5, 20, 30, 45), (10, 5, 5, 5, 5), (1000, 30)),  # Wan 1.3B
    ],
)
def test_the_official_schedules_cost_what_they_are_known_to(stops, populations, expected):
    assert evaluations(50, stops, populations) == expected


@pytest.mark.parametrize(
    ("at", "populations"), [((0.0, 0.4, 0.6), (6, 3, 3, 4)), ((0.1, 0.4), (5, 3, 3))]
)
def test_a_run_costs_what_the_arithmetic_says(host, call, at, populations):
    winner = run(host, call, Evolution(at, populations))
    stops = tuple(round(a * STEPS) for a in at)
    cost, decodes = evaluations(STEPS, stops, populations)
    assert winner.ledger.spent().evaluations == cost
    assert winner.ledger.spent().decodes == decodes
    assert len(winner.candidates) == decodes


def test_elites_stay_and_mutants_are_near(host, call):
    winner = run(host, call, Evolution((0.0, 0.4), (6, 4, 4), elites=2, mutation=0.3))
    first = winner.candidates[:6]
    second = [c.path for c in winner.candidates[6:10]]
    order = sorted(first, key=lambda c: -c.score)
    assert [p[0] for p in second[:2]] == [c.path[0] for c in order[:2]]
    assert not any(isinstance(m, Turn) for p in second[:2] for m in p)
    turns = [[m for m in p if isinstance(m, Turn)] for p in second[2:]]
    assert all(len(t) == 1 and t[0].cosine == pytest.approx((1 - 0.09) ** 0.5) for t in turns)
    third = [c.path for c in winner.candidates[10:]]
    assert all(sum(isinstance(m, Rotate) for m in p) == 0 for p in third[:2])
    assert all(sum(isinstance(m, Rotate) for m in p) == 1 for p in third[2:])
    assert all(isinstance(p[0], Draw) and isinstance(p[-1], Run) for p in third)


def test_the_best_ever_wins_and_never_falls(host, call):
    winner = run(host, call, Evolution())
    assert winner.best.score == max(c.score for c in winner.candidates)
    best = [value for _, value in winner.curve()]
    assert best == sorted(best)


def test_selection_raises_the_population(host, call):
    """Last generations against the first, over seeds; the control mutates all away."""

    def change(mutation):
        gains = []
        for seed in range(3):
            search = Evolution((0.0, 0.3, 0.5), (6, 5, 5, 5), 2, mutation)
            found = [c.score for c in run(host, call, search, seed, steps=6).candidates]
            gains.append(np.mean(found[-5:]) - np.mean(found[:6]))
        return np.mean(gains)

    near, away = change(0.2), change(1.0)
    assert near > 0
    assert near > away


@pytest.mark.parametrize(
    "bad",
    [{"at": (0.5, 0.2)}, {"populations": (3, 3)}, {"elites": 9}, {"mutation": 1.5}, {"at": ()}],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Evolution"):
        Evolution(**bad)
