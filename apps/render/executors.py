"""Where tasks run: in this process, or in worker processes.

An executor takes tasks and hands back events, plain dicts with `event`, `task`, `worker`, `pid`:
`loading`, `step`, `stage` while it runs, then exactly one of `done` (result), `failed` (fault),
`stopped`, `cancelled` or `lost` (the worker died). It never touches the ledger.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from apps.render.faults import JobCancelled, Stopped, WorkersDie, classify

if TYPE_CHECKING:
    from apps.render.worker_settings import WorkerSettings

Event = dict[str, Any]
Sink = Callable[[Event], None]
MAX_STILLBORN = 3  # workers in a row that die before they are ready: something is wrong with all


class Executor(Protocol):
    """Runs tasks; one call of `submit` per free slot, events arrive during `poll`."""

    def start(self, sink: Sink, tick: Callable[[], None]) -> None:
        """Begin. `sink` gets events; `tick` is called often while a task blocks `poll`."""

    def free(self) -> int:
        """How many more tasks `submit` takes now."""
        ...

    def submit(self, task_id: str, payload: dict[str, Any]) -> None: ...

    def poll(self, seconds: float) -> None:
        """Deliver events; returns after some, or after `seconds`."""

    def cancel(self, task_id: str) -> None:
        """Ask a running task to stop between two steps."""

    def stop(self) -> None:
        """Ask all running tasks to stop between two steps."""

    def close(self) -> None:
        """End; tasks still running are ended by force."""


class InProcess:
    """One task at a time in this process."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._worker: Any = None
        self._queued: tuple[str, dict[str, Any]] | None = None
        self._cancelled: set[str] = set()
        self._stopping = False

    def start(self, sink: Sink, tick: Callable[[], None]) -> None:
        self._sink, self._tick = sink, tick

    def free(self) -> int:
        return int(self._queued is None)

    def submit(self, task_id: str, payload: dict[str, Any]) -> None:
        self._queued = (task_id, payload)

    def poll(self, seconds: float) -> None:
        if self._queued is None:
            time.sleep(seconds)
            return
        task_id, payload = self._queued

        def emit(event: Event) -> None:
            self._sink({**event, "task": task_id, "worker": 0, "pid": os.getpid()})

        def check() -> None:
            self._tick()
            if task_id in self._cancelled:
                raise JobCancelled
            if self._stopping:
                raise Stopped

        if self._worker is None:
            from apps.render.worker import Worker

            self._worker = Worker(self._settings)
        self._worker.emit, self._worker.check = emit, check
        end = outcome(self._worker, task_id, payload)
        self._queued = None
        emit(end)

    def cancel(self, task_id: str) -> None:
        self._cancelled.add(task_id)

    def stop(self) -> None:
        self._stopping = True

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def outcome(worker: Any, task_id: str, payload: dict[str, Any]) -> Event:
    """Run one task; the event that ends it. Nothing a job does escapes, so it harms no other."""
    try:
        return {"event": "done", "result": worker.run(task_id, payload)}
    except JobCancelled:
        return {"event": "cancelled"}
    except Stopped:
        return {"event": "stopped"}
    except Exception as error:  # noqa: BLE001  the per-job boundary: every failure is classified
        return {"event": "failed", "fault": classify(error).as_json()}


@dataclass
class _Process:
    """A worker process with its end of the pipe."""

    number: int
    process: Any
    pipe: Connection
    task: str | None = None
    ready: bool = False


