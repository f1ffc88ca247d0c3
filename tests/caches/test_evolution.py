"""The searched cache: conformance, the search end to end, resuming, and the parts it is made of."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.method import GuidanceWarning, Recipe, attached
from accel.testing import (
    assert_equal,
    assert_same_state,
    checks,
    conform,
    host_state,
    tiny,
)
from caches._drift import best_steps, forecast_errors, measure_drift
from caches._front import Candidate, Front, is_dominated
from caches._step_mutation import step_mutation
from caches.evolution import EvolutionCache, EvolutionSearch, searched_columns
from caches.schedule import Schedule, extrapolation, from_steps, noise_share, to_artifact
from samplers.swap import SwapScheduler

pytest.importorskip("pymoo")
STEPS = 6


def method_for(pipeline, folder, parts="output+modules", **more):
    """An EvolutionCache whose schedule alternates, on the grid of the tiny pipeline's own call."""
    host = tiny(pipeline)
    steps = host.inputs.get("num_inference_steps", 4)
    (denoiser,) = denoisers(host.pipe)
    columns = searched_columns(denoiser, parts)
    schedule = from_steps(columns, steps, range(0, steps, 2), "F")
    found = EvolutionCache.of(
        schedule, host.pipe, folder / "schedule.safetensors", call=host.inputs
    )
    return replace(found, **more)


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(("pipeline", "parts"), [("dit", "output+modules")])
def test_conformance(check, pipeline, parts, tmp_path):
    conform(check, method_for(pipeline, tmp_path, parts), pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["pixart", "flux", "wan", "sd", "sd3", "ltx", "cogvideox"])
def test_conformance_matrix(check, pipeline, tmp_path):
    conform(check, method_for(pipeline, tmp_path), pipeline)


def test_another_model_is_refused(tmp_path):
    method = method_for("dit", tmp_path)
    with pytest.raises(ValueError, match="it is for DiTTransformer2DModel"):
        method.attach(tiny("pixart").pipe)


def test_rows_of_a_branch_that_does_not_run_are_said(tmp_path):
    host = tiny("dit")
    rows = ("C", "R", "R", "R")
    schedule = Schedule(("transformer",), rows, (("call0", rows), ("uncond", ("C",) * 4)))
    with attached(EvolutionCache.of(schedule, host.pipe, tmp_path / "s"), host.pipe) as live:
        host.run(num_inference_steps=4)
        (report,) = live.report()["runs"]
    assert report["detail"] == {"unused_branches": ["uncond"]}


def test_an_artifact_is_read_once_to_look_and_once_to_attach(tmp_path, monkeypatch):
    read = []
    load = Artifact.load
    monkeypatch.setattr(Artifact, "load", lambda ref: read.append(ref) or load(ref))
    method_for("dit", tmp_path).attach(tiny("dit").pipe).detach()
    assert len(read) == 2


def test_guidance_of_another_kind_than_it_was_made_with_is_said(tmp_path):
    host, path = tiny("dit"), tmp_path / "schedule.safetensors"
    method_for("dit", tmp_path)
    made = Artifact.load(path)
    made.guidance = True
    with attached(EvolutionCache(made.save(path)), host.pipe) as live:
        host.run(guidance_scale=4.0)
        with pytest.warns(GuidanceWarning, match="made with guidance, run without"):
            host.run(guidance_scale=1.0)
        host.run(guidance_scale=1.0)  # said once
        details = [run["detail"].get("guidance") for run in live.report()["runs"]]
    assert details == [None, *["made with guidance, run without"] * 2]


def test_another_grid_is_resampled_refused_or_bypassed(tmp_path):
    host = tiny("dit")
    plain = host.run(num_inference_steps=9)
    with attached(method_for("dit", tmp_path), host.pipe) as live:
        host.run(num_inference_steps=9)
        (run,) = live.report()["runs"]
    assert run["detail"]["resampled"][1] == 9
    assert run["reused"] > 0
    with (
        attached(method_for("dit", tmp_path, on_grid="error"), host.pipe),
        pytest.raises(ValueError, match="on_grid='resample'"),
    ):
        host.run(num_inference_steps=9)
    with attached(method_for("dit", tmp_path, on_grid="bypass"), host.pipe) as live:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert_equal(plain, host.run(num_inference_steps=9), "bypassed")
        assert "other noise levels" in next(iter(live.report()["runs"][0]["fallbacks"]))


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        (("transformer.nothing",), ("C", "R"), "has no 'transformer.nothing'"),
        (("unet",), ("C", "R"), "has no 'unet'"),
        (("transformer.transformer_blocks.0.ff",), ("C", "S"), "no transformer block"),
        (("transformer",), ("C", "S"), "no transformer block"),
    ],
)
def test_schedules_of_other_parts_are_refused_before_a_run(columns, rows, words, tmp_path):
    host = tiny("dit")
    (denoiser,) = denoisers(host.pipe)
    made = to_artifact(
        Schedule(columns, rows), denoiser, method=EvolutionCache.name(), grid=(2.0, 1.0)
    )
    method = EvolutionCache(made.save(tmp_path / "schedule.safetensors"))
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match=words):
        method.attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


