"""`accel calibrate bits`: a plan within a budget, which `calibrate tfmq --plan` follows."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import accel
from accel.artifact import Artifact
from accel.testing import tiny
from apps.cli import app
from quant.mixed_precision import read_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, jobs for it, and what was measured of it."""
    path = tmp_path_factory.mktemp("bits")
    tiny("dit").pipe.save_pretrained(path / "model")
    job = {"name": "a", "seed": 0, "inputs": {"class_labels": [3], "num_inference_steps": 2}}
    (path / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    return path


def calibrate(folder, what, *more):
    model = ("--model", str(folder / "model"), "--jobs", str(folder / "jobs.jsonl"))
    return CliRunner().invoke(app, ["calibrate", what, *model, "--count", "1", *map(str, more)])


def test_a_plan_within_a_size_is_followed(folder):
    plan = folder / "bits.yaml"
    done = calibrate(folder, "bits", "--out", plan, "--calls", "1", "--size", "0.3")
    assert done.exit_code == 0, done.output
    assert "relative error" in done.output
    again = calibrate(folder, "bits", "--out", plan, "--calls", "1", "--size", "0.2")
    assert again.exit_code == 0, again.output
    bits = read_plan(plan)
    assert {4, 8} & set(bits.values())
    recipe = folder / "q.yaml"
    done = calibrate(folder, "tfmq", "--out", recipe, "--plan", plan, "--rounding", "nearest")
    assert done.exit_code == 0, done.output
    artifact = Artifact.load(accel.read_recipe(recipe).recipe.methods[0].artifact)
    got = {path: how["bits"] for path, how in artifact.settings["layers"].items()}
    assert got == {path: b for path, b in bits.items() if b < 16}


def test_a_plan_within_a_quality_is_measured(folder):
    plan = folder / "bits.yaml"
    done = calibrate(folder, "bits", "--out", plan, "--calls", "1", "--psnr", "40")
    assert done.exit_code == 0, done.output
    tried = [float(line.split()[-2]) for line in done.output.splitlines() if "few bits" in line]
    assert len(tried) > 2
    told = next(line for line in done.output.splitlines() if "rounded to the nearest" in line)
    assert float(told.split()[0]) == min(x for x in tried if x >= 40)


def test_wrong_budgets_are_told(folder):
    for budgets in ((), ("--size", "0.3", "--time", "0.5")):
        done = calibrate(folder, "bits", "--out", folder / "x.yaml", *budgets)
        assert done.exit_code == 2
        assert "one budget" in done.output
    done = calibrate(
        folder, "bits", "--out", folder / "bits.yaml", "--calls", "1", "--size", "0.01"
    )
    assert done.exit_code == 2
    assert "the least is" in done.output
    assert not (folder / "x.yaml").exists()
