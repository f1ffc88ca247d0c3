"""The program from outside: quick help, one-line errors, exit codes."""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apps.cli import app

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "numpy", "transformers", "PIL", "pydantic", "sqlite3")


@pytest.fixture
def cli():
    def call(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def _python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_help_imports_nothing_heavy():
    loaded = _python("import apps.cli, sys; print(*sorted(sys.modules))").split()
    assert [name for name in HEAVY if name in loaded] == []


def test_help_takes_less_than_half_a_second_of_cpu():
    """CPU seconds, best of three: what the machine does besides does not count."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _python("import sys; sys.argv = ['accel', '--help']; from apps.cli import main\n"
                "try: main()\nexcept SystemExit: pass")  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.5


def test_render_status_rerender_retry_cancel(cli, tmp_path, tiny_model, job_file, rows):
    jobs, out = job_file([*rows(2), {"name": "bad", "inputs": {"steps": 1}}]), tmp_path / "out"
    common = ("--model", tiny_model, "--out", out, "--device", "cpu")

    dry = cli("render", jobs, *common, "--dry-run")
    assert dry.exit_code == 0
    assert "3 jobs" in dry.output
    assert "nothing was started" in dry.output
    assert not out.exists()

    done = cli("render", jobs, *common, "--progress", "json")
    assert done.exit_code == 1
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["begin", "end"]
    assert sum(event["event"] == "step" for event in events) == 4
    assert (events[-1]["made"], events[-1]["counts"]["failed"]) == (2, 1)

    status = cli("status", out)
    assert "2 done, 1 failed" in status.output
    assert "bad (1 attempts) invalid:" in status.output
    assert json.loads(cli("status", out, "--json").output)["counts"]["done"] == 2

    assert cli("resume", out, "--progress", "none").exit_code == 1, "what failed stays failed"
    retried = cli("retry", out, "--progress", "none")
    assert retried.exit_code == 1
    assert "failed: bad (invalid)" in retried.output
    assert "'nobody' is no job of this folder" in cli("retry", out, "nobody").output
    assert "0 cancelled, 0 running" in cli("cancel", out).output

    again = cli("rerender", out / "job1.png", "--progress", "none")
    assert again.exit_code == 0
    assert "the same frames" in again.output

    dry = cli("render", jobs, *common, "--dry-run")
    assert "2 finished, 1 to render" in dry.output


def test_one_job_from_the_command_line(cli, tmp_path, tiny_model):
    out = tmp_path / "out"
    done = cli(
        "render", "--class-label", 3, "--set", "inputs.num_inference_steps=2", "--set", "seed=7",
        "--model", tiny_model, "--out", out, "--device", "cpu", "--progress", "none",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (sidecar,) = out.glob("*.json")
    job = json.loads(sidecar.read_text())["payload"]["job"]
    assert job["seed"] == 7
    assert job["inputs"] == {"class_labels": [3], "num_inference_steps": 2}


WRONG = {
    "nothing": (["render"], "nothing to render"),
    "no file": (["render", "none.jsonl"], "none.jsonl: cannot be read"),
    "override": (["render", "--set", "x"], "is not of the form"),
    "field": (["render", "--set", "sed=1"], "command line: unknown field 'sed'"),
    "model": (["render", "--set", "seed=1"], "no model"),
    "device": (["render", "--set", "seed=1", "--device", "tpu"], "must be cpu, cuda or auto"),
    "status": (["status", "nowhere"], "nowhere holds no render"),
    "resume": (["resume", "nowhere"], "nowhere holds no render"),
    "rerender": (["rerender", "nothing.png"], "no such file"),
    "recipe": (["recipe", "check", "nothing.yaml"], "no recipe at nothing.yaml"),
    "sheet": (["sheet", "nowhere", "nowhere"], "holds no finished render"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing was started"


def test_a_damaged_ledger_is_explained(cli, tmp_path, tiny_model, job_file, rows):
    out = tmp_path / "out"
    arguments = ("--model", tiny_model, "--out", out, "--device", "cpu", "--progress", "none")
    assert cli("render", job_file(rows(1)), *arguments).exit_code == 0
    (out / "ledger.sqlite").write_bytes(b"x" * 5000)
    told = cli("status", out)
    assert told.exit_code == 2
    assert "is damaged" in told.stderr
    assert "accel resume" in told.stderr
    assert cli("resume", out, "--progress", "none").exit_code == 0
    assert "1 done" in cli("status", out).output


def test_status_of_a_folder_that_cannot_be_written(
    cli, tmp_path, monkeypatch, rows, job_file, tiny_model
):
    from apps.render import ledger

    out = tmp_path / "out"
    arguments = ("--model", tiny_model, "--out", out, "--device", "cpu", "--progress", "none")
    assert cli("render", job_file(rows(1)), *arguments).exit_code == 0
    monkeypatch.setattr(ledger, "is_writable", lambda folder: False)
    written = []
    connect = ledger.sqlite3.connect
    monkeypatch.setattr(
        ledger.sqlite3, "connect", lambda at, **how: written.append(at) or connect(at, **how)
    )
    assert "1 done" in cli("status", out).output
    assert [at.endswith("?mode=ro&immutable=1") for at in written] == [True]
    (out / "ledger.sqlite").write_bytes(b"x" * 5000)
    told = cli("status", out)
    assert (told.exit_code, len(told.stderr.splitlines())) == (2, 1)
    assert f"the ledger in {out} cannot be used: file is not a database" in told.stderr


@pytest.mark.parametrize("command", ["resume", "retry"])
def test_a_person_says_whether_a_folder_may_start_commands(
    cli, tmp_path, tiny_model, job_file, rows, monkeypatch, command
):
    from apps.render import driver
    from apps.render.plan import load_plan

    out = tmp_path / "out"
    arguments = ("--model", tiny_model, "--out", out, "--device", "cpu", "--progress", "none")
    assert cli("render", job_file(rows(1)), *arguments).exit_code == 0
    heard, resume = [], driver.resume
    monkeypatch.setattr(
        driver, "resume", lambda *a, **k: heard.append(a[1].trusted) or resume(*a, **k)
    )
    for flags in ([], ["--trust-verifiers"]):
        assert cli(command, out, "--progress", "none", *flags).exit_code == 0
    (task,) = load_plan(out)
    assert heard == [frozenset(), {task.id}]


def test_names_that_are_not_utf_8_are_printed_as_they_are(monkeypatch):
    from apps import cli

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", write_through=True))
    monkeypatch.setattr(cli, "app", lambda: print(os.fsdecode(b"out/\xff")))
    cli.main()
    assert written.getvalue() == b"out/\xff\n"


def test_schema_and_catalogue(cli):
    assert json.loads(cli("schema").output)["title"] == "Job"
    assert isinstance(json.loads(cli("methods", "--json").output), list)
    assert cli("methods").exit_code == 0
    assert cli("models").exit_code == 0


def test_recipe_check(cli, tmp_path, tiny_model):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "accel_recipe: 1\nname: swap\nmethods:\n"
        "  - {method: 'samplers.swap:SwapScheduler', settings: {scheduler: DDIMScheduler}}\n"
    )
    fits = cli("recipe", "check", recipe, "--model", tiny_model)
    assert fits.exit_code == 0, fits.output
    assert "fits" in fits.output
    recipe.write_text(
        recipe.read_text().replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
    )
    wrong = cli("recipe", "check", recipe, "--model", tiny_model)
    assert wrong.exit_code == 2
    assert "flow" in wrong.stderr


def test_the_wings_of_a_full_terminal(cli):
    """Every command has a help text of its own."""
    listed = cli("--help").output
    for command in ("render", "status", "resume", "retry", "cancel", "rerender", "models",
                    "methods", "recipe", "schema", "sheet"):  # fmt: skip
        assert command in listed
        assert cli(command, "--help").exit_code == 0
