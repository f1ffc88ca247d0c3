"""An evaluation from request to page: figures, refusals, and kill -9 at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import accel
from accel.recipe_file import write_recipe
from apps.evaluate import REPORT, Request, Unfinished, compare, plan, report, run
from apps.evaluation.request import look_tasks
from apps.render.faults import StorageFault
from apps.render.ledger import Ledger, integrity_problem
from caches.interval import IntervalCache

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow
PROMPT = '<script>alert("x")</script>'


class _Means(torch.nn.Module):
    """A feature extractor: the mean of each channel."""

    def forward(self, x):
        return x.float().mean([2, 3])


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    made = []
    for name, interval in (("careful", 2), ("bold", 4)):
        recipe = accel.Recipe((IntervalCache(interval, warmup=1),))
        write_recipe(folder / f"{name}.yaml", recipe, name=f"{name} {PROMPT}")
        made.append(str(folder / f"{name}.yaml"))
    return made


@pytest.fixture
def request_of(tiny_model, job_file, recipes):
    """A request for the tiny model: `request_of(jobs=4, rounds=0, ...)`."""

    def make(jobs=4, which=recipes, **more):
        rows = [
            {"seed": 10 * i, "inputs": {"class_labels": [i, i + 1], "num_inference_steps": 6}}
            for i in range(jobs)
        ]
        path = job_file(rows, f"jobs{jobs}.jsonl")
        return Request(tiny_model, tuple(which), jobs=str(path), **{"rounds": 0, **more})

    return make


def test_an_evaluation_gives_a_report_and_a_page(tmp_path, request_of):
    events = []
    found = run(request_of(rounds=2), tmp_path, progress=events.append)
    assert found["samples"] == 8
    assert found["calls"] == 4
    careful, bold = found["recipes"]
    assert (
        careful["figures"]["psnr"]["value"]["estimate"]
        > (bold["figures"]["psnr"]["value"]["estimate"])
    )
    assert bold["flops"][1] < bold["flops"][0]
    assert careful["speedup"]["low"] <= careful["speedup"]["high"]
    assert len(careful["per_sample"]["psnr"]) == 8
    assert found == report(tmp_path)
    assert events[-1]["phase"] == "report"
    assert {e["phase"] for e in events} == {"render", "time", "look", "report"}
    assert events[-1]["done"] == events[-1]["total"] == 12 + 2 + 3
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert page.count("data:image/png") > 20
    assert found["protocol"]["sha256"][:12] in page


def test_the_worst_sample_is_the_worst(tmp_path, request_of):
    found = run(request_of(), tmp_path)
    row = found["recipes"][1]
    assert row["worst"][0]["psnr"] == pytest.approx(min(row["per_sample"]["psnr"]), rel=1e-3)
    assert row["worst"][0]["psnr"] <= row["worst"][1]["psnr"]


def test_finished_work_is_kept_when_a_recipe_is_added(tmp_path, request_of, recipes):
    run(request_of(which=recipes[:1]), tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "renders").glob("*.json")}
    found = run(request_of(), tmp_path)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "renders").glob("*.json")}
    assert len(found["recipes"]) == 2
    assert {k: after[k] for k in before} == before
    assert sum(name.startswith("bold-") for name in after) == 4


def test_another_baseline_is_compared_with(tmp_path, request_of, recipes):
    found = run(request_of(which=recipes[1:], against=recipes[0]), tmp_path)
    assert found["baseline"]["label"].startswith("careful")
    plain = run(request_of(which=recipes[1:]), tmp_path / "plain")
    with pytest.raises(ValueError, match="baseline"):
        compare(found, plain)


def test_reports_of_one_protocol_compare_and_others_are_refused(tmp_path, request_of, recipes):
    a = run(request_of(which=recipes[:1]), tmp_path / "a")
    b = run(request_of(which=recipes[1:]), tmp_path / "b")
    row = next(r for r in compare(a, b) if r["measure"] == "psnr")
    assert row["difference"]["estimate"] < 0
    assert row["difference"]["low"] <= row["difference"]["high"]
    other = run(request_of(jobs=3, which=recipes[1:]), tmp_path / "c")
    with pytest.raises(ValueError, match=r"inputs.*samples"):
        compare(a, other)
    path = tmp_path / "a" / "report.json"
    path.write_text(path.read_text().replace('"samples": 8', '"samples": 9'))
    with pytest.raises(ValueError, match="edited"):
        report(tmp_path / "a")


def test_a_recipe_that_does_not_fit_is_told_in_one_line(tmp_path, request_of):
    recipe = accel.Recipe((IntervalCache(2, parts="deep"),))  # for UNets
    write_recipe(tmp_path / "deep.yaml", recipe)
    with pytest.raises(ValueError, match="no call could be rendered") as error:
        run(request_of(which=[str(tmp_path / "deep.yaml")]), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_call_that_fails_is_left_out_of_every_side(tmp_path, tiny_model, job_file, recipes):
    rows = [
        {"seed": i, "inputs": {"class_labels": [label], "num_inference_steps": 4}}
        for i, label in enumerate((1, 2, 10**6, 3))
    ]
    found = run(Request(tiny_model, tuple(recipes), jobs=str(job_file(rows)), rounds=0), tmp_path)
    assert found["samples"] == 3
    assert len(found["lost"]) == 1
    assert any("left out" in line for line in found["warnings"])
    assert all(len(r["per_sample"]["psnr"]) == 3 for r in found["recipes"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kinds": ("fame",)}, "fame"),
        ({"kinds": ("clip",)}, "CLIP model"),
        ({"kinds": ("judge",)}, "no judge"),
        ({"kinds": ("fid",)}, "--features"),
        ({"kinds": ("fid",), "features": "zoo:digits-judge-b"}, "--real"),
        ({"kinds": ("fid",), "features": "torchscript:/gone.pt", "real": "/etc"}, "no such file"),
        ({"kinds": ("fid",), "features": "zoo:judge-of-all", "real": "/etc"}, "judge-of-all"),
        ({"kinds": ("fid",), "features": "zoo:digits-judge-b", "real": "/gone"}, "no pictures"),
        ({"kinds": ("fid",), "features": "zoo:digits-judge-b", "real": "/etc"}, "no pictures"),
        ({"rounds": 1}, "rounds"),
        ({"samples": 10**9}, "at most 1,000,000"),
        ({"samples": 10}, "job file"),
        ({"kinds": ("fidelity", "fid")}, "give --features, .*or use `accel evaluate fidelity`"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_rendered(request_of, change, why):
    with pytest.raises(ValueError, match=why):
        plan(request_of(**change))


def test_too_few_samples_for_a_distance_are_refused_before_anything_is_rendered():
    taylor = str(Path("recipes/taylor.yaml").resolve())
    few = Request("zoo:digits-dit", (taylor,), kinds=("fid",), samples=5)
    with pytest.raises(ValueError, match="evaluate fid: samples = 5; at least 6"):
        plan(few)
    assert plan(replace(few, samples=6)).samples == 6


def test_other_real_pictures_and_other_weights_at_their_place_are_looked_at_again(
    tmp_path, request_of
):
    from PIL import Image

    weights, real = tmp_path / "means.pt", tmp_path / "real"
    real.mkdir()

    def look():
        return [task.id for task in look_tasks(plan(asked), set())]

    Image.new("RGB", (8, 8)).save(real / "a.png")
    torch.jit.script(torch.nn.Linear(3, 3)).save(str(weights))
    asked = request_of(kinds=("fid",), features=f"torchscript:{weights}", real=str(real))
    first = look()
    assert look() == first
    Image.new("RGB", (8, 8), "white").save(real / "a.png")
    second = look()
    assert second[:-1] == first[:-1]
    assert second[-1] != first[-1]
    torch.jit.script(torch.nn.Linear(3, 3)).save(str(weights))
    assert not set(look()) & set(second)


def test_a_report_that_cannot_be_written_is_told_in_one_line(tmp_path, request_of):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file; a report wants a folder"):
            run(request_of(jobs=2), out)


def test_a_full_disk_is_told_with_what_to_do_and_nothing_is_lost(tmp_path, request_of, monkeypatch):
    from accel import files

    whole = files.write_atomically

    def full(target, data, *rest, **more):
        if Path(target).name == REPORT:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return whole(target, data, *rest, **more)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(StorageFault) as error:
        run(request_of(jobs=2), tmp_path)
    assert error.value.started
    assert str(error.value) == (
        f"report folder {tmp_path}: the disk is full; nothing that was done is lost, "
        "the same command continues"
    )
    monkeypatch.undo()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "renders").glob("*.json")}
    assert run(request_of(jobs=2), tmp_path)["samples"] == 4
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "renders").glob("*.json")} == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: "{",
        lambda r: "[]",
        lambda r: "3",
        lambda r: json.dumps({"protocol": r["protocol"]}),
    ],
    ids=["cut", "list", "number", "half"],
)
def test_a_spoiled_report_is_told_in_one_line(tmp_path, spoil):
    """A shipped one, so that nothing is rendered."""
    whole = json.loads((ROOT / "benchmarks" / "results" / "report_digits-sd.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert report(tmp_path)["model"]["name"] == "zoo:digits-sd"
    (tmp_path / "report.json").write_text(spoil(whole))
    with pytest.raises(ValueError, match="no report, or an edited one"):
        report(tmp_path)


def test_the_same_recipe_twice_is_refused(request_of, recipes):
    with pytest.raises(ValueError, match="same recipe"):
        plan(request_of(which=[recipes[0], recipes[0]]))


def test_distances_to_a_folder_of_pictures(tmp_path, request_of):
    """The renders of one evaluation as the real pictures of the next: no distance at all."""
    run(request_of(), tmp_path / "a")
    real = tmp_path / "real"
    real.mkdir()
    for path in (tmp_path / "a" / "renders").glob("baseline-*.png"):
        (real / path.name).write_bytes(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(_Means()).save(str(tmp_path / "means.pt"))
    features = f"torchscript:{tmp_path / 'means.pt'}"
    more = {"kinds": ("fid",), "features": features, "real": str(real)}
    found = run(request_of(**more), tmp_path / "b")
    figures = found["recipes"][0]["figures"]
    assert figures["frechet"]["baseline"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert figures["frechet"]["value"]["estimate"] > 0
    assert figures["coverage"]["baseline"]["estimate"] == 1
    assert found["protocol"]["features"]["sha256"]


def test_stop_ends_between_steps_and_the_same_call_continues(tmp_path, request_of):
    asked = []

    def stop():
        asked.append(1)
        return True

    with pytest.raises(Unfinished) as error:
        run(request_of(), tmp_path, stop=stop)
    assert error.value.interrupted
    assert asked
    assert not (tmp_path / "report.json").exists()
    assert run(request_of(), tmp_path)["samples"] == 8


@pytest.mark.parametrize(
    "moments",
    [[("look", 19)], pytest.param([("render", 7), ("render", 11), ("look", 20)], marks=[slow])],
)
def test_killed_it_continues_and_does_nothing_twice(tmp_path, request_of, moments):
    request = request_of(jobs=6)
    expected = run(request, tmp_path / "undisturbed")
    out, folder = tmp_path / "out", tmp_path / "out" / "renders"
    options = ["--jobs", request.jobs, "--rounds", "0", "--progress", "json", "--out", str(out)]
    for recipe in request.recipes:
        options += ["--recipe", recipe]
    command = [sys.executable, "-m", "apps.cli", "evaluate", "fidelity", "--model", request.model]
    done: dict[str, int] = {}
    for phase, count in moments:
        _kill_when([*command, *options], phase, count)
        assert integrity_problem(folder / "ledger.sqlite") is None
        now = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
        assert {k: now[k] for k in done} == done
        done = now
    last = subprocess.run([*command, *options], cwd=ROOT, env=_environment(), capture_output=True)
    assert last.returncode == 0, last.stderr[-500:]
    now = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    assert {k: now[k] for k in done} == done
    found = report(out)
    for one, two in zip(found["recipes"], expected["recipes"], strict=True):
        assert one["figures"] == two["figures"]
        assert one["per_sample"] == two["per_sample"]
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        kinds = [task.kind for task in ledger.tasks("done")]
    assert kinds.count("render") == 18
    assert kinds.count("evaluate") == 3
    assert not list(folder.rglob("*.part"))


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _kill_when(command, phase, done):
    """Kill -9 once so many tasks are done and the phase is there."""
    with subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["phase"] == phase and event["done"] >= done:
                os.kill(process.pid, signal.SIGKILL)
                return
    raise AssertionError(f"it ended before {done} tasks were done")
