"""The time-shift study in miniature."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from accel import zoo
from benchmarks import bench_time_shift
from benchmarks.schema import DrawsRow
from samplers.epsilon_scaling import EpsilonScaling
from samplers.time_shift import TimeShift

shipped = pytest.mark.skipif("digits-ddpm" not in zoo.names(), reason="digits-ddpm: not shipped")
HERE = {"hardware": "h", "threads": 1}
few = pytest.mark.filterwarnings("ignore::accel.metrics.distribution.FewSamplesWarning")


def test_candidates_scale_with_the_stride_and_have_no_twins():
    for steps, widest in ((5, 160), (10, 80), (50, 16)):
        best = TimeShift(30, 300)
        variants, windows, cutoffs = (f(best) for f in bench_time_shift.candidates(steps, v0=0.3))
        assert {(m.window, m.cutoff) for m in variants} == {(30, 300)}
        assert {m.v0 for m in variants if m.variance_model == "signal"} == {0.3}
        assert max(m.window for m in windows) == widest
        assert {m.cutoff for m in cutoffs} == set(bench_time_shift.CUTOFFS)
        controls = bench_time_shift.constants(steps)
        assert {m.variant for m in controls} == {"constant"}
        assert {m.window for m in controls} == {m.window for m in windows}
        for offered in (variants, windows, cutoffs, controls):
            assert len(set(offered)) == len(offered)


def test_a_row_has_a_distance_for_each_set():
    row = {
        "sampler": "DDIM", "steps": 10, "setting": "base", "methods": [], "calls": 10,
        "samples": 100, "seeds": [1, 2], "frechet": [3.0, 4.0],
    }  # fmt: skip
    DrawsRow(**row)
    with pytest.raises(ValidationError, match="1 distances of 2 sets"):
        DrawsRow(**row | {"frechet": [3.0]})


@shipped
@few
@pytest.mark.parametrize(
    ("sampler", "steps", "calls"),
    [("DDIM", 4, 4), ("DDPM", 4, 4), ("S-PNDM", 4, 5), ("F-PNDM", 4, 13)],
)
def test_every_sampler_draws_a_row(sampler, steps, calls):
    draws = bench_time_shift.Draws(sampler)
    row = draws.row("base", None, steps, bench_time_shift.BATCH, 1)
    DrawsRow(**row)
    assert row["calls"] == calls
    with bench_time_shift.heard(draws.pipe) as seen:
        shifted = draws.row("shifted", TimeShift(100, 0), steps, bench_time_shift.BATCH, 1)
    assert len(seen) == calls
    assert shifted["frechet"] != row["frechet"]


@shipped
@few
def test_what_beats_nothing_is_not_chosen(monkeypatch):
    """An absurd scale makes pictures worse; a scale of nearly nothing may do what it likes."""
    monkeypatch.setattr(bench_time_shift, "CHOOSING", 2 * bench_time_shift.BATCH)
    draws = bench_time_shift.Draws("DDIM")
    assert draws.choose(3, (EpsilonScaling(3.0),)) is None
    assert draws.choose(3, (TimeShift(600, 0, "constant"),)) is None


def test_new_rows_stand_beside_those_of_the_same_protocol_only():
    def row(sampler, steps, setting, distance):
        return {"sampler": sampler, "steps": steps, "setting": setting, "frechet": [distance]}

    own = bench_time_shift.Protocol(model="m", inputs="i", samples=4, seeds="s")
    old = [row("DDIM", 10, "base", 1.0), row("DDIM", 20, "base", 2.0), row("DDPM", 10, "base", 3.0)]
    there = {"protocol": own.as_json(), "rows": old, "environment": HERE}
    kept = bench_time_shift.kept_rows(there, own, HERE)
    rows = bench_time_shift.joined(kept, [row("DDIM", 10, "base", 9.0)])
    assert [r["frechet"] for r in rows] == [[9.0], [2.0], [3.0]]
    other = bench_time_shift.Protocol(model="m", inputs="i", samples=5, seeds="s")
    with pytest.raises(ValueError, match="samples"):
        bench_time_shift.kept_rows(there, other, HERE)
    with pytest.raises(ValueError, match="hardware 'h'"):
        bench_time_shift.kept_rows(there, own, {**HERE, "hardware": "g"})


@shipped
@few
def test_a_study_that_was_cut_off_goes_on(monkeypatch):
    batch = bench_time_shift.BATCH
    monkeypatch.setattr(bench_time_shift, "STEPS", 4)
    monkeypatch.setattr(bench_time_shift.Draws, "choose", lambda *given: None)
    done = frozenset({("F-PNDM", 4, "base"), ("F-PNDM", 4, "constant")})
    rows = list(bench_time_shift.measure(batch, 1, "F-PNDM", [4], done))
    assert [row["setting"] for row in rows] == ["time-shift", "epsilon scaling"]
    assert rows[0]["frechet"] == rows[1]["frechet"]  # nothing was adopted


def test_rows_keep_the_environment_that_they_were_measured_in(monkeypatch):
    def row(setting):
        return {"sampler": "DDIM", "steps": 10, "setting": setting}

    own, files = bench_time_shift.protocol(2000, 3), []
    before = {**HERE, "commit": "before"}
    old = {"protocol": own, "rows": [row("base")], "environment": before}
    old |= {"exposure": {}, "overhead": {}}
    monkeypatch.setattr(bench_time_shift, "read", lambda name: old)
    monkeypatch.setattr(bench_time_shift, "write", lambda *given: files.append(given[-1]))
    monkeypatch.setattr(bench_time_shift, "environment", lambda *given: HERE)
    monkeypatch.setattr(bench_time_shift, "measure", lambda *given: [row("time-shift")])
    monkeypatch.setattr(sys, "argv", ["bench_time_shift"])
    bench_time_shift.main()
    assert [r["environment"] for r in files[-1]["rows"]] == [before, HERE]


@shipped
def test_exposure_compares_the_same_times():
    rows = bench_time_shift.exposure("DDIM", steps=3, samples=4)
    assert [row["time"] for row in rows] == [666, 333, 0]
    assert len(bench_time_shift.exposure("F-PNDM", steps=4, samples=4)) == 13
    level = bench_time_shift.pipeline("DDIM").scheduler.alphas_cumprod
    for row in rows:
        expected = level[row["time"]] * bench_time_shift.clean_variance() + 1 - level[row["time"]]
        assert row["variance"][0] == pytest.approx(float(expected), rel=0.2)


def test_clean_variance_is_that_of_one_picture():
    v0 = bench_time_shift.clean_variance(16)
    world = bench_time_shift.DigitWorld("train", 1, plain=True)
    pictures = world.batch(np.arange(16))[0].astype(np.float64) / 127.5 - 1
    each = [p.var(ddof=1) for p in pictures]
    assert v0 == pytest.approx(np.mean(each), rel=1e-4)
    assert not torch.is_tensor(v0)
