"""`accel measure`: the figures before and after, and into the recipe."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from accel.method import Recipe
from accel.recipe_file import read_recipe, write_recipe
from accel.testing import tiny
from apps.cli import app
from caches.native import FirstBlockCache


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
    command += ["--jobs", str(folder / "jobs.jsonl"), "--rounds", "1", *more]
    return CliRunner().invoke(app, command)


def test_says_what_it_measured_and_leaves_the_recipe(folder):
    before = (folder / "fbc.yaml").read_bytes()
    result = _measure(folder)
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output
    assert "24 of 24 evaluations" in result.output
    assert "caches.native:FirstBlockCache: effect some" in result.output
    assert (folder / "fbc.yaml").read_bytes() == before


def test_writes_the_measured_block(folder):
    assert _measure(folder, "--write").exit_code == 0
    read = read_recipe(folder / "fbc.yaml")
    assert read.recipe == Recipe((FirstBlockCache(10.0),))
    assert (read.name, read.description) == ("fbc", "d")
    assert read.measured is not None
    assert read.measured["samples"] == 2
    assert read.measured["flops"][1] < read.measured["flops"][0]
    assert read.measured["model"] == str(folder / "model")


def test_errors_are_one_line(folder):
    (folder / "jobs.jsonl").write_text("{}\nnot json\n")
    result = _measure(folder)
    assert result.exit_code == 2
    assert "jobs.jsonl:2" in result.output
    assert "Traceback" not in result.output
