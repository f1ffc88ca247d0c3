"""The schedule language: its passes, resampling, costs and the file format."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.testing import tiny
from caches.schedule import (
    Schedule,
    block_columns,
    causal,
    constant,
    executed,
    extrapolation,
    from_steps,
    last_reads,
    module_columns,
    noise_share,
    of_artifact,
    peak_memory,
    predicted_cost,
    resampled,
    sole_readers,
    to_artifact,
    without_dead,
)

COLUMNS = ("transformer.a", "transformer.b")


def test_a_schedule_is_a_value():
    one = from_steps(COLUMNS, 4, {0, 2})
    assert one == Schedule(COLUMNS, ("CC", "RR", "CC", "RR"))
    assert hash(one) == hash(from_steps(COLUMNS, 4, [0, 2]))
    assert one.share() == 0.5
    assert constant(COLUMNS, 3).is_neutral()
    assert not one.is_neutral()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((("a", "a"), ("CC",)), "each once"),
        (("ab", ("CC",)), "in a tuple"),
        ((("a",), ("C",), (("x", ("C",)), ("x", ("R",)))), "each once"),
        ((("a",), ()), "0 rows"),
        ((("a",), ("CC",)), "1 letters"),
        ((("a",), ("X",)), "letters"),
        ((("a",), ("C",), (("uncond", ("C", "C")),)), "2 and 1 steps"),
    ],
)
def test_what_is_no_table_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Schedule(*arguments)


def test_causal_computes_what_was_never_computed():
    assert causal(Schedule(COLUMNS, ("RF", "RR", "CS"))).rows == ("CC", "RR", "CS")


def test_steps_outside_the_run_are_refused():
    with pytest.raises(ValueError, match=r"\[-1, 77\] are no steps of 4"):
        from_steps(COLUMNS, 4, {0, 77, -1})


def test_causal_sees_that_an_inner_column_did_not_run():
    columns = ("transformer", "transformer.a")
    # the first step computes nothing inside, so the second has nothing to repeat there
    assert causal(Schedule(columns, ("CC", "RC", "CR"))).rows == ("CC", "RC", "CR")
    assert causal(Schedule(columns, ("SC", "CR"))).rows == ("SC", "CC")
    # whichever is named first, what is inside runs once the outer one must
    assert causal(Schedule(columns[::-1], ("RR", "RC"))).rows == ("CC", "RC")


def test_dead_computations_are_dropped_and_living_ones_kept():
    readers = {"transformer.a": ("transformer.b",)}
    #            b reads a at 0 and 3; at 1 a is computed for nothing; at 2 for the reuse at 3
    before = Schedule(COLUMNS, ("CC", "CR", "CR", "RC"))
    assert without_dead(before, readers).rows == ("CC", "RR", "CR", "RC")


def test_a_forecast_keeps_as_many_computations_as_it_reads():
    readers = {"transformer.a": ("transformer.b",)}
    rows = ("CR", "CR", "CR", "FC")
    assert without_dead(Schedule(COLUMNS, rows, order=1), readers).rows == ("RR", "CR", "CR", "FC")
    assert without_dead(Schedule(COLUMNS, rows, order=0), readers).rows == ("RR", "RR", "CR", "FC")


def test_flux_single_blocks_and_unet_middles_have_one_reader():
    (flux,) = denoisers(tiny("flux").pipe)
    single = next(b for b in flux.blocks if b.kind == "single")
    found = sole_readers(flux)
    assert found[f"transformer.{single.self_attn}"] == (f"transformer.{single.ff[1]}",)
    (unet,) = denoisers(tiny("sd").pipe)
    assert sole_readers(unet) == {"unet.mid_block": ("unet.up_blocks.0",)}


def test_resampling_to_the_same_grid_changes_nothing():
    grid = tuple(np.geomspace(80, 0.05, 12))
    rows = tuple(random.Random(0).choice(("CC", "RC", "CF", "RR")) for _ in range(12))
    schedule = Schedule(COLUMNS, rows)
    assert resampled(schedule, grid, grid) == schedule


def test_resampling_is_the_same_in_every_process():
    """Letters that a column has equally often must not be told apart by their hashes."""
    ask = (
        "from caches.schedule import Schedule, resampled\n"
        "s = Schedule(('a',), ('C', 'R', 'F', 'S'))\n"
        "print(resampled(s, (8.0, 4.0, 2.0, 1.0), tuple(2.0**(3 - i / 4) for i in range(13))).rows)"
    )
    found = {
        subprocess.check_output((sys.executable, "-c", ask), env={**os.environ, **seed}, text=True)
        for seed in ({"PYTHONHASHSEED": str(n)} for n in range(4))
    }
    assert len(found) == 1


@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_resampling_keeps_the_computations_at_their_noise_levels(steps):
    source = tuple(np.geomspace(80, 0.05, 20))
    target = tuple(np.geomspace(80, 0.05, steps))
    computed = {0, 3, 9, 15}
    there = resampled(from_steps(("transformer",), 20, computed), source, target)
    levels = [target[i] for i, row in enumerate(there.rows) if row == "C"]
    assert there.rows[0] == "C"
    if steps >= 20:  # as many as before, each near where it was
        assert len(levels) == len(computed)
        for want, got in zip(sorted(computed), levels, strict=True):
            assert abs(np.log(got / source[want])) < np.log(80 / 0.05) / 19
    else:
        assert len(computed) - 1 <= len(levels) <= len(computed)


def test_extrapolation_is_exact_on_polynomials():
    places = (0.9, 0.7, 0.4)
    weights = extrapolation(places, 0.1)
    for power in range(3):
        got = sum(w * x**power for w, x in zip(weights, places, strict=True))
        assert got == pytest.approx(0.1**power, abs=1e-12)
    assert extrapolation((0.3,), 0.1) == (1.0,)
    assert extrapolation((0.3, 0.3, 0.5), 0.1) == pytest.approx((2.0, 0.0, -1.0))


def test_noise_shares_of_both_kinds_of_levels():
    assert noise_share((3.0, 1.0, 0.0)) == (0.75, 0.5, 0.0)
    assert noise_share((1.0, 0.25)) == (1.0, 0.25)  # flow


def test_predicted_cost_counts_what_runs():
    columns = ("transformer", "transformer.a")
    cost = {"transformer": 10.0, "transformer.a": 4.0}
    schedule = Schedule(columns, ("CC", "RC", "CR"))
    # all; nothing but the rest; all without a
    assert predicted_cost(schedule, cost, rest=1.0) == 3 * 1.0 + 10.0 + 0.0 + 6.0


def test_memory_is_held_from_the_computation_to_the_last_read():
    schedule = Schedule(COLUMNS, ("CC", "RR", "CR", "CR"))
    assert last_reads(schedule) == {(0, 0): 1, (0, 1): 3}
    assert peak_memory(schedule, {COLUMNS[0]: 5, COLUMNS[1]: 7}) == 12
    assert peak_memory(constant(COLUMNS, 4), {COLUMNS[0]: 5, COLUMNS[1]: 7}) == 0


def test_columns_inside_one_that_rests_are_not_executed():
    schedule = Schedule(("transformer", "transformer.a"), ("CC", "RC"))
    assert list(executed(schedule)) == [(0, 0, "C"), (0, 1, "C"), (1, 0, "R")]


def test_round_trip_through_an_artifact(tmp_path):
    (denoiser,) = denoisers(tiny("wan").pipe)
    columns = module_columns(denoiser)
    rows = tuple("".join(random.Random(i).choices("CRF", k=len(columns))) for i in range(3))
    schedule = Schedule(columns, rows, (("uncond", rows[::-1]),), order=2)
    made = to_artifact(schedule, denoiser, method="caches.x:X", grid=(3.0, 2.0, 1.0), seed=4)
    again = Artifact.load(made.save(tmp_path / "schedule.safetensors"))
    assert of_artifact(again) == schedule
    assert again.grid == (3.0, 2.0, 1.0)
    again.check_model(denoiser.module)


def test_other_artifacts_hold_no_schedule():
    (denoiser,) = denoisers(tiny("dit").pipe)
    made = to_artifact(constant(("transformer",), 2), denoiser, method="x", grid=(2.0, 1.0))
    made.grid = (2.0,)
    with pytest.raises(ValueError, match="2 rows for 1 levels"):
        of_artifact(made)
    made.tensors.clear()
    with pytest.raises(ValueError, match="holds no schedule"):
        of_artifact(made)


@pytest.mark.parametrize("pipeline", ["dit", "pixart", "flux", "wan", "sd", "sd3", "cogvideox"])
def test_columns_are_modules_of_the_pipeline(pipeline):
    pipe = tiny(pipeline).pipe
    (denoiser,) = denoisers(pipe)
    for column in (*module_columns(denoiser), *block_columns(denoiser)):
        slot, _, path = column.partition(".")
        assert getattr(pipe, slot).get_submodule(path) is not None
