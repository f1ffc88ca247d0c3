"""Batches: folders with a ledger, and the threads of this server that render in them.

All that counts is in the folder. A batch of a server that died, or that another program renders, is
found and shown like any other.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.device import Device, OnDevice
from apps.web.imports import once
from apps.web.models import asks
from apps.web.site import BATCHES, PLAIN, Refused, Site

if TYPE_CHECKING:
    from apps.render.driver import RunOptions, Summary
    from apps.render.jobs import Job, PlacedJob
    from apps.render.ledger import Task

MAX_BYTES = 4 << 20  # of an uploaded job file
MAX_JOBS = 10_000
MAX_STEPS = 10_000
LISTED = 20  # failures shown


@dataclass(frozen=True)
class Status:
    """A batch as it is on disk now. `running`: by this server; `elsewhere`: by another program."""

    name: str
    counts: dict[str, int]
    running: bool
    elsewhere: bool
    failed: Sequence[Task] = ()
    doing: tuple[str, int, int] | None = None  # name of a job, its step, steps
    said: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(n for state, n in self.counts.items() if state != "superseded")

    @property
    def left(self) -> int:
        return self.counts["pending"] + self.counts["running"]


@dataclass(eq=False)
class _Run:
    """A thread of this server that renders a batch."""

    executor: OnDevice
    thread: threading.Thread | None = None
    doing: tuple[str, int, int] | None = None
    said: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)

    def options(self, kind: type[RunOptions]) -> RunOptions:
        return kind(executor=lambda folder: self.executor)

    # what the driver tells, as `apps.render.progress.Progress`

    def begin(self, counts: dict[str, int]) -> None:
        self.begun.set()

    def event(self, event: dict[str, Any], task: Task) -> None:
        if event["event"] == "step":
            self.doing = (task.payload["stem"], event["step"], event["steps"])
        elif event["event"] in ("start", "loading"):
            self.doing = (task.payload["stem"], 0, 0)
        elif event["event"] in ("done", "failed", "lost", "stopped", "cancelled"):
            self.doing = None

    def say(self, line: str) -> None:
        self.said.append(line)

    def end(self, summary: Summary) -> None:
        if summary.stopped:
            self.said.append(summary.stopped)


class Batches:
    """Starts, pauses, cancels and looks at batches."""

    def __init__(self, site: Site, device: Device) -> None:
        self._site, self._device = site, device
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """All batches of the output folder, newest first."""
        from apps.render.plan import PLAN_FILE

        found = [p.parent for p in (self._site.out / BATCHES).glob(f"*/{PLAN_FILE}")]
        found.sort(key=lambda folder: (folder / PLAN_FILE).stat().st_mtime, reverse=True)
        return [folder.name for folder in found]

    def folder(self, name: object) -> Path:
        """The folder of a batch that exists."""
        if name not in self.names():
            raise Refused(f"There is no batch called {str(name)[:80]!r} here.")
        return self._site.out / BATCHES / str(name)

    def create(self, name: str, raw: bytes, model: str, recipe: str) -> str:
        """Check a job file, make a batch of it and start it; returns the batch's name.

        Raises:
            Refused: anything wrong with the file or the name; nothing was started.
        """
        from apps.render.driver import RunOptions, submit
        from apps.render.naming import stem_problem
        from apps.render.plan import Settings, plan

        name = name.strip() or time.strftime("batch-%Y%m%d-%H%M%S")
        if problem := stem_problem(name):
            raise Refused(f"The name {name[:60]!r} {problem}.")
        if name in self.names():
            raise Refused(f"There is a batch called {name!r} already. Choose another name.")
        model = self._site.model(model)
        jobs = read_jobs(raw, self._site, model)
        settings = Settings(
            model=model,
            recipe=None if recipe == PLAIN else str(self._site.recipe(recipe)),
            threads=self._site.threads,
            dtype=self._site.dtype,
            device=self._site.device,
        )
        tasks = _planned(jobs, settings, plan)
        folder = self._site.out / BATCHES / name
        self._start(name, lambda run: submit(folder, tasks, run.options(RunOptions), run))
        return name

    def resume(self, name: object, *, failed: bool = False) -> None:
        """Render what is left of a batch; with `failed`, what failed or was cancelled too."""
        from apps.render.driver import RunOptions, resume

        folder = self.folder(name)
        ids: list[str] = []
        if failed:
            with self._look(folder) as ledger:
                ids = [task.id for task in ledger.tasks("failed", "cancelled")]
        self._start(str(name), lambda run: resume(folder, run.options(RunOptions), run, retry=ids))

    def pause(self, name: object) -> None:
        """Stop rendering a batch after the step it is at; nothing finished is lost."""
        run = self._runs.get(str(name))
        if run is not None:
            run.executor.stop()

    def cancel(self, name: object) -> None:
        """Give up what is not finished of a batch."""
        from apps.render.ledger import Ledger
        from apps.render.recovery import LEDGER_FILE

        with Ledger.open(self.folder(name) / LEDGER_FILE) as ledger:
            ledger.cancel()

    def status(self, name: object) -> Status:
        """How a batch stands."""
        from apps.render.lock import is_held

        folder = self.folder(name)
        run = self._runs.get(str(name))
        running = run is not None and run.thread is not None and run.thread.is_alive()
        try:
            with self._look(folder) as ledger:
                counts = ledger.counts()
                failed = ledger.tasks("failed", count=LISTED)
                held = ledger.tasks("running", count=1)
        except sqlite3.Error:  # it is being made
            counts, failed, held = _none_yet(), [], []
        elsewhere = not running and bool(held) and is_held(folder)
        doing = run.doing if run is not None and running else None
        said = tuple(run.said) if run is not None else ()
        return Status(str(name), counts, running, elsewhere, failed, doing, said)

    def finished(self, name: object, first: int, count: int) -> list[Path]:
        """Files of finished jobs, one a job, from the `first` on."""
        folder = self.folder(name)
        try:
            with self._look(folder) as ledger:
                tasks = ledger.tasks("done", first=first, count=count)
        except sqlite3.Error:
            return []
        return [folder / task.result["files"][0] for task in tasks if task.result]

    def close(self) -> None:
        """Pause everything, and wait until it is on disk."""
        for run in list(self._runs.values()):
            run.executor.stop()
        for run in list(self._runs.values()):
            if run.thread is not None:
                run.thread.join(10)

    def _start(self, name: str, work: Callable[[_Run], Any]) -> None:
        once()
        folder = self._site.out / BATCHES / name
        with self._lock:
            before = self._runs.get(name)
            if before is not None and before.thread is not None and before.thread.is_alive():
                raise Refused(f"The batch {name!r} is being rendered already.")
            run = _Run(OnDevice(self._device, folder))
            self._runs[name] = run
            run.thread = threading.Thread(
                target=_rendering, args=(run, work), name=f"batch {name}", daemon=True
            )
            run.thread.start()
        run.begun.wait(30)  # until the ledger knows the jobs, or it is said why not
        if run.said and not run.thread.is_alive():
            raise Refused(run.said[-1])

    def _look(self, folder: Path) -> Any:
        from apps.render.ledger import Ledger
        from apps.render.recovery import LEDGER_FILE

        return Ledger.look(folder / LEDGER_FILE)


def read_jobs(raw: bytes, site: Site, model: str) -> list[PlacedJob]:
    """Jobs of an uploaded file, with models and recipes of this app only.

    model: of the jobs that name none.

    Raises:
        Refused: too large, or what is wrong with it, up to a few lines.
    """
    from apps.render.jobs import JobFileError, PlacedJob, check_jobs, job_lines

    if len(raw) > MAX_BYTES:
        raise Refused(f"The file is larger than {MAX_BYTES >> 20} MB, which is the limit here.")
    if raw.count(b"\n") > MAX_JOBS + 1000:
        raise Refused(f"The file has more than {MAX_JOBS:,} lines, which is the limit here.")
    try:
        placed = check_jobs(job_lines(raw, "line"))
    except JobFileError as error:
        raise Refused(_few(error.problems)) from None
    if len(placed) > MAX_JOBS:
        raise Refused(f"The file has {len(placed):,} jobs; at most {MAX_JOBS:,} are allowed here.")
    known, problems = [], []
    for one in placed:  # what the renderer would find job by job is found before anything starts
        job = one.job
        try:
            changes: dict[str, Any] = {}
            if job.model is not None:
                changes["model"] = site.model(job.model)
            if job.recipe is not None:
                changes["recipe"] = str(site.recipe(job.recipe).resolve())
            _check_search(job)
            asks(changes.get("model", model)).check(job.inputs)
            steps = job.inputs.get("num_inference_steps")
            if isinstance(steps, int) and steps > MAX_STEPS:
                raise Refused(f"{steps:,} steps; at most {MAX_STEPS:,} are allowed here.")
        except Refused as error:
            problems.append(f"{one.where}: {error}")
            continue
        known.append(PlacedJob(job.model_copy(update=changes) if changes else job, one.where))
    if problems:
        raise Refused(_few(problems))
    return known


def _check_search(job: Job) -> None:
    """Refused: a verifier that loads files of somebody's choosing."""
    from samplers.search.verifiers.pixels import PIXELS

    if job.search is None:
        return
    for name in (job.search.verifier, *(job.search.held_out or ())):
        for part in name.split("+"):
            if part not in (*PIXELS, "judge", "referee"):
                known = ", ".join((*PIXELS, "judge", "referee"))
                raise Refused(f"the verifier {name[:80]!r} is not allowed here; {known} are.")


def _planned(jobs: Sequence[PlacedJob], settings: Any, plan: Callable) -> Any:
    from apps.render.jobs import JobFileError

    try:
        return plan(jobs, settings, Path())
    except JobFileError as error:
        raise Refused(_few(error.problems)) from None


def _rendering(run: _Run, work: Callable[[_Run], Any]) -> None:
    """Body of a batch's thread: what goes wrong is said, never raised into nowhere."""
    from apps.render.faults import StorageFault
    from apps.render.lock import FolderBusy
    from apps.web.checks import sentence

    try:
        work(run)
    except (FolderBusy, StorageFault, ValueError, OSError, sqlite3.Error) as error:
        run.said.append(sentence(str(error)))
    finally:
        run.doing = None
        run.begun.set()


def _few(problems: Sequence[str], limit: int = 5) -> str:
    more = f" ... and {len(problems) - limit} more." if len(problems) > limit else ""
    return "; ".join(line.replace("line:", "line ", 1) for line in problems[:limit]) + more


def _none_yet() -> dict[str, int]:
    from apps.render.ledger import STATES

    return dict.fromkeys(STATES, 0)
