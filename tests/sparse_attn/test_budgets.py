"""How a budget is spent: on the convex hulls of what was measured."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.clock import sampling_grid
from sparse_attn.budgets import Budgets, Checks, Curves, hull, stage_ends

LADDER = np.array([0.1, 0.25, 0.5, 1.0])


def budgets(*curves, steps=(1,)):
    """Of one stage for each number of steps, a curve a layer."""
    losses = np.array(curves, dtype=float).reshape(len(steps), -1, len(LADDER))
    gains = np.ones((*losses.shape[:2], 2))
    sigmas = np.linspace(0.9, 0.1, len(steps))
    found = Curves(losses, gains, sigmas, np.array(steps))
    return Budgets(LADDER, {"transformer": found}, Checks(np.zeros(1), np.zeros((1, 1))), "head")


def test_the_hull_leaves_out_what_lies_above():
    steps = hull(LADDER, np.array([1.0, 0.9, 0.2, 0.0]))  # 0.25 is above the line to 0.5
    assert [s.share for s in steps] == [0.4, 0.5]
    worth = [s.worth / s.cost for s in steps]
    assert worth == sorted(worth, reverse=True)


curve = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(
    lambda x: [*sorted(x, reverse=True), 0.0]
)


@settings(max_examples=60, deadline=None)
@given(curves=st.lists(curve, min_size=2, max_size=3), density=st.floats(0.1, 1.0))
def test_no_choice_as_dense_loses_less(curves, density):
    """Against all combinations of corners: what is spent in between is on the hulls."""
    found = budgets(*curves).at_density(density)
    assert found.density == pytest.approx(density)
    assert found.shares["transformer"].mean() == pytest.approx(density)
    best = min(
        sum(c[i] for c, i in zip(curves, choice, strict=True))
        for choice in itertools.product(range(4), repeat=len(curves))
        if np.mean(LADDER[list(choice)]) <= density + 1e-9
    )
    assert found.loss <= best + 1e-9


def test_a_quality_holds_with_the_least_density():
    b = budgets([0.4, 0.2, 0.1, 0.0], [0.01, 0.01, 0.01, 0.0])
    found = b.at_quality(-10 * np.log10(0.21))
    assert found.loss == pytest.approx(0.21)
    assert found.quality == pytest.approx(-10 * np.log10(0.21))
    assert found.shares["transformer"].tolist() == [[0.25, 0.1]]  # where it falls fastest
    assert b.at_quality(200.0).density == pytest.approx(1)
    assert b.at_quality(0.0).density == pytest.approx(0.1)


def test_what_costs_more_steps_must_be_worth_more():
    alike = [0.4, 0.2, 0.1, 0.0]
    found = budgets(alike, alike, steps=(1, 9)).at_density(0.13)
    assert found.shares["transformer"][:, 0].tolist() == pytest.approx([0.4, 0.1])


def test_stages_are_found_by_noise_level():
    b = budgets([1.0, 0.5, 0.2, 0.0], [0.0] * 4, steps=(1, 1))
    found = b.at_density(0.5)
    assert found.of("transformer", 0, 0.8)[0] > found.of("transformer", 0, 0.2)[0]


def zero_snr(steps):
    """CogVideoX's levels: trailing steps, of which the first has next to no signal."""
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return list(sampling_grid(scheduler)[1])


def flow(steps, shift=5.0):
    u = np.linspace(1, 1 / steps, steps)
    return (shift * u / (1 + (shift - 1) * u)).tolist()


def karras(steps):
    return (np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7).tolist()


@pytest.mark.parametrize("grid", [zero_snr, flow, karras])
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_every_step_is_in_the_stage_that_it_was_measured_in(grid, stages):
    """So that as many steps are as sparse as a budget counts on; about so on a finer grid."""
    cut = [part.tolist() for part in np.array_split(grid(50), stages)]
    sizes = np.array([len(part) for part in cut])
    means = np.array([np.mean(part) for part in cut])
    curves = Curves(np.ones(1), np.ones(1), means, sizes, np.array(stage_ends(cut)))
    found = [curves.stage(sigma) for part in cut for sigma in part]
    assert found == np.repeat(np.arange(stages), sizes).tolist()
    finer = np.bincount([curves.stage(sigma) for sigma in grid(100)], minlength=stages)
    assert np.abs(finer - 2 * sizes).max() <= 2
    assert curves.stage(0.0) == stages - 1


def test_gains_are_on_a_device_once():
    """A policy asks at every attention, and must not wait for a copy."""
    found = budgets([1.0, 0.5, 0.2, 0.0]).at_density(0.5)
    device = torch.device("meta")
    one, two = (found.of("transformer", 0, 0.8, device)[1] for _ in "12")
    assert one.device == two.device == device
    assert one.untyped_storage()._cdata == two.untyped_storage()._cdata
    assert found.of("transformer", 0, 0.8)[1].tolist() == [1.0, 1.0]


def test_qualities_follow_what_was_seen():
    seen = np.array([[17.0, 21.0], [19.0, 25.0]])
    checks = Checks(np.array([20.0, 30.0]), seen)  # losses add up to more
    assert checks.quality(1e-2) == pytest.approx(18)
    assert checks.quality(1e-4) == pytest.approx(28)
    assert checks.loss(28) == pytest.approx(1e-4)
    b = dataclasses.replace(budgets([1e-2, 1e-3, 1e-4, 0.0]), checks=checks)
    assert b.at_quality(23).loss == pytest.approx(1e-3)
    assert b.at_density(0.25).quality == pytest.approx(23)
    assert b.at_density(0.25).extremes == pytest.approx((21, 25))
    assert b.at_density(0.1).extremes == pytest.approx((17, 19))
    alone = dataclasses.replace(b, checks=Checks(checks.summed, seen[:1]))
    assert alone.at_density(0.25).extremes is None


def test_what_was_not_measured_is_refused():
    for density in (0.05, 1.5):
        with pytest.raises(ValueError, match="calibrated"):
            budgets([1, 0.5, 0.2, 0]).at_density(density)
