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
    assert len(list((tmp_path / "artifacts").iterdir())) == 1
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
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"artifacts", "model", "q.parts", "q.yaml", jobs.name}


def _calibrated(folder, jobs, *more):
    call = ["calibrate", "tfmq", "--model", MODEL, "--out", str(folder / "q.yaml")]
    call += ["--jobs", str(jobs), "--rounding", "nearest", "--count", "1", "--every-layer", *more]
    return CliRunner().invoke(app, call)


@pytest.fixture
def fitted(jobs, monkeypatch):
    """Calibrations are one that was made before; the list has the recipes they were for."""
    from accel.artifact import Artifact, Fingerprint
    from quant.calibrate import TFMQCalibration

    recipes = []

    def fit(self, pipe, inputs, out, recipe, say=print):
        recipes.append(recipe)
        return Artifact("quant.tfmq:TFMQ", Fingerprint.of(pipe.transformer), {})

    monkeypatch.setattr(TFMQCalibration, "fit", fit)
    return recipes


def _names(folder):
    return [m.name().partition(":")[2] for m in accel.read_recipe(folder / "q.yaml").recipe.methods]


def test_a_recipe_that_is_written_over_keeps_its_artifact(fitted, jobs, tmp_path):
    """Its file has the name that the new recipe's would have, but for the ending."""
    from accel.artifact import Artifact, Fingerprint
    from accel.recipe_file import write_recipe
    from caches.native import MagCache

    pipe = accel.load(MODEL)
    ratios = Artifact("caches.native:MagCache", Fingerprint.of(pipe.transformer), {})
    ref = ratios.save(tmp_path / "q.safetensors")
    write_recipe(tmp_path / "q.yaml", accel.Recipe((MagCache(artifact=ref),)))
    text = (tmp_path / "q.yaml").read_text()
    own = text.replace(f"artifacts/{ref.sha256[:16]}.safetensors", "q.safetensors")
    assert own != text
    (tmp_path / "q.yaml").write_text(own)
    done = _calibrated(tmp_path, jobs, "--recipe", str(tmp_path / "q.yaml"))
    assert done.exit_code == 0, done.output
    assert _names(tmp_path) == ["TFMQ", "TemporalCache", "MagCache"]
    assert Artifact.load(ref).method == ratios.method
    assert {p.name for p in tmp_path.iterdir()} == {
        "artifacts", "q.safetensors", "q.yaml", jobs.name
    }  # fmt: skip


def test_a_recipe_with_a_temporal_cache_keeps_its_own(fitted, jobs, tmp_path):
    from accel.recipe_file import write_recipe
    from quant.temporal_cache import TemporalCache

    given = TemporalCache(weights="keep")
    write_recipe(tmp_path / "t.yaml", accel.Recipe((given,)))
    done = _calibrated(tmp_path, jobs, "--recipe", str(tmp_path / "t.yaml"))
    assert done.exit_code == 0, done.output
    assert _names(tmp_path) == ["TFMQ", "TemporalCache"]
    assert accel.read_recipe(tmp_path / "q.yaml").recipe.methods[1] == given


def test_methods_that_do_not_go_together_are_told_before(fitted, jobs, tmp_path):
    from accel.recipe_file import write_recipe
    from caches.native import FirstBlockCache, TaylorSeer

    both = accel.Recipe((TaylorSeer(modules="lite"), FirstBlockCache()))
    write_recipe(tmp_path / "t.yaml", both)
    done = _calibrated(tmp_path, jobs, "--recipe", str(tmp_path / "t.yaml"))
    assert done.exit_code == 2
    assert "claim" in done.output
    assert fitted == []


@pytest.mark.parametrize("what", ["tfmq", "bits"])
def test_the_device_is_asked_for(what, jobs, tmp_path, monkeypatch):
    def load(model, device, dtype):
        raise ValueError(f"on {device} in {dtype}")

    monkeypatch.setattr(accel, "load", load)
    call = ["calibrate", what, "--model", MODEL, "--out", str(tmp_path / "q.yaml")]
    budget = ["--size", "0.5"] if what == "bits" else []
    done = CliRunner().invoke(app, [*call, "--jobs", str(jobs), "--device", "cuda:7", *budget])
    assert "on cuda:7 in torch.float32" in done.output


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