class Spawned:
    """One task at a time in each of several worker processes, which die with their parent."""

    def __init__(self, settings: WorkerSettings, workers: int):
        self._settings = settings
        self._count = workers
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[_Process] = []
        self._stillborn = 0
        self._stopping = False

    def start(self, sink: Sink, tick: Callable[[], None]) -> None:
        self._sink = sink

    def free(self) -> int:
        return self._count - sum(p.task is not None for p in self._processes)

    def submit(self, task_id: str, payload: dict[str, Any], **order: Any) -> None:
        """Give a task to a free worker. `order`: `out` and `watch`, as attributes of `Worker`."""
        for process in [p for p in self._processes if p.task is None]:
            if not process.process.is_alive():  # of memory, say, while it waited
                self._bury(process)
        idle = next((p for p in self._processes if p.task is None), None) or self._spawn()
        idle.task = task_id
        try:
            _send(idle.pipe, {**order, "do": "run", "task": task_id, "payload": payload})
        except OSError:
            self._bury(idle)

    def poll(self, seconds: float) -> None:
        pipes = {process.pipe: process for process in self._processes}
        if not pipes:
            time.sleep(seconds)
        for pipe in wait(list(pipes), seconds):
            self._receive(pipes[pipe])  # pyright: ignore[reportArgumentType]

    def cancel(self, task_id: str) -> None:
        self._tell("cancel", task_id)

    def stop(self) -> None:
        self._stopping = True
        self._tell("stop")

    def warm_up(self) -> None:
        """Start a worker before there is work for it."""
        if not self._processes:
            self._spawn()

    def kill(self, task_id: str) -> None:
        """End the process that runs a task, which is then `lost`."""
        for process in self._processes:
            if process.task == task_id:
                process.process.kill()

    def close(self) -> None:
        for process in self._processes:
            process.pipe.close()  # an idle worker ends when its pipe does
        deadline = time.monotonic() + 5
        for process in self._processes:
            if process.task is None:
                process.process.join(max(0.0, deadline - time.monotonic()))
            if process.process.is_alive():
                process.process.kill()
            process.process.join()
        self._processes.clear()

    def _spawn(self) -> _Process:
        numbers = {process.number for process in self._processes}
        number = next(n for n in range(self._count) if n not in numbers)
        ours, theirs = self._context.Pipe()
        child = self._context.Process(
            target=worker_main,
            args=(theirs, replace(self._settings, number=number), os.getpid()),
            daemon=True,
        )
        child.start()
        theirs.close()
        process = _Process(number, child, ours)
        self._processes.append(process)
        return process

    def _receive(self, process: _Process) -> None:
        try:
            event = json.loads(process.pipe.recv_bytes())
        except (EOFError, OSError):
            self._bury(process)
            return
        if event["event"] == "ready":
            process.ready, self._stillborn = True, 0
            return
        event |= {"task": process.task, "worker": process.number, "pid": process.process.pid}
        if event["event"] in ("done", "failed", "stopped", "cancelled"):
            process.task = None
        self._sink(event)

    def _bury(self, process: _Process) -> None:
        """A worker died: its task is lost, the next submit starts another worker."""
        process.pipe.close()
        process.process.join(5)
        code = process.process.exitcode
        self._processes.remove(process)
        self._stillborn += 0 if process.ready else 1
        if process.task is not None:
            why = f"its worker process died ({_cause(code)})"
            event = {"event": "lost", "task": process.task, "worker": process.number}
            self._sink({**event, "fault": {"error_class": "lost", "message": why, "stop": False}})
        if self._stillborn >= MAX_STILLBORN and not self._stopping:
            raise WorkersDie("worker processes die before they are ready; see their output above")

    def _tell(self, what: str, task_id: str | None = None) -> None:
        for process in self._processes:
            if process.task is not None and task_id in (None, process.task):
                try:
                    _send(process.pipe, {"do": what, "task": process.task})
                except OSError:
                    continue  # it is dead; poll will notice


def worker_main(pipe: Connection, settings: WorkerSettings, parent: int) -> None:
    """Body of a worker process: run tasks from the pipe until it closes or the parent dies."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the driver decides
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    from tqdm import tqdm

    from apps.render.worker import Worker

    tqdm.set_lock(threading.RLock())  # else it makes a semaphore that a killed worker leaves behind
    current = ""

    def check() -> None:
        while pipe.poll():
            order = json.loads(pipe.recv_bytes())
            if order["do"] == "stop":
                raise Stopped
            if order["do"] == "cancel" and order["task"] == current:
                raise JobCancelled

    worker = Worker(settings)
    worker.emit, worker.check = lambda event: _send(pipe, event), check
    _send(pipe, {"event": "ready"})
    while True:
        try:
            order = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # nothing to tidy; taking a loaded torch down in order takes seconds
        if order["do"] == "run":
            current = order["task"]
            worker.out = Path(order.get("out", settings.out))
            worker.watch = order.get("watch", False)
            _send(pipe, outcome(worker, current, order["payload"]))


def _die_with(parent: int) -> None:
    """End this process soon after its parent, so that no orphan works in a folder it lost."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _send(pipe: Connection, message: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(message).encode())


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
