"""`accel calibrate depth`: a recipe that leaves blocks out, of a quality or a speed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import accel
from accel.artifact import Artifact
from accel.method import attached
from accel.testing import tiny
from apps.cli import app
from caches.early_exit import EarlyExit
from caches.schedule import of_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a job for it."""
    path = tmp_path_factory.mktemp("depth")
    tiny("dit").pipe.save_pretrained(path / "model")
    job = {"name": "a", "seed": 0, "inputs": {"class_labels": [3], "num_inference_steps": 3}}
    (path / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    return path


def calibrate(folder, *more):
    model = ("--model", str(folder / "model"), "--jobs", str(folder / "jobs.jsonl"))
    command = ["calibrate", "depth", *model, "--out", str(folder / "depth.yaml"), *more]
    return CliRunner().invoke(app, command)


@pytest.mark.parametrize("rest", ["skip", "residual", "heads"])
def test_writes_a_recipe_of_a_quality(folder, rest):
    done = calibrate(folder, "--quality", "15", "--rest", rest, "--updates", "2")
    assert done.exit_code == 0, done.output
    (method,) = accel.read_recipe(folder / "depth.yaml").recipe.methods
    assert isinstance(method, EarlyExit)
    artifact = Artifact.load(method.artifact)
    assert artifact.settings["rest"] == rest
    assert f"{of_artifact(artifact).share():.0%} of the blocks run" in done.output
    host = tiny("dit")
    with attached(method, host.pipe, strict=True):
        host.run(num_inference_steps=3)


def test_what_cannot_be_had_is_said(folder):
    done = calibrate(folder, "--speed", "100", "--rest", "skip")
    assert done.exit_code == 2
    assert "no exits give 100.0x" in done.output