def _grid(host, steps):
    """The noise levels that the pipeline itself lays."""
    found = []
    with attached(Recipe(()), host.pipe) as live:
        live.clock.subscribe(lambda event: found.append(live.clock.run))
        host.run(num_inference_steps=steps)
    return found[0].sigmas


@pytest.mark.parametrize("pipeline", ["dit", "flux", "cogvideox", "sd3"])
def test_a_skipped_block_passes_its_input_on(pipeline, tmp_path):
    host = tiny(pipeline)
    (denoiser,) = denoisers(host.pipe)
    block = next(b for b in denoiser.blocks if b.ff)
    column = f"{denoiser.slot}.{block.path}"
    schedule = Schedule((column,), ("C", "S", "C", "C"))
    made = to_artifact(schedule, denoiser, method=EvolutionCache.name(), grid=_grid(host, 4))
    method = EvolutionCache(made.save(tmp_path / "schedule.safetensors"))
    seen = []

    def look(call_next, *args, **kwargs):
        output = call_next(*args, **kwargs)
        seen.append((args, kwargs, output))
        return output

    with attached(method, host.pipe, strict=True) as live:
        live.patch.around_call(denoiser.module.get_submodule(block.path), look)
        host.run(num_inference_steps=4)
        (run,) = live.report()["runs"]
    assert run["skipped"] == len(seen) // 4
    args, kwargs, output = seen[len(seen) // 4]  # step 1
    given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
    parts = output if isinstance(output, tuple) else (output,)
    assert len(parts) == len(block.output_layout)
    assert all(any(part is x for x in given) for part in parts)
    assert run["fallbacks"] == {}


# -- drift -----------------------------------------------------------------------------------


def test_forecast_errors_are_those_of_the_forecasts():
    shares = (0.99, 0.9, 0.7, 0.4, 0.1)
    outputs = np.random.default_rng(0).normal(size=(5, 30))
    found = forecast_errors(outputs @ outputs.T, shares, order=1)
    for a, b, s in itertools.combinations(range(5), 3):
        wb, wa = extrapolation((shares[b], shares[a]), shares[s])
        want = np.square(wb * outputs[b] + wa * outputs[a] - outputs[s]).sum()
        assert found[a, b, s] == pytest.approx(want)
    assert found[1, 1, 3] == pytest.approx(np.square(outputs[1] - outputs[3]).sum())  # repeated


@pytest.mark.parametrize("price", [0.02, 0.3, 2.0])
def test_best_steps_are_the_best_of_all(price):
    """Against every subset of steps."""
    rng = np.random.default_rng(1)
    shares = noise_share(tuple(np.geomspace(20, 0.1, 8)))
    outputs = np.cumsum(rng.normal(size=(8, 10)), axis=0)
    errors = forecast_errors(outputs @ outputs.T / 50, shares, order=1)
    weights = rng.uniform(0.5, 2, 8)

    def cost(steps):
        total = price * len(steps)
        for s in set(range(8)) - set(steps):
            known = [c for c in steps if c < s]
            b = known[-1]
            a = known[-2] if len(known) > 1 else b
            total += weights[s] * errors[a, b, s]
        return total

    subsets = [(0, *rest) for n in range(8) for rest in itertools.combinations(range(1, 8), n)]
    best = min(subsets, key=cost)
    assert cost(best_steps(errors, weights, price)) == pytest.approx(cost(best))


def test_drift_knows_every_column_and_changes_nothing():
    host = tiny("dit")
    before = host.run()
    columns = searched_columns(denoisers(host.pipe)[0], "output+modules")
    arguments = {k: v for k, v in host.inputs.items() if k != "generator"}
    drift = measure_drift(host.pipe, arguments, columns)
    assert_equal(before, host.run(), "after the probe")
    assert set(drift.products) == set(columns) == set(drift.seconds)
    for products in drift.products.values():
        assert products.trace() == pytest.approx(len(drift.shares), rel=1e-5)
    assert drift.seconds["transformer"] > sum(drift.seconds[c] for c in columns[1:])


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_predicted_seconds_are_those_of_the_calls(name, monkeypatch):
    """One a step, or two where guidance calls twice: the price of a call is what they share."""
    from caches import _drift

    host, ticks = tiny(name), iter(range(10**9))  # every look at the clock is a second later
    monkeypatch.setattr(_drift.time, "perf_counter", lambda: float(next(ticks)))
    (denoiser,) = denoisers(host.pipe)
    arguments = host.inputs | {"num_inference_steps": STEPS}
    arguments.pop("output_type")
    drift = measure_drift(host.pipe, arguments, (denoiser.slot,))
    calls = STEPS * (2 if name == "wan" else 1)
    assert drift.seconds[denoiser.slot] == 1.0
    assert drift.rest == (calls + 1) / calls  # between two calls, and around them


# -- the search ------------------------------------------------------------------------------


def _search(folder, **more):
    host = tiny("dit")
    inputs = [{"class_labels": [i, i + 1], "num_inference_steps": STEPS} for i in range(2)]
    search = EvolutionSearch(population=6, generations=3, **more)
    return host.pipe, inputs, search, search.run(host.pipe, inputs, folder)


@pytest.mark.parametrize("parts", ["output", "modules", "output+modules", "blocks"])
def test_a_search_ends_with_a_front(parts, tmp_path):
    pipe, _, _, front = _search(tmp_path, parts=parts)
    assert front.candidates[0].quality == 100.0  # everything computed is among the first
    goals = [(1 / c.speedup, -c.quality) for c in front.candidates]
    assert not any(is_dominated(g, goals) for g in goals)
    assert front.candidates[-1].speedup > 1.0
    assert (tmp_path / "front.png").is_file()
    again = Front.read(tmp_path)
    assert again.candidates == front.candidates
    method = EvolutionCache(again.pick(speed=front.candidates[-1].speedup))
    with attached(method, pipe) as live:
        pipe(class_labels=[1], num_inference_steps=STEPS, output_type="np")
        assert live.report()["runs"][0]["reused"] > 0


def test_a_search_ends_where_every_schedule_was_looked_at(tmp_path):
    """Of three steps there are fewer genomes than one population."""
    inputs = [{"class_labels": [1], "num_inference_steps": 3}]
    front = EvolutionSearch().run(tiny("dit").pipe, inputs, tmp_path)
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == 4  # the first step computes
    assert Front.read(tmp_path).candidates == front.candidates


@pytest.mark.parametrize(
    ("parts", "output", "module"),
    [("modules", None, "CFCFCF"), ("output+modules", "C" * STEPS, "CFCFCF")],
)
def test_a_search_begins_with_regular_intervals_too(parts, output, module, tmp_path):
    _search(tmp_path, parts=parts)
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()[:6]
    first = [list(zip(*json.loads(line)["rows"].split(" "), strict=True)) for line in lines]
    assert any(
        "".join(columns[-1]) == module and output in (None, "".join(columns[0]))
        for columns in first
    )


def test_a_search_that_was_cut_off_goes_on(tmp_path):
    pipe, inputs, search, front = _search(tmp_path / "whole", parts="modules")
    half = tmp_path / "half"
    search.run(pipe, inputs, half)
    lines = (half / "evaluations.jsonl").read_text().splitlines()
    (half / "evaluations.jsonl").write_text("\n".join(lines[:5]) + '\n{"rows": "CC')
    (half / "front.json").unlink()
    resumed = search.run(pipe, inputs, half)
    qualities = {c.schedule: c.quality for c in front.candidates}
    for candidate in resumed.candidates:
        assert candidate.quality == pytest.approx(
            qualities.get(candidate.schedule, candidate.quality)
        )
    # What was found after the cut is not written behind the piece that was left: killed again,
    # nothing of it would be paid twice.
    # With the costs that it began with, it asks for the same candidates again.
    again = (half / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["rows"] for line in again] == [json.loads(x)["rows"] for x in lines]
    (half / "evaluations.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"evaluations.jsonl is damaged"):
        search.run(pipe, inputs, half)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "said"), [("drift.npz", "this and evaluations.jsonl"), ("front.json", "this")]
)
def test_files_that_were_cut_off_are_named(name, said, share, tmp_path):
    search, pipe = EvolutionSearch(population=2, generations=1), tiny("dit").pipe
    inputs = [{"class_labels": [1], "num_inference_steps": 2}]
    search.run(pipe, inputs, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{name} is damaged; .*remove {said}$"):
        search.run(pipe, inputs, tmp_path) if name == "drift.npz" else Front.read(tmp_path)


def test_a_schedule_that_ruins_the_samples_is_on_no_front(tmp_path):
    """Not a number compares with nothing, so nothing would be better than it."""

    def quality(samples, reference):
        equal = torch.equal(samples, reference)
        return 100.0 if equal else float("nan")

    search = EvolutionSearch(population=4, generations=2)
    inputs = [{"class_labels": [1], "num_inference_steps": 4}]
    front = search.run(tiny("dit").pipe, inputs, tmp_path, quality=quality)
    assert [c.quality for c in front.candidates] == [100.0]
    assert not math.isnan(Front.read(tmp_path).candidates[0].quality)
    with pytest.raises(ValueError, match="no schedule whose quality is a number"):
        Front((), tmp_path).pick(speed=1.0)


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    pipe, inputs, _, _ = _search(tmp_path)
    same = EvolutionSearch(population=6, generations=3)
    solver = Recipe((SwapScheduler("DPMSolverMultistepScheduler"),))
    for search, host, more in [
        (EvolutionSearch(population=6, generations=3, seed=1), pipe, {}),
        (same, tiny("dit", seed=1).pipe, {}),
        (same, pipe, {"recipe": solver}),
        (same, pipe, {"quality": lambda a, b: 0.0}),
    ]:
        with pytest.raises(ValueError, match="another model, other inputs or settings"):
            search.run(host, inputs, tmp_path, **more)


@pytest.mark.parametrize(
    "settings", [{"parts": "block"}, {"population": 0}, {"order": -1}, {"mutation": 2.0}]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="EvolutionSearch"):
        EvolutionSearch(**settings)


def test_a_search_with_a_recipe_runs_it(tmp_path):
    from caches.interval import IntervalCache

    host = tiny("dit")
    inputs = [{"class_labels": [1], "num_inference_steps": STEPS}]
    search = EvolutionSearch(parts="output", population=4, generations=1)
    with pytest.raises(ValueError, match="both claim"):
        search.run(host.pipe, inputs, tmp_path, recipe=Recipe((IntervalCache(2),)))


def test_a_search_without_pymoo_says_so_at_once(tmp_path, monkeypatch):
    pipe = tiny("dit").pipe
    monkeypatch.setitem(sys.modules, "pymoo", None)
    monkeypatch.setattr(type(pipe), "__call__", None)
    with pytest.raises(ImportError, match=r"\.\[search\]"):
        EvolutionSearch().run(pipe, [{"class_labels": [1]}], tmp_path)


def test_pick_says_what_there_is(tmp_path):
    front = Front((Candidate(from_steps(("transformer",), 2, {0}), 1.5, 30.0),), tmp_path)
    with pytest.raises(ValueError, match=r"1.50x at 30.0 to 1.50x at 30.0"):
        front.pick(speed=2.0)
    with pytest.raises(ValueError, match="for a speed or for a quality"):
        front.pick()


def test_mutation_moves_or_flips():
    genomes = np.zeros((40, 12 * 2), dtype=bool)
    genomes[:, ::6] = True
    mutation = step_mutation(12, share=0.1)
    found = mutation._do(None, genomes, random_state=np.random.default_rng(0))
    assert found.shape == genomes.shape
    assert (found != genomes).any(axis=1).mean() > 0.5
    moved = [f for f in found if f.sum() <= 4]
    assert all(1 <= f.sum() <= 4 for f in moved)


def test_the_front_is_plain_json(tmp_path):
    front = Front.of([Candidate(Schedule(("transformer",), ("C", "R")), 1.5, 30.0)], tmp_path)
    (denoiser,) = denoisers(tiny("dit").pipe)
    front.write(
        lambda s: to_artifact(s, denoiser, method="x", grid=(2.0, 1.0)), {"seed": 1}, [(1.5, 30.0)]
    )
    record = json.loads((tmp_path / "front.json").read_text())
    assert record["seed"] == 1
    assert record["candidates"][0]["file"] == "schedule-00.safetensors"
