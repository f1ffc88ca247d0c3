"""`accel calibrate tfmq`: what it writes can be attached, goes on where it stopped, and loads."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import accel
from apps.cli import app

MODEL = "zoo:digits-dit"


@pytest.fixture
def jobs(tmp_path):
    job = {"inputs": {"class_labels": [3], "num_inference_steps": 2, "guidance_scale": 1.0}}
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        "".join(json.dumps({**job, "name": f"j{i}", "seed": i}) + "\n" for i in range(2))
    )
    return file


def test_a_recipe_and_a_model(jobs, tmp_path):
    call = ["calibrate", "tfmq", "--model", MODEL, "--out", str(tmp_path / "q.yaml")]
    call += ["--jobs", str(jobs), "--rounding", "nearest", "--count", "1", "--every-layer"]
    done = CliRunner().invoke(app, [*call, "--save-model", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "transformer 1/" in done.output
    recipe = accel.read_recipe(tmp_path / "q.yaml").recipe
    names = [m.name() for m in recipe.methods]
    assert names == ["quant.tfmq:TFMQ", "quant.temporal_cache:TemporalCache"]
    pipe = accel.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    with accel.attached(recipe, pipe) as live:
        seen = torch.Generator().manual_seed(0)  # noise of which the ranges are known
        pipe(class_labels=[3], num_inference_steps=2, guidance_scale=1.0, generator=seen)
        assert {m["effect"] for m in live.report()["members"]} == {"some"}
    written = json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "tfmq"
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 0, again.output


def test_wrong_bits_are_told(tmp_path):
    call = ["calibrate", "tfmq", "--model", MODEL, "--out", str(tmp_path / "q.yaml"), "--bits", "5"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2
    assert "4 or 8" in done.output


def test_eight_bits_are_for_speed_unless_told_otherwise(jobs, tmp_path, monkeypatch):
    from quant._quantise import OneDenoiser

    monkeypatch.setattr(OneDenoiser, "seconds", lambda *_: (2.0, 1.0))
    call = ["calibrate", "tfmq", "--model", MODEL, "--out", str(tmp_path / "q.yaml")]
    call += ["--jobs", str(jobs), "--rounding", "nearest", "--count", "1"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2
    assert "ask for every layer" in done.output
    assert not (tmp_path / "q.yaml").exists()


@pytest.mark.parametrize(("given", "steps"), [([], 300), (["--iterations", "2000"], 2000)])
def test_iterations_are_those_of_adaround(given, steps, jobs, tmp_path, monkeypatch):
    from quant.calibrate import TFMQCalibration

    def seen(self, *args, **kwargs):
        raise ValueError(f"{self.rounding}, {self.steps} steps")

    monkeypatch.setattr(TFMQCalibration, "fit", seen)
    call = ["calibrate", "tfmq", "--model", MODEL, "--out", str(tmp_path / "q.yaml")]
    call += ["--jobs", str(jobs), "--rounding", "adaround", "--count", "1", *given]
    done = CliRunner().invoke(app, call)
    assert f"adaround, {steps} steps" in done.output
