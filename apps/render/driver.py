"""The loop of a render: lease tasks, hand them to an executor, write down what comes back.

Only the driver touches the ledger. It holds the folder's lock for as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.render.executors import Event, Executor, InProcess, Spawned
from apps.render.faults import Fault, StorageFault, is_storage, storage_reason
from apps.render.ledger import Ledger, Task
from apps.render.lock import folder_lock
from apps.render.plan import PLAN_FILE, PlannedTask, load_plan, merge_plans, save_plan
from apps.render.progress import Progress, Silent
from apps.render.recovery import open_ledger, recover

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
TICK_SECONDS = 1.0
EXIT_OK, EXIT_FAILED, EXIT_INVALID, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class RunOptions:
    """How to run, none of which decides pixels."""

    workers: int = 1
    trust_remote_code: bool = False
    trusted: frozenset[str] = frozenset()  # ids of tasks whose verifiers may start commands
    wait: bool = False
    stop: Callable[[], bool] | None = None  # asked once a second: end as if interrupted?
    executor: Callable[[Path], Executor] | None = None  # of a folder, instead of `workers` here


@dataclass
class Summary:
    """The end of a render. `made` and `images` count this run only."""

    counts: dict[str, int]
    made: int = 0
    images: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[Task] = field(default_factory=list)
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    stopped: str | None = None
    interrupted: bool = False

    @property
    def left(self) -> int:
        return self.counts["pending"] + self.counts["running"]

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return EXIT_INTERRUPTED
        unfinished = self.left or self.counts["failed"]
        return EXIT_FAILED if unfinished or self.stopped else EXIT_OK


def submit(
    folder: Path,
    tasks: Sequence[PlannedTask],
    options: RunOptions,
    progress: Progress | None = None,
    *,
    replace: bool = False,
) -> Summary:
    """Add tasks to a folder and render everything in it that is not finished.

    Finished work is skipped; a job that failed or was cancelled before is tried again. With
    `replace` the folder's tasks become these and no others; files of others stay where they are.

    Raises:
        StorageFault: the folder cannot be made or written; nothing was started.
        FolderBusy: another renderer works in it.
    """
    with _holding(folder, options):
        old = load_plan(folder) if (folder / PLAN_FILE).exists() else []
        plan = list(tasks) if replace else merge_plans(old, tasks)
        if plan != old:
            save_plan(folder, plan)
        wanted = [task.id for task in tasks]
        return _run(folder, plan, options, progress or Silent(), wanted)


def resume(
    folder: Path,
    options: RunOptions,
    progress: Progress | None = None,
    *,
    retry: Sequence[str] = (),
) -> Summary:
    """Render what is left in a folder; failed and cancelled tasks only if their id is in `retry`.

    Raises:
        FileNotFoundError: the folder holds no render.
        StorageFault, FolderBusy: as `submit`.
    """
    load_plan(folder)
    with _holding(folder, options):
        return _run(folder, load_plan(folder), options, progress or Silent(), list(retry))


@contextlib.contextmanager
def _holding(folder: Path, options: RunOptions) -> Iterator[None]:
    """Hold the folder, turning every storage error into a StorageFault that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder_lock(folder, wait=options.wait)
    except OSError as error:
        raise StorageFault(f"output folder {folder}: {storage_reason(error)}") from error
    started = False
    try:
        with lock:
            started = True
            yield
    except StorageFault:
        raise
    except (OSError, sqlite3.OperationalError) as error:
        if not is_storage(error) and not isinstance(error, PermissionError):
            raise
        advice = f"; nothing is lost, continue with: accel resume {folder}" if started else ""
        fault = StorageFault(f"output folder {folder}: {storage_reason(error)}{advice}")
        fault.started = started
        raise fault from error


def _run(
    folder: Path,
    plan: Sequence[PlannedTask],
    options: RunOptions,
    progress: Progress,
    again: Sequence[str],
) -> Summary:
    ledger, corrupt = open_ledger(folder)
    with ledger:
        recovered = recover(folder, ledger, plan)
        recovered.corrupt = corrupt
        ledger.requeue("failed", "cancelled", task_ids=again)
        for line in recovered.lines():
            progress.say(line)
        return Driver(folder, ledger, options, progress).run()


