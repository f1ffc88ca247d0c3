"""The ledger: which task is in which state, kept in one SQLite file that survives kill -9.

Generic: rendering, search, evaluation and calibration are task kinds with a JSON payload each.
WAL with synchronous=FULL: what a method returned as done is on disk. Every change of state is one
BEGIN IMMEDIATE transaction, and only the owner of a live lease may finish a task, so no task is
ever held, or finished, twice. One host only (SQLite's locks do not work over NFS).

    pending -> running -> done | failed | cancelled      failed -> pending (retry)
       ^---------'  released, or its lease ran out       any    -> superseded (job was edited)
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("render", "search", "evaluate", "calibrate")
STATES = ("pending", "running", "done", "failed", "cancelled", "superseded")
VERSION = 1

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS task (
  id TEXT PRIMARY KEY,
  kind TEXT NOT NULL CHECK (kind IN {KINDS}),
  bucket TEXT NOT NULL,
  position INTEGER NOT NULL,
  payload TEXT NOT NULL,
  stages TEXT NOT NULL,
  stage TEXT,
  state TEXT NOT NULL CHECK (state IN {STATES}),
  attempts INTEGER NOT NULL CHECK (attempts >= 0),
  lease_owner TEXT,
  lease_until REAL,
  cancel_asked INTEGER NOT NULL DEFAULT 0,
  error_class TEXT,
  error TEXT,
  result TEXT,
  updated REAL NOT NULL,
  CHECK ((state = 'running') = (lease_owner IS NOT NULL)),
  CHECK ((state = 'running') = (lease_until IS NOT NULL)),
  CHECK ((state = 'done') = (result IS NOT NULL))
) STRICT;
CREATE INDEX IF NOT EXISTS task_in_order ON task (state, attempts, position, id);
CREATE INDEX IF NOT EXISTS task_in_bucket ON task (state, attempts, bucket, position, id);
"""
_BACK = "state = CASE cancel_asked WHEN 1 THEN 'cancelled' ELSE 'pending' END"
_FREE = "lease_owner = NULL, lease_until = NULL, cancel_asked = 0"


class LedgerCorrupt(Exception):
    """The ledger file is damaged, or not one of ours."""


@dataclass(frozen=True)
class NewTask:
    """A task to be added. `bucket` groups tasks that share a loaded model and recipe."""

    id: str
    payload: dict[str, Any]
    position: int = 0
    kind: str = "render"
    bucket: str = ""
    stages: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """A row of the ledger. `stage` is the last stage finished, `attempts` counts leases."""

    id: str
    kind: str
    bucket: str
    position: int
    payload: dict[str, Any]
    stages: tuple[str, ...]
    stage: str | None
    state: str
    attempts: int
    lease_owner: str | None
    lease_until: float | None
    cancel_asked: bool
    error_class: str | None
    error: str | None
    result: dict[str, Any] | None
    updated: float = field(compare=False)


