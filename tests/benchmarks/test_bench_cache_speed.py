"""The study of speeds at public shapes: what it times does what its labels say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel.measure import counted_flops, pipeline_samples
from accel.method import attached
from accel.tiny import tiny
from benchmarks import bench_cache_speed
from benchmarks.bench_cache_speed import LEARNED_SHARE, STEPS, caches

# of the schedule that computes everything
pytestmark = pytest.mark.filterwarnings("ignore::accel.method.NoEffectWarning")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    host = tiny("dit")
    host.pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [1], "guidance_scale": 4.0, "num_inference_steps": STEPS}
    plain = counted_flops(lambda: pipeline_samples(host.pipe, call, 0))
    found = {}
    for label, method in caches(host.pipe, tmp_path_factory.mktemp("schedules")):
        with attached(method, host.pipe) as live:
            flops = counted_flops(lambda: pipeline_samples(host.pipe, call, 0))
        found[label] = (flops / plain, live.report()["runs"][0])
    return found


def test_a_schedule_that_computes_all_saves_nothing(rows):
    share, report = rows["every module computed through a schedule"]
    assert share == 1
    assert report["reused"] == 0


def test_the_learned_share_is_reused(rows):
    _, report = rows["37.5 % of the modules reused"]
    reused = report["reused"] / (report["reused"] + report["computed"])
    assert reused == pytest.approx(LEARNED_SHARE * (STEPS - 1) / STEPS, abs=0.04)


def test_every_cache_saves_work(rows):
    for label, (share, _) in rows.items():
        if not label.startswith("every module"):
            assert share < 0.95, label


def test_rows_keep_the_environment_that_they_were_measured_in():
    models = {"m": {"rows": {"old": {"speedup": 1}}}}
    bench_cache_speed.own(models, {"commit": "a"})
    models["m"]["rows"]["new"] = {"speedup": 2}
    bench_cache_speed.own(models, {"commit": "b"})
    rows = models["m"]["rows"]
    assert {name: row["environment"]["commit"] for name, row in rows.items()} == {
        "old": "a",
        "new": "b",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "compiled"), [("DiT-XL/2", True), ("Wan 2.1 1.3B", False)])
def test_the_models_run(name, compiled):
    rows, kept = {}, []
    size = replace(bench_cache_speed.SIZES["cpu"][name], blocks=2)
    pipe, call = bench_cache_speed.MODELS[name](size, "cpu")
    timing = bench_cache_speed.Timing(name, rows, 1, lambda: kept.append(len(rows)))
    limit = bench_cache_speed.RECOMPILE_LIMIT
    with torch._dynamo.config.patch(recompile_limit=limit):
        timing.measure(pipe, call, compiled)
    assert kept == list(range(1, len(rows) + 1))
    assert len(rows) == (7 + 5 if compiled else 8)
    for label, row in rows.items():
        _, _, uncompiled = label.partition(f"{bench_cache_speed.COMPILED}, ")
        assert row["flops"] == rows[uncompiled or label]["flops"]
