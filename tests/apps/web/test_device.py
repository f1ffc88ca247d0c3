"""One worker, whoever asks: order, cancelling at once, and a worker that is never ready again."""

import queue
import threading

import pytest

from apps.web.device import FIRST, GRACE, LATER, Device, OnDevice, Work

PAYLOAD = {"model": "m", "model_revision": "r", "dtype": "float32", "device": "cpu"}


class Acted:
    """The executor's part, played: a task runs until `release`, or until it is asked to end.

    deaf: it does not hear that it is asked, as in a step that takes minutes.
    """

    def __init__(self, deaf=False):
        self.deaf, self.ran, self.killed = deaf, [], []
        self.events = queue.SimpleQueue()

    def start(self, sink, tick):
        self.sink = sink

    def warm_up(self): ...

    def close(self): ...

    def submit(self, task_id, payload, **order):
        self.ran.append(task_id)

    def poll(self, seconds):
        try:
            self.sink(self.events.get(timeout=seconds))
        except queue.Empty:
            return

    def release(self, task_id):
        self.events.put({"event": "done", "task": task_id, "result": {}})

    def cancel(self, task_id):
        if not self.deaf:
            self.events.put({"event": "cancelled", "task": task_id})

    def kill(self, task_id):
        if task_id not in self.killed:
            self.killed.append(task_id)
            self.events.put({"event": "lost", "task": task_id, "fault": {"message": "died"}})


@pytest.fixture
def running(tmp_path):
    """`running(acted)`: a started device, and `work(name, turn)` that gives (work, its events)."""
    devices = []

    def make(acted):
        device = Device(acted)
        devices.append(device)
        device.start()

        def work(name, turn=FIRST, payload=None, **more):
            events = queue.Queue()
            one = Work(name, PAYLOAD | (payload or {}), tmp_path, events.put, turn, **more)
            device.submit(one)
            return one, events

        return device, work

    yield make
    for device in devices:
        device.close()


def _until(events, *kinds):
    seen = []
    while not seen or seen[-1] not in kinds:
        seen.append(events.get(timeout=10)["event"])
    return seen


def test_a_person_goes_before_a_batch(running):
    acted = Acted()
    device, work = running(acted)
    _, first = work("running", LATER)
    _until(first, "start")
    works = [work("batch", LATER), work("person", FIRST), work("second", FIRST)]
    assert [device.ahead_of(one) for one, _ in works] == [3, 1, 2]
    for name in ("running", "person", "second", "batch"):
        acted.release(name)
        _until({"running": first, "batch": works[0][1], "person": works[1][1],
                "second": works[2][1]}[name], "done")  # fmt: skip
    assert acted.ran == ["running", "person", "second", "batch"]


def test_what_waits_is_cancelled_while_another_runs(running):
    acted = Acted()
    device, work = running(acted)
    _, first = work("running")
    _until(first, "start")
    waiting, events = work("waiting")
    device.end(waiting, "cancelled")
    assert _until(events, "cancelled") == ["cancelled"]
    acted.release("running")
    _until(first, "done")
    assert acted.ran == ["running"]


def test_a_folder_that_cannot_be_made_ends_its_own_work_only(running, tmp_path):
    acted = Acted()
    device, work = running(acted)
    (tmp_path / "file").touch()
    lost = queue.Queue()
    device.submit(Work("lost", PAYLOAD, tmp_path / "file" / "create", lost.put))
    assert lost.get(timeout=10)["event"] == "start"
    end = lost.get(timeout=10)
    assert end["event"] == "failed"
    assert "Not a directory" in end["fault"]["message"]
    _, events = work("next")
    _until(events, "start")
    acted.release("next")
    _until(events, "done")
    assert acted.ran == ["next"]


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
@pytest.mark.parametrize("deaf", [False, True], ids=["between steps", "within a long step"])
def test_what_runs_ends_as_asked(running, how, deaf):
    acted = Acted(deaf)
    device, work = running(acted)
    one, events = work("slow")
    _until(events, "start")
    device.end(one, how)
    assert _until(events, how) == [how], "a killed worker is no failure of who asked for it"
    assert bool(acted.killed) == deaf
    _, next_one = work("next")
    _until(next_one, "start")
    acted.release("next")
    _until(next_one, "done")
    assert GRACE <= 2, "at once, for a person"


def test_a_loaded_model_needs_no_warm_up(running):
    acted = Acted()
    _, work = running(acted)
    _, events = work("first", warm_up=True)
    acted.release("first")
    _until(events, "done")
    _, events = work("again", warm_up=True)
    assert _until(events, "skipped", "start") == ["skipped"]
    _, events = work("dies")
    _until(events, "start")
    acted.kill("dies")
    _until(events, "lost")
    _, events = work("third", warm_up=True)
    _until(events, "start")
    acted.release("third")
    _until(events, "done")
    assert acted.ran == ["first", "dies", "third"]


def test_each_recipe_is_warmed_up_once_for_a_loaded_model(running):
    acted = Acted()
    _, work = running(acted)

    def outcome(name, **payload):
        _, events = work(name, payload=payload, warm_up=True)
        if _until(events, "skipped", "start") == ["skipped"]:
            return "skipped"
        acted.release(name)
        _until(events, "done")
        return "ran"

    assert outcome("plain") == "ran"
    assert outcome("a", recipe_sha256="a") == "ran"
    assert [outcome(str(i), recipe_sha256=sha) for i, sha in enumerate((None, "a"))] == [
        "skipped", "skipped",
    ]  # fmt: skip
    assert outcome("look", kind="evaluate", model="n") == "ran"
    assert outcome("after", recipe_sha256="a") == "ran", "another model was in between"


def test_a_batch_that_is_stopped_takes_no_other_task(running, tmp_path):
    acted = Acted()
    device, _ = running(acted)
    batch, seen = OnDevice(device, tmp_path), []
    batch.start(seen.append, lambda: None)
    assert batch.free() == 1
    batch.submit("one", PAYLOAD)
    assert batch.free() == 0
    batch.stop()
    thread = threading.Thread(target=lambda: [batch.poll(0.2) for _ in range(20)])
    thread.start()
    thread.join()
    assert [event["event"] for event in seen] == ["stopped"]
    assert batch.free() == 0
