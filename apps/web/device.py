"""The one worker process of the app, and who is next on it.

Everything that computes goes through here, so that one model is loaded at a time, whoever asks:
two browsers and a batch take turns, and what a person waits for goes before a batch. A task that is
asked to end does so between two steps; if a step takes longer than GRACE, its process is ended.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.render.executors import Event, Spawned
from apps.render.faults import Fault, WorkersDie, classify
from apps.render.worker_settings import WORK_FOLDER, WorkerSettings

FIRST, LATER = 0, 1  # turns: a person who waits, a batch
GRACE = 1.0  # seconds that a step may still take
ENDS = ("done", "failed", "lost", "stopped", "cancelled", "skipped")


@dataclass(eq=False)
class Work:
    """A task on its way through the device. `sink` gets its events, on the device's thread.

    warm_up: only run if its model or its recipe is the first of its kind; else it is `skipped`.
    """

    task: str
    payload: dict[str, Any]
    out: Path
    sink: Callable[[Event], None]
    turn: int = FIRST
    watch: bool = False
    warm_up: bool = False
    asked: str | None = field(default=None, init=False)  # "cancelled" or "stopped"
    asked_at: float = field(default=0.0, init=False)


class Device:
    """See the module docstring."""

    def __init__(self, executor: Spawned | None = None) -> None:
        self._waiting: queue.PriorityQueue[tuple[int, int, Work]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._executor = executor or Spawned(WorkerSettings(out="."), 1)
        self._executor.start(self._on_event, lambda: None)
        self._loaded: tuple[Any, ...] | None = None
        self._ran: set[str | None] = set()  # recipes that the loaded model has run under
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.current: Work | None = None

    def start(self) -> None:
        """Start the worker process, so that it has imported everything by the first click."""
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Put work into the queue."""
        self._waiting.put((work.turn, next(self._numbers), work))

    def end(self, work: Work, how: str) -> None:
        """Have it end as `cancelled` or `stopped`: at once if it waits, else after its step."""
        if work.asked is None:
            work.asked_at = time.monotonic()
            work.asked = how

    def ahead_of(self, work: Work) -> int:
        """How many others will run before it."""
        with self._waiting.mutex:
            entries = sorted(self._waiting.queue)
        place = next((i for i, (_, _, one) in enumerate(entries) if one is work), None)
        return 0 if place is None else place + (self.current is not None)

    def close(self) -> None:
        """End the worker process."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        self._executor.warm_up()
        try:
            while not self._closing.is_set():
                self._drop_ended()
                with contextlib.suppress(queue.Empty):
                    self.current = self._waiting.get(timeout=0.1)[2]
                if self.current is not None:
                    self._work(self.current)
        finally:
            self._executor.close()

    def _drop_ended(self) -> None:
        """Let those go that were asked to end while they waited."""
        with self._waiting.mutex:
            gone = [entry for entry in self._waiting.queue if entry[2].asked]
            self._waiting.queue[:] = [e for e in self._waiting.queue if not e[2].asked]
            self._waiting.queue.sort()
        for _, _, work in gone:
            _tell(work, {"event": work.asked, "task": work.task})

    def _work(self, work: Work) -> None:
        if work.asked or (work.warm_up and self._is_warm(work)):
            self._finish(work, {"event": work.asked or "skipped", "task": work.task})
            return
        _tell(work, {"event": "start", "task": work.task})
        try:
            (work.out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
            self._executor.submit(work.task, work.payload, out=str(work.out), watch=work.watch)
        except (OSError, WorkersDie) as error:
            self._fail(work, error)
            return
        told = False
        while self.current is work:
            try:
                self._executor.poll(0.05)
            except WorkersDie as error:
                self._fail(work, error)
                return
            self._drop_ended()
            if self._closing.is_set():
                self.end(work, "stopped")
            if work.asked and not told:
                told = True
                self._executor.cancel(work.task)
            if work.asked and time.monotonic() - work.asked_at > GRACE:
                self._executor.kill(work.task)

    def _fail(self, work: Work, error: OSError | WorkersDie) -> None:
        fault = (
            Fault("lost", str(error), True) if isinstance(error, WorkersDie) else classify(error)
        )
        if self.current is work:
            self._finish(work, {"event": "failed", "task": work.task, "fault": fault.as_json()})

    def _on_event(self, event: Event) -> None:
        work = self.current
        if work is None or event.get("task") != work.task:
            return
        if event["event"] not in ENDS:
            _tell(work, event)
            return
        self._remember(work, event["event"])
        if event["event"] == "lost":
            self._executor.warm_up()
        ended = event["event"] in ("cancelled", "stopped", "lost") and work.asked
        self._finish(work, {**event, "event": work.asked} if ended else event)

    def _is_warm(self, work: Work) -> bool:
        known = self._loaded == _model_key(work.payload)
        return known and work.payload.get("recipe_sha256") in self._ran

    def _remember(self, work: Work, ended: str) -> None:
        """What the worker has loaded and run; a render that did not end well proves neither."""
        key, recipe = _model_key(work.payload), work.payload.get("recipe_sha256")
        if ended == "done" and work.payload.get("kind", "render") == "render":
            self._ran = {recipe} if key != self._loaded else self._ran | {recipe}
            self._loaded = key
        elif ended == "lost" or key != self._loaded:
            self._loaded = None

    def _finish(self, work: Work, event: Event) -> None:
        self.current = None
        _tell(work, event)


class OnDevice:
    """The device as the executor of a batch: one task at a time, when it is its turn."""

    def __init__(self, device: Device, folder: Path) -> None:
        self._device, self._folder = device, folder
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._work: Work | None = None
        self.paused = False

    def start(self, sink: Callable[[Event], None], tick: Callable[[], None]) -> None:
        self._sink = sink

    def free(self) -> int:
        return 0 if self.paused or self._work is not None else 1

    def submit(self, task_id: str, payload: dict[str, Any]) -> None:
        self._work = Work(task_id, payload, self._folder, self._events.put, LATER)
        self._device.submit(self._work)

    def poll(self, seconds: float) -> None:
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return
        if event["event"] in ENDS:
            self._work = None
        if event["event"] != "start":  # the driver has its own, from when it leased the task
            self._sink({"worker": 0, "pid": 0, **event})

    def cancel(self, task_id: str) -> None:
        if self._work is not None and self._work.task == task_id:
            self._device.end(self._work, "cancelled")

    def stop(self) -> None:
        """Let the running task go back to the ledger, and take no other."""
        self.paused = True
        if self._work is not None:
            self._device.end(self._work, "stopped")

    def close(self) -> None:
        self.stop()


def _tell(work: Work, event: Event) -> None:
    """One listener that fails must not end the thread that all others wait for."""
    try:
        work.sink(event)
    except Exception:  # noqa: BLE001  the boundary between tasks, as in `executors.outcome`
        traceback.print_exc()


def _model_key(payload: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(payload.get(key) for key in ("model", "model_revision", "dtype", "device"))
