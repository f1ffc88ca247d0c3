"""Searches as jobs and commands: data only, resumable, and made again bit for bit."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from apps.cli import app
from apps.render.driver import RunOptions, submit
from apps.render.jobs import JobFileError, check_jobs
from apps.render.media import decode_png
from apps.render.outputs import read_sidecar
from apps.render.plan import Settings, plan
from apps.render.progress import Silent
from apps.render.rerender import again, read_record
from apps.search import ALGORITHMS, SearchRequest, check_request, search_of

INPUTS = {"prompt": "a red three on a dark background", "num_inference_steps": 6,
          "guidance_scale": 1.0}  # fmt: skip
STUDENT = "recipes/digits-sd-4-steps.yaml"


def rendered(folder, job, **settings):
    from pathlib import Path

    placed = check_jobs([("here", {"name": "x", "inputs": INPUTS, **job})])
    tasks = plan(placed, Settings(model="zoo:digits-sd", **settings), Path())
    summary = submit(folder, tasks, RunOptions(), Silent())
    return summary, read_sidecar(folder / "x.json")


def searched(**more):
    return {"search": {"verifier": "brightness", "budget": "4 renders", **more}}


def test_every_algorithm_is_explained():
    for name in ALGORITHMS:
        found = CliRunner().invoke(app, ["search", "--explain", name])
        assert found.exit_code == 0, found.output
        fields = [f.name for f in dataclasses.fields(search_of(request(algorithm=name)))]
        assert all(f"--set settings.{field}=" in found.output for field in fields)
        assert name in SEARCH_HELP
    found = CliRunner().invoke(app, ["search", "--explain", "magic"])
    assert found.exit_code == 2
    assert "no algorithm 'magic'; known: random" in found.output


def request(**more):
    return SearchRequest.model_validate({"verifier": "brightness", **more})


SEARCH_HELP = CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "200"}).output


GRADIENT = {"algorithm": "gradient", "settings": {"starts": 1, "iterations": 1}}


@pytest.mark.parametrize(
    ("job", "recipe", "file"),
    [
        (searched(), None, "x.png"),
        (searched(algorithm="zero-order", settings={"neighbours": 3}), None, "x.json"),
        (searched(algorithm="draft-commit", settings={"candidates": 4}), STUDENT, "x.png"),
        (searched(algorithm="particles", settings={"particles": 2, "rounds": 1}), None, "x.json"),
        (searched(budget="6 renders", verifier="judge", **GRADIENT), STUDENT, "x.png"),
    ],
    ids=["random", "zero-order", "draft-commit", "particles", "gradient"],
)
def test_a_winner_is_made_again_without_searching(tmp_path, job, recipe, file):
    summary, content = rendered(tmp_path, {**job, "seed": 3}, recipe=recipe)
    assert not summary.failures
    found = content["search"]
    assert found["ledger"]["spent"]["evaluations"] <= int(job["search"]["budget"][0]) * 6
    if recipe is not None:
        assert content["report"]["runs"][-1]["steps"] == 6  # committed without the student
    records = [read_record(tmp_path / name) for name in ("x.png", "x.json")]
    assert records[0]["payload"] == records[1]["payload"]
    assert records[0]["search"]["path"] == records[1]["search"]["path"] == found["path"]
    verdict = again(tmp_path / file, None, Silent(), False)  # the picture alone, or its sidecar
    assert verdict.same, verdict.lines()
    for name in ("x.candidates.png", "x.curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
    record = json.loads((tmp_path / "x.search.json").read_text())
    assert len(record["winners"][0]["candidates"]) >= found["candidates"]
    assert not list((tmp_path / ".work").iterdir())


def test_a_search_beats_its_own_seed(tmp_path):
    _, plain = rendered(tmp_path / "plain", {"seed": 3})
    _, best = rendered(tmp_path / "best", {"seed": 3, **searched(budget="12 renders")})
    levels = [decode_png(tmp_path / n / "x.png").mean() for n in ("plain", "best")]
    assert levels[1] >= levels[0]
    assert plain["files"][0]["frames_sha256"] != best["files"][0]["frames_sha256"]


def test_noise_from_a_record_renders_the_winner(tmp_path):
    _, content = rendered(tmp_path / "a", {"seed": 3, **searched(algorithm="zero-order")})
    _, again_ = rendered(tmp_path / "b", {"noise": content["search"]["path"]})
    assert again_["files"][0]["frames_sha256"] == content["files"][0]["frames_sha256"]


def test_noise_is_not_the_seed_zero(tmp_path):
    _, zero = rendered(tmp_path / "a", {})
    _, five = rendered(tmp_path / "b", {"noise": [{"draw": {"key": 5}}]})
    _, seed = rendered(tmp_path / "c", {"seed": 5})
    digests = [c["files"][0]["frames_sha256"] for c in (zero, five, seed)]
    assert digests[1] == digests[2] != digests[0]


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"search": {"budget": "4"}}, "verifier"),
        (searched(algorithm="magic"), "no algorithm 'magic'"),
        (searched(budget="much"), "budget"),
        ({"noise": [{"draw": {"key": -1}}]}, "path|move"),
        ({"noise": [{"draw": {"key": 1}}], "seed": 4}, "no seed"),
        ({**searched(), "noise": [{"draw": {"key": 1}}]}, "no search"),
    ],
)
def test_wrong_requests_are_refused_in_the_job_file(job, reason):
    with pytest.raises(JobFileError, match=reason):
        check_jobs([("here", {"inputs": INPUTS, **job})])


@pytest.mark.parametrize(
    "wrong",
    [{"verifier": "beauty"}, {"verifier": "worker:rm -rf x"}, {"settings": {"candidates": 0}},
     {"settings": {"pool": 3}}, {"held_out": ["http://localhost"]}],
)  # fmt: skip
def test_wrong_requests_are_refused_before_anything_starts(wrong):
    request = SearchRequest.model_validate({"verifier": "brightness", **wrong})
    with pytest.raises(ValueError, match=r"verifier|candidates|pool"):
        check_request(request, trusted=False)


def test_calls_of_several_samples_fail_as_jobs(tmp_path):
    summary, _ = rendered(tmp_path, {**searched(), "inputs": {**INPUTS, "prompt": ["a", "b"]}})
    assert "one sample" in summary.failures[0].error


def test_the_command(tmp_path):
    said = (
        f"--verifier judge --budget 4&renders --baseline --out {tmp_path} --algorithm zero-order "
        "--set inputs.num_inference_steps=4 --set name=three --set settings.neighbours=3"
    )
    words = [w.replace("&", " ") for w in said.split()]
    arguments = ["search", "--model", "zoo:digits-sd", "--prompt", INPUTS["prompt"], *words]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "digits-judge (searched)" in first.output
    assert "digits-judge-b (held out)" in first.output
    assert "best at random at equal cost" in first.output
    assert (tmp_path / "three.png").is_file()
    again_ = CliRunner().invoke(app, arguments)
    assert again_.output.splitlines()[-5:] == first.output.splitlines()[-5:]  # nothing is redone


def test_the_command_trusts_what_it_names_and_nothing_else_of_the_folder(tmp_path, monkeypatch):
    heard = []

    def submit(folder, tasks, options, progress):
        heard.append((frozenset(task.id for task in tasks), options.trusted))
        raise ValueError("enough")

    monkeypatch.setattr("apps.render.driver.submit", submit)
    arguments = ["search", "--model", "zoo:digits-sd", "--verifier", "worker:true", "--prompt", "x",
                 "--out", str(tmp_path)]  # fmt: skip
    assert "enough" in CliRunner().invoke(app, arguments).output
    ((own, trusted),) = heard
    assert own == trusted


def test_the_command_refuses_what_is_wrong(tmp_path):
    arguments = ["search", "--model", "zoo:digits-sd", "--verifier", "beauty", "--prompt", "x",
                 "--out", str(tmp_path)]  # fmt: skip
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert "no verifier 'beauty'" in found.output
