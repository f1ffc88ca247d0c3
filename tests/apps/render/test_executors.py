"""Worker processes: the same pixels, and a dead worker costs nobody else anything."""

import json
import os
import signal

import pytest

from apps.render.driver import RunOptions, submit
from apps.render.executors import InProcess, Spawned, outcome
from apps.render.faults import JobCancelled, Stopped, WorkersDie
from apps.render.ledger import Ledger
from apps.render.progress import Silent
from apps.render.worker_settings import WorkerSettings


def _hashes(folder):
    return {
        p.stem: json.loads(p.read_text())["files"][0]["frames_sha256"]
        for p in folder.glob("*.json")
    }


class KillOnce(Silent):
    """Kills the first worker that reports a step of `name`."""

    def __init__(self, name):
        self.name, self.workers = name, set()

    def event(self, event, task):
        self.workers.add(event.get("worker"))
        if event["event"] == "step" and task.payload["stem"] == self.name:
            self.name = None
            os.kill(event["pid"], signal.SIGKILL)


def _children():
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children()]


def test_two_workers_one_of_which_dies(tmp_path, planned, rows):
    jobs = rows(5)
    for job in jobs:
        job["inputs"]["num_inference_steps"] = 8
    assert submit(tmp_path / "alone", planned(jobs), RunOptions()).exit_code == 0
    watch = KillOnce("job1")
    summary = submit(tmp_path / "out", planned(jobs[::-1]), RunOptions(workers=2), watch)
    assert summary.exit_code == 0
    assert watch.name is None, "nobody was killed: the test shows nothing"
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "alone")
    with Ledger.open(tmp_path / "out" / "ledger.sqlite") as ledger:
        attempts = {task.payload["stem"]: task.attempts for task in ledger.tasks()}
    assert attempts == dict.fromkeys(attempts, 1) | {"job1": 2}
    assert {0, 1} <= watch.workers
    assert _children() == []


def test_workers_that_die_at_birth_stop_the_render(tmp_path, monkeypatch):
    lost = []
    executor = Spawned(WorkerSettings(str(tmp_path)), 1)
    monkeypatch.setattr("apps.render.executors.worker_main", _die)
    executor.start(lost.append, lambda: None)
    with pytest.raises(WorkersDie, match="die before they are ready"):
        _submit_again_and_again(executor)
    assert [event["fault"]["message"] for event in lost] == [
        "its worker process died (exit code 3)"
    ] * 3
    executor.close()


def test_a_worker_that_died_idle_is_given_no_task(tmp_path, monkeypatch):
    events = []
    executor = Spawned(WorkerSettings(str(tmp_path)), 1)
    executor.start(events.append, lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr("apps.render.executors.worker_main", _die)
        executor.warm_up()
    (dead,) = executor._processes
    dead.process.join(10)
    monkeypatch.setattr("apps.render.executors.worker_main", _serve)
    executor.submit("t", {})
    while executor.free() == 0:
        executor.poll(1.0)
    assert [event["event"] for event in events] == ["done"]
    executor.close()


def _serve(pipe, *_):
    pipe.recv_bytes()
    pipe.send_bytes(json.dumps({"event": "done"}).encode())


def _submit_again_and_again(executor):
    for _ in range(10):
        executor.submit("t", {})
        while executor.free() == 0:
            executor.poll(1.0)


def _die(*_):
    os._exit(3)


class Fake:
    def __init__(self, error=None):
        self.error = error

    def run(self, task_id, payload):
        if self.error:
            raise self.error
        return {"files": []}


def test_every_end_is_one_event():
    assert outcome(Fake(), "t", {}) == {"event": "done", "result": {"files": []}}
    assert outcome(Fake(Stopped()), "t", {}) == {"event": "stopped"}
    assert outcome(Fake(JobCancelled()), "t", {}) == {"event": "cancelled"}
    failed = outcome(Fake(MemoryError()), "t", {})
    assert failed["fault"]["error_class"] == "memory"
    with pytest.raises(KeyboardInterrupt):
        outcome(Fake(KeyboardInterrupt()), "t", {})


def test_in_process_takes_one_task():
    executor = InProcess(WorkerSettings("."))
    assert executor.free() == 1
    executor.submit("t", {})
    assert executor.free() == 0
