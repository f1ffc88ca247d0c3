"""What is on disk decides: ledger, plan and files are made to agree."""

import numpy as np
import pytest

from apps.render.ledger import Ledger, NewTask
from apps.render.outputs import commit, encode_all
from apps.render.plan import PlannedTask
from apps.render.recovery import LEDGER_FILE, open_ledger, recover
from apps.render.worker_settings import WORK_FOLDER

IDS = {name: digit * 64 for name, digit in zip("abcd", "1234", strict=True)}


def _task(name):
    payload = {"stem": name, "model_revision": "m", "recipe": None}
    return PlannedTask(IDS[name], name, payload)


def _write(folder, name, identity=None):
    record = {"identity": identity or IDS[name], "timings": {}}
    frames = [np.zeros((4, 4, 3), np.uint8)]
    media = encode_all(frames, stem=name, kind="png", fps=8, record=None)
    commit(folder, name, media, record)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path / LEDGER_FILE) as opened:
        yield opened


def _states(ledger):
    return {task.payload["stem"]: task.state for task in ledger.tasks()}


def test_a_fresh_folder(tmp_path, ledger):
    found = recover(tmp_path, ledger, [_task("a"), _task("b")])
    assert found.lines() == []
    assert _states(ledger) == {"a": "pending", "b": "pending"}
    assert (tmp_path / WORK_FOLDER).is_dir()


def test_everything_at_once(tmp_path, ledger):
    """a: committed, but the ledger died before it knew. b: done, files gone. c: was running.
    d: done by an older edit of the job, whose sidecar is still there."""
    tasks = [_task(name) for name in "abcd"]
    ledger.add([NewTask(task.id, task.payload, n) for n, task in enumerate(tasks)])
    assert ledger.lease("dead", 60).id == IDS["a"]
    ledger.lease("dead", 60)
    ledger.complete(IDS["b"], "dead", {"files": ["b.png"]})
    assert ledger.lease("dead", 60).id == IDS["c"]
    _write(tmp_path, "a")
    _write(tmp_path, "d", identity="9" * 64)
    work = tmp_path / WORK_FOLDER
    work.mkdir()
    for name in ("a", "c"):
        (work / f"{IDS[name]}.safetensors").write_bytes(b"x")
    (work / ("8" * 64 + ".safetensors")).write_bytes(b"x")
    (tmp_path / ".a.png.0123abcd.part").write_bytes(b"x")

    found = recover(tmp_path, ledger, tasks)

    assert _states(ledger) == {"a": "done", "b": "pending", "c": "pending", "d": "pending"}
    counted = (found.interrupted, found.adopted, found.missing, found.temporaries)
    assert counted == (2, 1, 1, 1)
    assert [path.name for path in work.iterdir()] == [f"{IDS['c']}.safetensors"], "only c's count"
    assert len(found.lines()) == 3
    assert recover(tmp_path, ledger, tasks).lines() == [], "nothing is left to put right"


def test_a_task_that_left_the_plan_and_came_back(tmp_path, ledger):
    recover(tmp_path, ledger, [_task("a")])
    recover(tmp_path, ledger, [_task("b")])
    assert _states(ledger) == {"a": "superseded", "b": "pending"}
    recover(tmp_path, ledger, [_task("a")])
    assert _states(ledger) == {"a": "pending", "b": "superseded"}


def test_a_cancelled_task_stays_cancelled(tmp_path, ledger):
    tasks = [_task("a")]
    recover(tmp_path, ledger, tasks)
    ledger.cancel()
    recover(tmp_path, ledger, tasks)
    assert _states(ledger) == {"a": "cancelled"}


def test_a_damaged_ledger_is_kept_with_its_journal(tmp_path):
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / (LEDGER_FILE + suffix)).write_bytes(b"junk" * 2000)
    ledger, aside = open_ledger(tmp_path)
    with ledger:
        assert ledger.counts()["done"] == 0
    assert (tmp_path / aside).read_bytes() == b"junk" * 2000
    second, other = open_ledger(tmp_path)
    second.close()
    assert other is None
