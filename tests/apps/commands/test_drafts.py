from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from accel.method import Recipe
from accel.metrics.statistics import Interval
from accel.recipe_file import write_recipe
from accel.settings import Settings
from apps.cli import app
from apps.commands.drafts import table
from apps.search import ALGORITHMS
from samplers.search.draft_commit import Calibration
from samplers.swap import SwapScheduler


def figures(captured, cost):
    spans = [Interval(x, x - 0.1, x + 0.1) for x in (0.9, 0.5, captured)]
    return Calibration(*spans, cost - 0.125, cost, 4, 8)


def test_the_cheapest_that_captures_enough_is_named():
    found = {"a": figures(0.99, 0.6), "b": figures(0.96, 0.4), "c": figures(0.7, 0.2)}
    assert table(found, 0.95)[-1].endswith(": b")
    assert "none captures" in table(found, 0.995)[-1]
    shown = table({"cache": replace(figures(0.99, 0.525), price=1.0, work=0.4)}, 0.95)[1]
    assert "100 %" in shown
    assert "40 %" in shown


def test_the_command_measures_a_recipe(tmp_path):
    words = "calibrate draft recipes/digits-sd-4-steps.yaml --model zoo:digits-sd --count 2"
    jobs = tmp_path / "jobs.jsonl"
    row = '{{"inputs": {{"prompt": "{}", "num_inference_steps": 3, "guidance_scale": 1.0}}}}\n'
    jobs.write_text(row.format("a red three on a dark background") + row.format("a blue one"))
    more = ["--verifier", "brightness", "--candidates", "3", "--jobs", str(jobs)]
    found = CliRunner().invoke(app, [*words.split(), *more, "--keep", str(tmp_path / "keep")])
    assert found.exit_code == 0, found.output
    assert "digits-sd-4-steps" in found.output
    assert len(list((tmp_path / "keep").glob("*/journal.jsonl"))) == 1


def test_recipes_of_one_name_are_two_rows_and_none_writes_outside(tmp_path, monkeypatch):
    folders: list[str] = []

    def calibrated(pipe, inputs, judge, recipe, *, candidates, settings):
        folders.append(settings.journal)
        return figures(0.9, 0.2)

    monkeypatch.setattr("samplers.search.draft_commit.calibrate", calibrated)
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for steps, file in enumerate(files, start=2):
        recipe = Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=steps),))
        write_recipe(file, recipe, name="../../escaped")
    keep = tmp_path / "keep"
    words = ["--model", "zoo:digits-sd", "--verifier", "brightness", "--keep", str(keep)]
    found = CliRunner().invoke(app, ["calibrate", "draft", *map(str, files), *words])
    assert found.exit_code == 0, found.output
    assert all(str(file) in found.output for file in files)
    assert len(set(folders)) == 2
    assert all(Path(folder).parent == keep and ".." not in folder for folder in folders)


def test_the_help_of_search_names_every_algorithm():
    said = CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "300"}).output
    assert all(name in said for name in ALGORITHMS)
