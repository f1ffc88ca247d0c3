"""The ledger keeps its promises under any order of calls, across reopening, and when damaged."""

import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from apps.render.ledger import (
    STATES,
    Ledger,
    LedgerCorrupt,
    NewTask,
    integrity_problem,
)

OWNERS = st.sampled_from(["anna", "bert"])


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path / "ledger.sqlite", clock=lambda: 100.0) as opened:
        yield opened


def _new(*ids, **more):
    return [NewTask(i, {"n": i}, position=n, **more) for n, i in enumerate(ids)]


def test_a_task_from_start_to_end(ledger):
    assert ledger.add(_new("a", "b", stages=("denoise", "write"))) == 2
    assert ledger.add(_new("a")) == 0
    task = ledger.lease("anna", 60)
    assert (task.id, task.state, task.attempts, task.lease_until) == ("a", "running", 1, 160.0)
    assert ledger.advance("a", "anna", "denoise")
    assert not ledger.complete("a", "bert", {}), "only the owner may finish a task"
    assert ledger.complete("a", "anna", {"files": ["a.png"]})
    done = ledger.task("a")
    assert (done.state, done.stage, done.result) == ("done", "denoise", {"files": ["a.png"]})
    assert not ledger.complete("a", "anna", {}), "done is done"
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {"pending": 1, "done": 1}


def test_other_kinds_of_task(ledger):
    ledger.add([NewTask("s", {"budget": 10}, kind="search"), NewTask("e", {}, kind="evaluate")])
    assert {task.kind for task in ledger.tasks()} == {"search", "evaluate"}
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add([NewTask("x", {}, kind="cook")])


def test_least_tried_first_then_the_loaded_model(ledger):
    ledger.add(
        [NewTask("a", {}, 0, bucket="m1"), NewTask("b", {}, 1, bucket="m2"),
         NewTask("c", {}, 2, bucket="m2")]
    )  # fmt: skip
    assert ledger.lease("anna", 60, "m2").id == "b"
    ledger.release("b", "anna", refund=False)
    assert [ledger.lease("anna", 60, "m2").id for _ in range(3)] == ["c", "a", "b"]


def test_leases_run_out(tmp_path):
    now = [0.0]
    with Ledger.open(tmp_path / "l", clock=lambda: now[0]) as ledger:
        ledger.add(_new("a", "b"))
        ledger.lease("anna", 60)
        ledger.lease("bert", 60)
        now[0] = 50.0
        assert ledger.heartbeat("anna", 60) == 1
        now[0] = 70.0
        assert ledger.expire() == 1
        assert (ledger.task("a").state, ledger.task("b").state) == ("running", "pending")
        assert not ledger.complete("b", "bert", {}), "whoever lost the lease cannot finish"
        assert ledger.expire(everyone=True) == 1


def test_cancel(ledger):
    ledger.add(_new("a", "b", "c"))
    ledger.lease("anna", 60)
    assert ledger.cancel(["a", "b"]) == (1, 1)
    assert ledger.cancel_requests("anna") == ["a"]
    assert ledger.cancelled("a", "anna")
    assert ledger.counts()["cancelled"] == 2
    assert ledger.cancel() == (1, 0)


def test_a_cancel_of_a_task_whose_owner_died(ledger):
    ledger.add(_new("a"))
    ledger.lease("anna", 60)
    ledger.cancel(["a"])
    ledger.expire(everyone=True)
    assert ledger.task("a").state == "cancelled"


@pytest.mark.parametrize("end", ["fails", "is stopped"])
def test_a_request_to_cancel_outlives_a_task_that(ledger, end):
    ledger.add(_new("a"))
    ledger.lease("w", 60)
    ledger.cancel(["a"])
    if end == "fails":
        ledger.fail("a", "w", "lost", "its worker process died", retry=True)
    else:
        ledger.release("a", "w", refund=True)
    assert ledger.task("a").state == "cancelled"
    assert ledger.lease("w", 60) is None


