"""How a budget is spent: on the convex hulls of what was measured."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.budgets import Budgets, hull

LADDER = np.array([0.1, 0.25, 0.5, 1.0])


def budgets(curves):
    """Of one layer and one stage, a curve a head."""
    errors = np.array(curves, dtype=float)[None, None]
    return Budgets(LADDER, {"transformer": errors}, {"transformer": np.array([0.5])})


def test_the_hull_leaves_out_what_lies_above():
    steps = hull(LADDER, np.array([1.0, 0.9, 0.2, 0.0]))  # 0.25 is above the line to 0.5
    assert [s.to for s in steps] == [2, 3]
    assert [s.slope for s in steps] == sorted(s.slope for s in steps)


curve = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(
    lambda x: [*sorted(x, reverse=True), 0.0]
)


@settings(max_examples=60, deadline=None)
@given(curves=st.lists(curve, min_size=2, max_size=3), density=st.floats(0.1, 1.0))
def test_no_choice_at_most_as_dense_errs_less_than_the_hulls_allow(curves, density):
    """Against all combinations; the greedy choice may be one step of one head off the optimum."""
    found = budgets(curves).at_density(density)
    assert found.density == pytest.approx(density, abs=0.5 / len(curves) + 1e-9)
    best = min(
        sum(c[i] for c, i in zip(curves, choice, strict=True))
        for choice in itertools.product(range(4), repeat=len(curves))
        if np.mean(LADDER[list(choice)]) <= density + 1e-9
    )
    step = max(c[0] for c in curves)
    assert found.error**2 <= best + step + 1e-9


def test_an_error_budget_holds_with_the_least_density_on_the_hulls():
    b = budgets([[0.4, 0.2, 0.1, 0.0], [0.01, 0.01, 0.01, 0.0]])
    found = b.at_error(0.5)  # squared 0.25; at the start 0.41
    assert found.error <= 0.5
    assert found.shares("transformer", 0, 0.5).tolist() == [0.25, 0.1]  # where it falls fastest
    assert b.at_error(0.0).density == 1
    assert b.at_error(9.0).density == pytest.approx(0.1)


def test_stages_are_found_by_noise_level():
    errors = np.zeros((2, 1, 1, 4))
    errors[0, 0, 0] = [1.0, 0.5, 0.2, 0.0]
    b = Budgets(LADDER, {"transformer": errors}, {"transformer": np.array([0.9, 0.1])})
    found = b.at_density(0.5)
    assert found.shares("transformer", 0, 0.8) > found.shares("transformer", 0, 0.2)


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="calibrated"):
        budgets([[1, 0.5, 0.2, 0]]).at_density(0.05)
    with pytest.raises(ValueError, match="error"):
        budgets([[1, 0.5, 0.2, 0]]).at_error(-1)
