"""People and programs see every end of a job."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from apps.render.driver import Summary
from apps.render.ledger import STATES, Task
from apps.render.progress import JsonLines, RichBars, Silent, make, print_summary

TASK = Task(
    id="x", kind="render", bucket="", position=0, payload={"stem": "job [bold]1"}, stages=(),
    stage=None, state="failed", attempts=2, lease_owner=None, lease_until=None,
    cancel_asked=False, error_class="memory", error="too big", result=None, updated=0.0,
)  # fmt: skip
COUNTS = dict.fromkeys(STATES, 0)
FAULT = {"error_class": "memory", "message": "too big", "stop": False}


def _play(progress, summary):
    progress.begin(COUNTS | {"pending": 2})
    progress.say("the ledger was damaged")
    for event in (
        {"event": "start"},
        {"event": "loading", "model": "m"},
        {"event": "step", "step": 1, "steps": 2},
        {"event": "stage", "stage": "denoise"},
        {"event": "failed", "fault": FAULT, "retry": True},
        {"event": "start"},
        {"event": "done", "result": {"files": ["a.png"]}},
    ):
        progress.event({**event, "task": "x"}, TASK)
    progress.end(summary)


def _summary(**more):
    return Summary(COUNTS | {"done": 1, "failed": 1}, made=1, images=3, seconds=2.0, **more)


def test_json_lines_are_json_lines():
    stream = io.StringIO()
    _play(JsonLines(stream), _summary())
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["event"] for row in rows] == [
        "begin", "say", "start", "loading", "step", "stage", "failed", "start", "done", "end",
    ]  # fmt: skip
    assert rows[4]["name"] == "job [bold]1"
    assert (rows[4]["step"], rows[4]["steps"]) == (1, 2)
    assert rows[-1]["images_per_second"] == 1.5
    assert rows[-1]["exit_code"] == 1
    assert all(row["seconds"] >= 0 for row in rows)


def test_bars_survive_odd_names_and_tell_failures():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    _play(RichBars(console), _summary())
    shown = console.file.getvalue()
    assert "will be tried again" in shown
    assert "too big" in shown
    assert "the ledger was damaged" in shown


def test_summary_says_what_is_left_and_what_to_do():
    console = Console(file=io.StringIO(), width=100)
    print_summary(_summary(failures=[TASK]), "out", console)
    text = console.file.getvalue()
    assert "1.50" in text
    assert "failed: job [bold]1 (memory): too big" in text
    assert "accel retry out" in text
    assert "correct the job" not in text
    console = Console(file=io.StringIO(), width=100)
    left = Summary(COUNTS | {"pending": 3}, stopped="the disk is full", notes=[("a", "b")] * 20)
    print_summary(left, "out", console)
    text = console.file.getvalue()
    assert "stopped: the disk is full" in text
    assert "accel resume out" in text
    assert "and 10 more" in text


@pytest.mark.parametrize(
    ("summary", "code"),
    [
        (Summary(COUNTS | {"done": 3, "cancelled": 1, "superseded": 1}), 0),
        (Summary(COUNTS | {"done": 3, "failed": 1}), 1),
        (Summary(COUNTS | {"done": 3, "pending": 1}), 1),
        (Summary(COUNTS | {"done": 3}, stopped="full"), 1),
        (Summary(COUNTS | {"pending": 3}, interrupted=True), 130),
    ],
)
def test_exit_codes(summary, code):
    assert summary.exit_code == code


def test_make():
    assert isinstance(make("json"), JsonLines)
    assert isinstance(make("rich"), RichBars)
    _play(make("none"), _summary())
    assert isinstance(make("none"), Silent)


def test_a_retry_is_not_advised_where_it_changes_nothing():
    invalid = dataclasses.replace(TASK, error_class="invalid")
    for failures, wanted in (([invalid], [False, True]), ([TASK, invalid], [True, True])):
        console = Console(file=io.StringIO(), width=100)
        summary = Summary(COUNTS | {"failed": len(failures)}, failures=failures)
        print_summary(summary, "out", console)
        text = console.file.getvalue()
        assert ["accel retry out" in text, "correct the job and render again" in text] == wanted