def test_damage_is_detected(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        ledger.add(_new(*(str(i) for i in range(500))))
    whole = path.read_bytes()
    assert integrity_problem(path) is None
    for damaged in (
        b"no database at all, just some text" * 100,
        whole[:4096] + b"\xa5" * 4096 + whole[8192:],
        whole[: len(whole) // 2],
    ):
        path.write_bytes(damaged)
        with pytest.raises(LedgerCorrupt, match=r"ledger\.sqlite is damaged"):
            Ledger.open(path)
        assert integrity_problem(path) is not None


def test_a_foreign_database_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(LedgerCorrupt, match="has version 7"):
        Ledger.open(path)


class LedgerMachine(RuleBasedStateMachine):
    """Random calls by two owners on one file, against a model in memory."""

    ids = Bundle("ids")

    @initialize()
    def open(self):
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0.0
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.ledger = Ledger.open(self.path, clock=lambda: self.now)
        self.state: dict[str, str] = {}
        self.owner: dict[str, tuple[str, float]] = {}
        self.finished: dict[str, int] = {}

    @rule(target=ids, number=st.integers(0, 5))
    def add(self, number):
        task_id = f"t{number}"
        added = self.ledger.add([NewTask(task_id, {"n": number}, number)])
        assert added == (task_id not in self.state)
        self.state.setdefault(task_id, "pending")
        return task_id

    @rule(owner=OWNERS, seconds=st.floats(1, 50))
    def lease(self, owner, seconds):
        task = self.ledger.lease(owner, seconds)
        if task is None:
            assert "pending" not in self.state.values()
            return
        assert self.state[task.id] == "pending", "leased although it was not free"
        self.state[task.id] = "running"
        self.owner[task.id] = (owner, self.now + seconds)

    @rule(task_id=ids, owner=OWNERS)
    def complete(self, task_id, owner):
        done = self.ledger.complete(task_id, owner, {"by": owner})
        assert done == self._holds(task_id, owner)
        if done:
            self.state[task_id] = "done"
            self.finished[task_id] = self.finished.get(task_id, 0) + 1
            assert self.finished[task_id] == 1, "done twice"

    @rule(task_id=ids, owner=OWNERS, retry=st.booleans())
    def fail(self, task_id, owner, retry):
        back = "cancelled" if self.ledger.task(task_id).cancel_asked else "pending"
        failed = self.ledger.fail(task_id, owner, "unknown", "why", retry=retry)
        assert failed == self._holds(task_id, owner)
        if failed:
            self.state[task_id] = back if retry else "failed"

    @rule(task_id=ids, owner=OWNERS, refund=st.booleans())
    def release(self, task_id, owner, refund):
        back = "cancelled" if self.ledger.task(task_id).cancel_asked else "pending"
        if self.ledger.release(task_id, owner, refund=refund):
            assert self._holds(task_id, owner)
            self.state[task_id] = back

    @rule(owner=OWNERS, seconds=st.floats(1, 50))
    def heartbeat(self, owner, seconds):
        held = [i for i in self.state if self._holds(i, owner)]
        assert self.ledger.heartbeat(owner, seconds) == len(held)
        for task_id in held:
            self.owner[task_id] = (owner, self.now + seconds)

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(everyone=st.booleans())
    def expire(self, everyone):
        stale = [
            i for i, s in self.state.items()
            if s == "running" and (everyone or self.owner[i][1] < self.now)
        ]  # fmt: skip
        asked = {i for i in stale if self.ledger.task(i).cancel_asked}
        assert self.ledger.expire(everyone=everyone) == len(stale)
        for task_id in stale:
            self.state[task_id] = "cancelled" if task_id in asked else "pending"

    @rule(task_id=ids)
    def cancel(self, task_id):
        now, asked = self.ledger.cancel([task_id])
        assert (now, asked) == (
            int(self.state[task_id] == "pending"), int(self.state[task_id] == "running"),
        )  # fmt: skip
        if now:
            self.state[task_id] = "cancelled"

    @rule(task_id=consumes(ids))
    def retry(self, task_id):
        moved = self.ledger.requeue("failed", "cancelled", task_ids=[task_id])
        assert moved == (self.state[task_id] in ("failed", "cancelled"))
        if moved:
            self.state[task_id] = "pending"

    @rule(task_id=ids)
    def adopt(self, task_id):
        adopted = self.ledger.adopt(task_id, {"files": []})
        assert adopted == (self.state[task_id] != "done")
        if adopted:
            self.state[task_id] = "done"
            self.finished[task_id] = self.finished.get(task_id, 0) + 1

    @rule()
    def reopen(self):
        self.ledger.close()
        self.ledger = Ledger.open(self.path, clock=lambda: self.now)

    @invariant()
    def ledger_and_model_agree(self):
        if hasattr(self, "ledger"):
            assert {task.id: task.state for task in self.ledger.tasks()} == self.state
            assert sum(self.ledger.counts().values()) == len(self.state)

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def _holds(self, task_id, owner):
        return self.state[task_id] == "running" and self.owner[task_id][0] == owner


LedgerMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def test_looking_changes_nothing_and_is_paged(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        ledger.add(NewTask(f"t{i}", {"i": i}, i) for i in range(5))
        with Ledger.look(path) as looking:
            assert looking.counts()["pending"] == 5
            assert [t.id for t in looking.tasks("pending", first=1, count=2)] == ["t1", "t2"]
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                looking.cancel()
    with pytest.raises(sqlite3.OperationalError):
        Ledger.look(tmp_path / "none.sqlite").counts()
