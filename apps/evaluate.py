"""Evaluation as jobs: what recipes gain and cost on a model, as figures and as one HTML page.

    made = plan(Request("zoo:digits-dit", ("recipes/taylor.yaml",), ("fidelity", "judge")))
    found = run(made, Path("report"), progress=print)

`report/report.json` says everything, `report/index.html` shows it and needs no network, and
`report/renders/` is a folder of the renderer: its ledger, its outputs. Killed at any moment, the
same call continues; with another recipe more, it renders only what is new.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.evaluation.request import KINDS, Plan, Request, look_tasks, make_plan, time_tasks

if TYPE_CHECKING:
    from apps.render.driver import RunOptions, Summary
    from apps.render.executors import Executor
    from apps.render.ledger import Task
    from apps.render.plan import PlannedTask

__all__ = ["KINDS", "Plan", "Request", "Unfinished", "compare", "plan", "report", "run"]

NEEDED = {"baseline", "environment", "kinds", "model", "recipes", "samples", "warnings"}
RENDERS, REPORT, PAGE, REQUEST = "renders", "report.json", "index.html", "evaluation.json"
Progress = Callable[[dict[str, Any]], None]


class Unfinished(RuntimeError):
    """An evaluation that stopped before its end; the same call continues it.

    Attributes:
        interrupted: a person asked for it; else something is wrong, as the message says.
    """

    def __init__(self, message: str, *, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


def plan(request: Request) -> Plan:
    """Check a request: models, recipes, calls. Nothing is rendered, nothing is written.

    Raises:
        ValueError, FileNotFoundError: something asked for is not usable, in one line each.
    """
    return make_plan(request)


def run(
    made: Plan | Request,
    out: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    trust_remote_code: bool = False,
    executor: Callable[[Path], Executor] | None = None,
) -> dict[str, Any]:
    """Do what is not done yet, then write and return the report.

    Args:
        progress: gets ``{"phase", "done", "total", "name", "step", "steps"}``; phases are render,
            time, look and report, and ``done`` of ``total`` tasks counts over all of them.
        stop: asked about once a second and between steps; True ends the run as an interrupt does.
        executor: where a folder's tasks run, instead of `workers` here.

    Raises:
        Unfinished: stopped or interrupted; nothing that was done is lost.
        ValueError: as `plan`; or a side of which nothing could be rendered, with its reason.
        StorageFault, FolderBusy: as `apps.render.driver.submit`.
    """
    from apps.render.driver import RunOptions

    made = plan(made) if isinstance(made, Request) else made
    options = RunOptions(workers, trust_remote_code, stop=stop, executor=executor)
    with _told_of_storage(out):
        return _run(made, out, options, progress)


def _run(made: Plan, out: Path, options: RunOptions, progress: Progress | None) -> dict[str, Any]:
    from accel.files import write_atomically
    from apps.evaluation.page import write_page
    from apps.evaluation.report import build

    folder = out / RENDERS
    files = [str(place) for place in (out, *out.parents) if place.is_file()]
    if files:
        raise ValueError(f"evaluate: {files[0]} is a file; a report wants a folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / REQUEST, _text(made.request.as_json()))
    renders = [task for tasks in made.renders.values() for task in tasks]
    times = time_tasks(made)
    heard = _Heard(progress, len(renders) + len(times) + len(look_tasks(made, set())))
    phases = _Phases(folder, options, heard)
    failed = phases.run("render", renders)
    lost = _lost(made, failed)
    # alone on the machine: a speed beside other workers is none
    failed |= phases.run("time", times, workers=1)
    looks = look_tasks(made, set(lost))
    failed |= phases.run("look", looks)
    broken = [failed[task.id] for task in looks if task.id in failed]
    if broken:
        raise ValueError(f"evaluate: {broken[0].removeprefix('ValueError: ')}")
    heard.phase("report")
    found = build(made, folder, looks, times, lost)
    found["warnings"] += [
        f"{task.stem}: not timed: {failed[task.id]}" for task in times if task.id in failed
    ]
    write_atomically(out / REPORT, _text(found))
    write_page(found, folder, out / PAGE)
    return found


@contextmanager
def _told_of_storage(out: Path) -> Iterator[None]:
    """Storage errors as one that names the report's folder, and what to do."""
    from apps.render.faults import StorageFault, is_storage, storage_reason

    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, StorageFault) else error
        began = (out / RENDERS).is_dir()
        if not (isinstance(cause, OSError | sqlite3.Error) and (is_storage(cause) or not began)):
            raise
        advice = "; nothing that was done is lost, the same command continues" if began else ""
        fault = StorageFault(f"report folder {out}: {storage_reason(cause)}{advice}")
        fault.started = began
        raise fault from error