class Driver:
    """One run on an open ledger. Use `submit` and `resume`."""

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        options: RunOptions,
        progress: Progress,
        executor: Executor | None = None,
    ):
        self._ledger = ledger
        self._progress = progress
        self._owner = f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"
        self._asked_to_stop = options.stop or (lambda: False)
        self._executor = executor or (options.executor or _executor(options))(folder)
        self._held: dict[str, Task] = {}
        self._failures: Counter[str] = Counter()
        self._next_heartbeat = self._next_tick = 0.0
        self._stop_told = False
        self._bucket: str | None = None
        self.summary = Summary(ledger.counts())
        self.summary.skipped = self.summary.counts["done"]
        self.stopping = False

    def run(self) -> Summary:
        """Work until nothing is pending, or until told to stop; releases every lease."""
        started = time.monotonic()
        self._progress.begin(self._ledger.counts())
        self._executor.start(self._on_event, self._tick)
        try:
            with _signals(self._on_signal):
                self._loop()
        finally:
            self._executor.close()
            with contextlib.suppress(sqlite3.OperationalError):  # else the next run does it
                for task_id in list(self._held):
                    self._ledger.release(task_id, self._owner, refund=True)
            self.summary.seconds = time.monotonic() - started
            self.summary.counts = self._ledger.counts()
            self.summary.failures = self._ledger.tasks("failed")
            self._progress.end(self.summary)
        return self.summary

    def _loop(self) -> None:
        while True:
            self._tick()
            while not self.stopping and self._executor.free() > 0:
                task = self._ledger.lease(self._owner, LEASE_SECONDS, self._bucket)
                if task is None:
                    break
                self._bucket = task.bucket
                self._held[task.id] = task
                self._progress.event({"event": "start", "task": task.id}, task)
                self._executor.submit(task.id, task.payload)
            if not self._held:
                return
            self._executor.poll(0.2)

    def _tick(self) -> None:
        """Heartbeats and cancel requests, at most once a second; called between steps too."""
        now = time.monotonic()
        if not self.stopping and now >= self._next_tick and self._asked_to_stop():
            self.stopping = self.summary.interrupted = True
        if self.stopping and not self._stop_told:
            self._stop_told = True
            self._executor.stop()
        if now < self._next_tick:
            return
        self._next_tick = now + TICK_SECONDS
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            self._ledger.heartbeat(self._owner, LEASE_SECONDS)
        for task_id in self._ledger.cancel_requests(self._owner):
            self._executor.cancel(task_id)

    def _on_signal(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt  # asked twice: leave at once; leases are released on the way
        self.stopping = self.summary.interrupted = True

    def _on_event(self, event: Event) -> None:
        task = self._held.get(event["task"])
        if task is None:
            return
        handler: Callable[[Task, Event], None] | None = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(task, event)
        self._progress.event(event, task)

    def _on_stage(self, task: Task, event: Event) -> None:
        self._ledger.advance(task.id, self._owner, event["stage"])

    def _on_done(self, task: Task, event: Event) -> None:
        result = event["result"]
        self._ledger.complete(task.id, self._owner, result)
        del self._held[task.id]
        self.summary.made += 1
        self.summary.images += len(result["files"])
        stem = task.payload["stem"]
        if result["fallback"]:
            self.summary.fallbacks.append((stem, result["fallback"]["reason"]))
        self.summary.notes += [(stem, note) for note in result["notes"]]

    def _on_failed(self, task: Task, event: Event) -> None:
        fault = Fault(**event["fault"])
        if fault.stop:
            self.stopping, self.summary.stopped = True, fault.message
            self._ledger.release(task.id, self._owner, refund=True)
        else:
            self._failures[task.id] += 1
            event["retry"] = fault.worth_another(self._failures[task.id])
            self._ledger.fail(
                task.id, self._owner, fault.error_class, fault.message, retry=event["retry"]
            )
        del self._held[task.id]

    _on_lost = _on_failed

    def _on_stopped(self, task: Task, event: Event) -> None:
        self._ledger.release(task.id, self._owner, refund=True)
        del self._held[task.id]

    def _on_cancelled(self, task: Task, event: Event) -> None:
        self._ledger.cancelled(task.id, self._owner)
        del self._held[task.id]


def _executor(options: RunOptions) -> Callable[[Path], Executor]:
    from apps.render.worker_settings import WorkerSettings

    def make(folder: Path) -> Executor:
        settings = WorkerSettings(str(folder), options.trust_remote_code, trusted=options.trusted)
        return InProcess(settings) if options.workers == 1 else Spawned(settings, options.workers)

    return make


@contextlib.contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    """Route SIGINT and SIGTERM to `handler`; only the main thread of a program can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {s: signal.signal(s, lambda *_: handler()) for s in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
