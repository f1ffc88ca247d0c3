"""The arithmetic of the search study."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.bench_search import best_at
from benchmarks.search_report import JUDGE, MOST, REFEREE, expected_best, nines
from samplers.search.budget import Ledger
from samplers.search.path import Draw, Run
from samplers.search.result import Candidate, Winner


def candidate(index, score, held, evaluations=0, purpose="render"):
    scores, out = {JUDGE: score}, {REFEREE: held}
    return Candidate(index, (Draw(index), Run()), purpose, score, scores, out, evaluations)


POOL = [(-2.0, -0.1), (-0.5, -3.0), (-0.01, -0.2)]


def test_nines():
    assert nines(math.log(0.9)) == pytest.approx(1)
    assert nines(math.log(0.999)) == pytest.approx(3)
    assert nines(0.0) == MOST
    assert nines(-math.inf) == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_random_search_is_the_mean_over_all_choices(count):
    expected = np.mean(
        [
            [nines(x) for x in max(some, key=lambda scores: scores[0])]
            for some in itertools.combinations(POOL, count)
        ],
        axis=0,
    )
    assert expected_best(POOL, count) == pytest.approx(expected)


def test_fractions_of_a_draw_lie_between():
    low, high = expected_best(POOL, 1), expected_best(POOL, 2)
    assert expected_best(POOL, 1.25) == pytest.approx(0.75 * low + 0.25 * high)


def test_the_best_for_a_cost_knows_nothing_dearer():
    found = [candidate(0, -1.0, -1.0, 20), candidate(1, -0.5, -1.0, 40),
             candidate(2, -0.1, -1.0, 60), candidate(3, -0.01, -1.0, 10, "draft")]  # fmt: skip
    winner = Winner(None, found[0].path, found[0], {}, found, Ledger(), {}, "finished")
    assert best_at(winner, 50) is found[1]
    assert best_at(winner, 60) is found[2]
    assert best_at(winner, 10) is None