class Ledger:
    """An open ledger. Use `Ledger.open`; not to be shared between threads.

    Args of the methods: `owner` names who holds a lease; `now` comes from `clock` (seconds).
    Errors: LedgerCorrupt when the file is damaged; sqlite3.OperationalError when the disk is full.
    """

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]):
        self._db = connection
        self._clock = clock

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Ledger:
        """Open or create the ledger at `path`, checking that it is whole."""
        connection = sqlite3.connect(path, timeout=30, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise LedgerCorrupt(f"{path.name} is damaged: {verdict}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise LedgerCorrupt(f"{path.name} has version {version}, not {VERSION}")
            if version == 0:
                connection.executescript(_SCHEMA + f"PRAGMA user_version = {VERSION};")
            connection.execute("SELECT count(*), max(result) FROM task").fetchone()
        except LedgerCorrupt:
            connection.close()
            raise
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            raise LedgerCorrupt(f"{path.name} is damaged: {error}") from error
        return cls(connection, clock)

    @classmethod
    def look(cls, path: Path) -> Ledger:
        """Open an existing ledger to read only, without checking it: quick, however large it is.

        In a folder that cannot be written SQLite cannot share a ledger; one that nobody has open
        needs no sharing.
        """
        uri = f"{path.resolve().as_uri()}?mode=ro"
        if not is_writable(path.parent) and not path.with_name(f"{path.name}-wal").exists():
            uri += "&immutable=1"
        connection = sqlite3.connect(uri, uri=True, timeout=5)
        connection.row_factory = sqlite3.Row
        return cls(connection, time.time)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # adding and reading

    def add(self, tasks: Iterable[NewTask]) -> int:
        """Add the tasks whose id is new, all pending; return how many were new.

        Of one that is there only the payload changes: the same work, whose files may have moved.
        """
        now = self._clock()
        rows = [
            (t.id, t.kind, t.bucket, t.position, _dump(t.payload), _dump(list(t.stages)), now)
            for t in tasks
        ]
        with self._change() as db:
            before = self._count()
            db.executemany(
                "INSERT INTO task (id, kind, bucket, position, payload, stages, state, attempts,"
                " updated) VALUES (?, ?, ?, ?, ?, ?, 'pending', 0, ?)"
                " ON CONFLICT (id) DO UPDATE SET payload = excluded.payload",
                rows,
            )
            return self._count() - before

    def _count(self) -> int:
        return self._db.execute("SELECT count(*) FROM task").fetchone()[0]

    def task(self, task_id: str) -> Task | None:
        row = self._db.execute("SELECT * FROM task WHERE id = ?", (task_id,)).fetchone()
        return None if row is None else _task(row)

    def tasks(self, *states: str, first: int = 0, count: int = -1) -> list[Task]:
        """Tasks in the given states (all states when none is given), in file order.

        At most `count` from the `first` on; by default all.
        """
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        query = f"SELECT * FROM task {where} ORDER BY position, id LIMIT ? OFFSET ?"
        return [_task(row) for row in self._db.execute(query, (*states, count, first))]

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state; every state is a key."""
        rows = self._db.execute("SELECT state, count(*) AS n FROM task GROUP BY state").fetchall()
        return dict.fromkeys(STATES, 0) | {row["state"]: row["n"] for row in rows}

    # leases

    def lease(self, owner: str, seconds: float, prefer_bucket: str | None = None) -> Task | None:
        """Hold the next pending task for `seconds`; None when nothing is pending.

        Tasks tried least often come first, so one that kills its worker cannot block the rest.
        """
        now = self._clock()
        with self._change() as db:
            task_id = _next(db, prefer_bucket)
            if task_id is None:
                return None
            db.execute(
                "UPDATE task SET state = 'running', attempts = attempts + 1, lease_owner = ?,"
                " lease_until = ?, cancel_asked = 0, updated = ? WHERE id = ?",
                (owner, now + seconds, now, task_id),
            )
        return self.task(task_id)

    def heartbeat(self, owner: str, seconds: float) -> int:
        """Prolong all leases of `owner`; return how many it still holds."""
        now = self._clock()
        with self._change() as db:
            return db.execute(
                "UPDATE task SET lease_until = ?, updated = ?"
                " WHERE state = 'running' AND lease_owner = ?",
                (now + seconds, now, owner),
            ).rowcount

    def release(self, task_id: str, owner: str, *, refund: bool) -> bool:
        """Give a task back unfinished; with `refund` the attempt does not count.

        One that was asked to be cancelled meanwhile becomes cancelled.
        """
        return self._leave(task_id, owner, f"{_BACK}, attempts = max(0, attempts - {int(refund)})")

    def expire(self, *, everyone: bool = False) -> int:
        """Return tasks whose lease ran out (or, with `everyone`, all leased ones) to pending.

        `everyone` is for who holds the folder's lock: then no other owner can be alive.
        A task that was asked to be cancelled meanwhile becomes cancelled.
        """
        now = self._clock()
        with self._change() as db:
            return db.execute(
                f"UPDATE task SET {_BACK}, {_FREE}, updated = ?"
                " WHERE state = 'running' AND (? OR lease_until < ?)",
                (now, everyone, now),
            ).rowcount

    # progress and ends

    def advance(self, task_id: str, owner: str, stage: str) -> bool:
        """Note the last finished stage; False when `owner` no longer holds the task."""
        return self._update(
            "stage = ?, updated = ? WHERE id = ? AND state = 'running' AND lease_owner = ?",
            (stage, self._clock(), task_id, owner),
        )

    def complete(self, task_id: str, owner: str, result: dict[str, Any]) -> bool:
        """Finish a task; False (and no change) when `owner` no longer holds it."""
        return self._leave(
            task_id, owner, "state = 'done', error_class = NULL, error = NULL, result = ?",
            _dump(result),
        )  # fmt: skip

    def fail(self, task_id: str, owner: str, error_class: str, error: str, *, retry: bool) -> bool:
        """Record a failure; with `retry` the task is given back as by `release`, else failed."""
        state = _BACK if retry else "state = 'failed'"
        return self._leave(
            task_id, owner, f"{state}, error_class = ?, error = ?", error_class, error
        )

    def cancelled(self, task_id: str, owner: str) -> bool:
        """The owner confirms that it stopped a task that was asked to be cancelled."""
        return self._leave(task_id, owner, "state = 'cancelled'")

    # what a person asks for

    def cancel(self, task_ids: Sequence[str] | None = None) -> tuple[int, int]:
        """Cancel pending tasks, ask running ones to stop (all when None); (now, asked)."""
        ids, now = self._ids(task_ids), self._clock()
        with self._change() as db:
            at_once = db.executemany(
                "UPDATE task SET state = 'cancelled', updated = ?"
                " WHERE id = ? AND state = 'pending'",
                [(now, task_id) for task_id in ids],
            ).rowcount
            asked = db.executemany(
                "UPDATE task SET cancel_asked = 1, updated = ? WHERE id = ? AND state = 'running'",
                [(now, task_id) for task_id in ids],
            ).rowcount
        return max(at_once, 0), max(asked, 0)

    def cancel_requests(self, owner: str) -> list[str]:
        """Ids of the tasks of `owner` that a person asked to stop."""
        rows = self._db.execute(
            "SELECT id FROM task WHERE state = 'running' AND cancel_asked AND lease_owner = ?",
            (owner,),
        )
        return [row["id"] for row in rows]

    def requeue(self, *states: str, task_ids: Sequence[str] | None = None) -> int:
        """Make tasks in `states` pending again with a fresh count of attempts."""
        wanted = set(states) - {"pending", "running"}
        ids = {t.id for t in self.tasks(*wanted)} if wanted else set()
        ids &= set(self._ids(task_ids))
        with self._change() as db:
            db.executemany(
                "UPDATE task SET state = 'pending', attempts = 0, stage = NULL, result = NULL,"
                " error_class = NULL, error = NULL, updated = ? WHERE id = ?",
                [(self._clock(), task_id) for task_id in ids],
            )
        return len(ids)

    def supersede(self, task_ids: Sequence[str]) -> None:
        """Retire tasks whose job was edited: a newer task writes to the same place."""
        with self._change() as db:
            db.executemany(
                f"UPDATE task SET state = 'superseded', {_FREE}, result = NULL, updated = ?"
                " WHERE id = ?",
                [(self._clock(), task_id) for task_id in task_ids],
            )

    def adopt(self, task_id: str, result: dict[str, Any]) -> bool:
        """Mark an unfinished task done: its output turned out to be complete on disk."""
        return self._update(
            f"state = 'done', {_FREE}, error_class = NULL, error = NULL, result = ?, updated = ?"
            " WHERE id = ? AND state != 'done'",
            (_dump(result), self._clock(), task_id),
        )

    # inside

    def _ids(self, task_ids: Sequence[str] | None) -> list[str]:
        if task_ids is not None:
            return list(task_ids)
        return [row["id"] for row in self._db.execute("SELECT id FROM task")]

    def _leave(self, task_id: str, owner: str, change: str, *values: Any) -> bool:
        return self._update(
            f"{change}, {_FREE}, updated = ?"
            " WHERE id = ? AND state = 'running' AND lease_owner = ?",
            (*values, self._clock(), task_id, owner),
        )

    def _update(self, change: str, values: tuple[Any, ...]) -> bool:
        with self._change() as db:
            return db.execute(f"UPDATE task SET {change}", values).rowcount > 0

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder: by its rights and its file system."""
    return os.access(folder, os.W_OK)


def integrity_problem(path: Path) -> str | None:
    """Read every page of the ledger; the first thing wrong in words, None when it is whole."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if verdict == "ok" else verdict


def _next(db: sqlite3.Connection, prefer_bucket: str | None) -> str | None:
    """The pending task to do next; each query is answered from an index, however many wait."""
    fewest = db.execute("SELECT min(attempts) FROM task WHERE state = 'pending'").fetchone()[0]
    waiting = "SELECT id FROM task WHERE state = 'pending' AND attempts = ?"
    order = " ORDER BY position, id LIMIT 1"
    row = db.execute(waiting + " AND bucket = ?" + order, (fewest, prefer_bucket)).fetchone()
    row = row or db.execute(waiting + order, (fewest,)).fetchone()
    return None if row is None else row["id"]


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _task(row: sqlite3.Row) -> Task:
    values = dict(row)
    values["payload"] = json.loads(values["payload"])
    values["stages"] = tuple(json.loads(values["stages"]))
    values["result"] = None if values["result"] is None else json.loads(values["result"])
    values["cancel_asked"] = bool(values["cancel_asked"])
    return Task(**values)