def report(out: Path) -> dict[str, Any]:
    """The report in a folder (or of a report.json).

    Raises:
        ValueError: there is none, or it was edited.
    """
    from accel.metrics.protocol import Protocol

    path = out / REPORT if out.is_dir() else out
    try:
        found = json.loads(path.read_text("utf-8"))
        Protocol.read(found["protocol"])
        if missing := NEEDED - found.keys():
            raise ValueError(f"there is no {min(missing)!r} in it")
    except FileNotFoundError:
        raise ValueError(f"{out}: no report there; run the evaluation (again)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no report, or an edited one: {error}") from None
    return found


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes of two reports against each other, paired by sample: b less a.

    Returns:
        For each pair of recipes and measure that both have: difference with interval, and p.

    Raises:
        ValueError: the reports are of different protocols; says in which fields they differ.
    """
    from accel.metrics.protocol import Protocol, require_same
    from accel.metrics.statistics import paired_test

    require_same(Protocol.read(a["protocol"]), Protocol.read(b["protocol"]))
    rows = []
    for one in a["recipes"]:
        for two in b["recipes"]:
            for name in sorted(set(one["per_sample"]) & set(two["per_sample"])):
                test = paired_test(two["per_sample"][name], one["per_sample"][name])
                pair = {"a": one["label"], "b": two["label"], "measure": name}
                rows.append({**pair, **test.as_json()})
    return rows


def _lost(made: Plan, failed: Mapping[str, str]) -> dict[int, str]:
    """Calls that some side could not render, with the reason.

    Raises ValueError for a side with nothing left.
    """
    lost: dict[int, str] = {}
    for side in made.sides:
        gone = {
            i: f"{side.label}: {failed[task.id]}"
            for i, task in enumerate(made.renders[side.name])
            if task.id in failed
        }
        if len(gone) == len(made.calls):
            reasons = Counter(failed[task.id] for task in made.renders[side.name])
            usual = reasons.most_common(1)[0][0]
            raise ValueError(f"{side.label}: no call could be rendered: {usual}")
        lost |= gone
    if sum(made.calls[i]["samples"] for i in range(len(made.calls)) if i not in lost) < 2:
        raise ValueError(f"evaluate: too few calls are left: {next(iter(lost.values()))}")
    return lost


class _Phases:
    """Tasks so far, in one folder: each phase adds its own and works until they are done."""

    def __init__(self, folder: Path, options: RunOptions, heard: _Heard):
        self._folder, self._options, self._heard = folder, options, heard
        self._tasks: list[PlannedTask] = []

    def run(
        self, phase: str, tasks: Sequence[PlannedTask], workers: int | None = None
    ) -> dict[str, str]:
        """Do tasks; reasons of those that failed, by id. Raises Unfinished."""
        from apps.render.driver import submit

        self._tasks += tasks
        self._heard.phase(phase)
        options = replace(self._options, workers=workers or self._options.workers)
        summary: Summary = submit(self._folder, self._tasks, options, self._heard, replace=True)
        if summary.interrupted:
            raise Unfinished("interrupted; the same command continues", interrupted=True)
        if summary.stopped:
            raise Unfinished(f"{summary.stopped}; the same command continues")
        mine = {task.id for task in tasks}
        cancelled = summary.counts["cancelled"]
        if cancelled:
            raise Unfinished(f"{cancelled} tasks were cancelled; the same command continues")
        return {t.id: t.error or "failed" for t in summary.failures if t.id in mine}


class _Heard:
    """The renderer's progress as an evaluation's."""

    def __init__(self, progress: Progress | None, total: int):
        self._tell = progress or (lambda event: None)
        self._total, self._done, self._phase = total, 0, ""

    def phase(self, name: str) -> None:
        self._phase = name
        self._say({})

    def begin(self, counts: dict[str, int]) -> None:
        self._done = counts["done"]
        self._say({})

    def event(self, event: dict[str, Any], task: Task) -> None:
        kind = event["event"]
        self._done += kind == "done"
        kept = {k: event[k] for k in ("step", "steps") if k in event}
        if "fault" in event:
            kept["failed"] = event["fault"]["message"]
        if kind in ("start", "step", "loading", "done", "failed", "lost"):
            self._say({"event": kind, "name": task.payload["stem"], **kept})

    def say(self, line: str) -> None:
        self._say({"message": line})

    def end(self, summary: Summary) -> None:
        pass

    def _say(self, more: dict[str, Any]) -> None:
        self._tell({"phase": self._phase, "done": self._done, "total": self._total, **more})


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
