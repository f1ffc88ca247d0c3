"""`accel measure`: the figures before and after, and into the recipe."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from accel.method import Recipe
from accel.metrics.protocol import Protocol
from accel.recipe_file import read_recipe, write_recipe
from accel.testing import tiny
from apps.cli import app
from caches.native import FirstBlockCache, TaylorSeer


@pytest.fixture
def folder(tmp_path):
    tiny("dit").pipe.save_pretrained(tmp_path / "model")
    recipe = Recipe((FirstBlockCache(10.0),))
    write_recipe(tmp_path / "fbc.yaml", recipe, name="fbc", description="d")
    jobs = [
        {"name": f"j{i}", "seed": i, "inputs": {"class_labels": [i], "num_inference_steps": 6}}
        for i in range(2)
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs))
    return tmp_path


def _measure(folder, *more: str):
    command = ["measure", str(folder / "fbc.yaml"), "--model", str(folder / "model")]
    command += ["--jobs", str(folder / "jobs.jsonl"), "--rounds", "2", *more]
    return CliRunner().invoke(app, command)


def test_says_what_it_measured_and_leaves_the_recipe(folder):
    before = (folder / "fbc.yaml").read_bytes()
    result = _measure(folder, "--no-write")
    assert result.exit_code == 0, result.output
    assert "2 samples, 2 rounds" in result.output
    assert _cells(result.output, "network evaluations") == ["24", "24", "1.00", "of", "it"]
    without, with_recipe, *_ = _cells(result.output, "operations (G)")
    assert float(with_recipe) <= float(without)
    assert "PSNR" in result.output
    assert "judged" not in result.output, "no referee knows this model"
    assert "caches.native:FirstBlockCache: effect some" in result.output
    assert (folder / "fbc.yaml").read_bytes() == before


@pytest.mark.filterwarnings("ignore::accel.method.NoEffectWarning")
def test_a_recipe_without_effect_is_not_stored(folder):
    """As fast as the model, that is no figure of the method."""
    write_recipe(folder / "fbc.yaml", Recipe((TaylorSeer(warmup=6),)), name="fbc")
    before = (folder / "fbc.yaml").read_bytes()
    result = _measure(folder)
    assert result.exit_code == 1
    assert "TaylorSeer changed nothing in these calls" in result.output
    assert "stored in" not in result.output
    assert (folder / "fbc.yaml").read_bytes() == before


def test_one_round_is_refused_as_it_has_no_interval(folder):
    assert _measure(folder, "--rounds", "1").exit_code == 2


def _cells(output: str, what: str) -> list[str]:
    (line,) = (x for x in output.splitlines() if x.strip().startswith(what))
    return line.replace(what, "").split()


def test_writes_the_measured_block_and_nothing_else(folder):
    text = (folder / "fbc.yaml").read_text().replace("measured: null", "# mine\nmeasured: null")
    (folder / "fbc.yaml").write_text(text)
    result = _measure(folder)
    assert result.exit_code == 0, result.output
    written = (folder / "fbc.yaml").read_text()
    assert written.startswith(text.split("measured:")[0])
    read = read_recipe(folder / "fbc.yaml")
    assert read.recipe == Recipe((FirstBlockCache(10.0),))
    assert (read.name, read.description) == ("fbc", "d")
    assert read.measured is not None
    assert read.measured["samples"] == 2
    assert read.measured["flops"][1] < read.measured["flops"][0]
    assert read.measured["model"] == str(folder / "model")
    assert read.measured["environment"]["threads"] == 1
    protocol = Protocol.read(read.measured["protocol"])
    assert protocol.model["revision"].startswith("sha256:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--jobs", "jobs.jsonl"], "jobs.jsonl:2"),
        (["--jobs", "none.jsonl"], "none.jsonl"),
        (["--model", "zoo:nothing"], "no embedded model 'nothing'"),
        (["--model", "not/there"], "not/there"),
    ],
)
def test_errors_are_one_line_and_leave_the_recipe(folder, change, message):
    (folder / "jobs.jsonl").write_text("{}\nnot json\n")
    before = (folder / "fbc.yaml").read_bytes()
    option = [change[0], str(folder / change[1]) if change[0] == "--jobs" else change[1]]
    command = ["measure", str(folder / "fbc.yaml"), *option]
    if change[0] == "--jobs":
        command += ["--model", str(folder / "model")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert (folder / "fbc.yaml").read_bytes() == before


def test_a_model_without_inputs_of_its_own_wants_jobs(folder):
    command = ["measure", str(folder / "fbc.yaml"), "--model", str(folder / "model")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--jobs" in result.output
