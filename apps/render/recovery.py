"""Bring a folder back to a consistent state before anything is rendered in it.

Runs under the folder's lock, so nobody else is alive in it: every lease is stale, every temporary
file is litter. What counts is on disk: a task is done if, and only if, its sidecar and the files it
lists are there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel.files import clear_temporaries, remove
from apps.render.ledger import Ledger, LedgerCorrupt, NewTask
from apps.render.outputs import is_complete, read_sidecar, result_of
from apps.render.plan import STAGES, PlannedTask
from apps.render.worker_settings import WORK_FOLDER

LEDGER_FILE = "ledger.sqlite"


@dataclass
class Recovered:
    """What was found and put right."""

    corrupt: str | None = None  # name under which a damaged ledger was kept
    interrupted: int = 0  # tasks that were running when their renderer died
    adopted: int = 0  # finished on disk, but not in the ledger
    missing: int = 0  # done in the ledger, but their files are gone
    temporaries: int = 0

    def lines(self) -> list[str]:
        """What a person should know, one line each."""
        told = []
        if self.corrupt:
            told.append(f"the ledger was damaged: kept as {self.corrupt}, rebuilt from the outputs")
        if self.interrupted:
            told.append(f"{self.interrupted} job(s) were interrupted and will be continued")
        if self.adopted:
            told.append(f"{self.adopted} job(s) turned out to be finished")
        if self.missing:
            told.append(f"{self.missing} finished job(s) lack their files and will be made again")
        return told


def open_ledger(folder: Path) -> tuple[Ledger, str | None]:
    """Open the folder's ledger; a damaged one is kept aside under the returned name."""
    path = folder / LEDGER_FILE
    try:
        return Ledger.open(path), None
    except LedgerCorrupt:
        aside = f"ledger.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(folder / f"{aside}.sqlite{suffix}")
        return Ledger.open(path), f"{aside}.sqlite"


def recover(folder: Path, ledger: Ledger, tasks: Sequence[PlannedTask]) -> Recovered:
    """Make ledger, plan and files agree. `tasks` is the whole plan of the folder."""
    found = Recovered(temporaries=_clear(folder))
    found.interrupted = ledger.expire(everyone=True)
    planned = {task.id: task for task in tasks}
    states = {task.id: task.state for task in ledger.tasks()}
    ledger.supersede([i for i, s in states.items() if i not in planned and s != "superseded"])
    back = [i for i, state in states.items() if i in planned and state == "superseded"]
    ledger.requeue("superseded", task_ids=back)
    ledger.add(
        NewTask(task.id, task.payload, position, task.kind, task.bucket, _stages(task))
        for position, task in enumerate(tasks)
    )
    for task in tasks:
        content = read_sidecar(folder / f"{task.stem}.json")
        finished = content is not None and content["identity"] == task.id
        finished = finished and is_complete(folder, content or {})
        if finished and content is not None and states.get(task.id) != "done":
            found.adopted += ledger.adopt(task.id, result_of(content))
        elif not finished and states.get(task.id) == "done":
            found.missing += ledger.requeue("done", task_ids=[task.id])
    _clear_latents(folder, {task.id for task in ledger.tasks("pending", "failed", "cancelled")})
    return found


def _stages(task: PlannedTask) -> tuple[str, ...]:
    return STAGES if task.kind == "render" else ()


def _clear(folder: Path) -> int:
    work = folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    return clear_temporaries(folder) + clear_temporaries(work)


def _clear_latents(folder: Path, wanted: set[str]) -> None:
    for path in (folder / WORK_FOLDER).glob("*.safetensors"):
        if path.stem not in wanted:
            remove(path)
    for path in (folder / WORK_FOLDER).glob("*.search"):
        if path.stem not in wanted:
            shutil.rmtree(path, ignore_errors=True)
