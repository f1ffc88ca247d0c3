from typer.testing import CliRunner

from accel.metrics.statistics import Interval
from apps.cli import app
from apps.commands.drafts import table
from apps.search import ALGORITHMS
from samplers.search.draft_commit import Calibration


def figures(captured, cost):
    spans = [Interval(x, x - 0.1, x + 0.1) for x in (0.9, 0.5, captured)]
    return Calibration(*spans, cost - 0.125, cost, 4, 8)


def test_the_cheapest_that_captures_enough_is_named():
    found = {"a": figures(0.99, 0.6), "b": figures(0.96, 0.4), "c": figures(0.7, 0.2)}
    assert table(found, 0.95)[-1].endswith(": b")
    assert "none captures" in table(found, 0.995)[-1]


def test_the_command_measures_a_recipe(tmp_path):
    words = "calibrate draft recipes/digits-sd-4-steps.yaml --model zoo:digits-sd --count 2"
    jobs = tmp_path / "jobs.jsonl"
    row = '{{"inputs": {{"prompt": "{}", "num_inference_steps": 3, "guidance_scale": 1.0}}}}\n'
    jobs.write_text(row.format("a red three on a dark background") + row.format("a blue one"))
    more = ["--verifier", "brightness", "--candidates", "3", "--jobs", str(jobs)]
    found = CliRunner().invoke(app, [*words.split(), *more, "--keep", str(tmp_path / "keep")])
    assert found.exit_code == 0, found.output
    assert "digits-sd-4-steps" in found.output
    assert (tmp_path / "keep" / "digits-sd-4-steps" / "journal.jsonl").is_file()


def test_the_help_of_search_names_every_algorithm():
    said = CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "300"}).output
    assert all(name in said for name in ALGORITHMS)
