"""A whole render in one process: skip, redo, fail, stop, recover."""

import errno
import json
import os
import sqlite3
import subprocess

import pytest

from apps.render import driver, outputs, stages
from apps.render import worker as worker_module
from apps.render.driver import RunOptions, resume, submit
from apps.render.faults import StorageFault
from apps.render.ledger import Ledger
from apps.render.lock import FolderBusy, folder_lock
from apps.render.plan import load_plan
from apps.render.progress import Silent

ONE = RunOptions()


class Heard(Silent):
    """Keeps all events; `on` maps an event kind to something to do when it comes first."""

    def __init__(self, **on):
        self.events, self.said, self.on = [], [], on

    def event(self, event, task):
        self.events.append(event["event"])
        if event["event"] in self.on:
            self.on.pop(event["event"])(task)

    def say(self, line):
        self.said.append(line)


def _states(folder):
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        return {task.payload["stem"]: task.state for task in ledger.tasks()}


def _hashes(folder):
    return {
        p.stem: json.loads(p.read_text())["files"][0]["frames_sha256"]
        for p in folder.glob("*.json")
    }


@pytest.fixture
def count_denoises(monkeypatch):
    calls = []
    real = stages.denoise
    monkeypatch.setattr(stages, "denoise", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


def test_finished_work_is_skipped_and_edited_work_redone(tmp_path, planned, rows, count_denoises):
    out = tmp_path / "out"
    heard = Heard()
    first = submit(out, planned(rows(3)), ONE, heard)
    assert (first.exit_code, first.made, first.images) == (0, 3, 3)
    assert heard.events.count("step") == 6
    assert len(set(_hashes(out).values())) == 3
    before = _hashes(out)

    again = submit(out, planned(rows(3)), ONE)
    assert (again.made, again.skipped, len(count_denoises)) == (0, 3, 3)

    edited = rows(3)
    edited[1]["inputs"]["guidance_scale"] = 2.0
    third = submit(out, planned(edited), ONE)
    assert (third.made, third.skipped, third.counts["superseded"]) == (1, 2, 1)
    after = _hashes(out)
    assert {name for name in after if after[name] != before[name]} == {"job1"}

    back = submit(out, planned(rows(3)), ONE)
    assert back.made == 1
    assert _hashes(out) == before


def test_seed_threads_and_recipe_make_another_job(planned, rows):
    ids = {
        planned(rows(1))[0].id,
        planned(rows(1), threads=2)[0].id,
        planned(rows(1), dtype="bfloat16")[0].id,
        planned([{**rows(1)[0], "seed": 5}])[0].id,
    }
    assert len(ids) == 4
    assert planned(rows(1))[0].id in ids, "the same job is the same job"


def test_order_does_not_matter(tmp_path, planned, rows):
    assert submit(tmp_path / "a", planned(rows(4)), ONE).made == 4
    assert submit(tmp_path / "b", planned(rows(4)[::-1]), ONE).made == 4
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_one_bad_job_never_stops_the_rest(tmp_path, planned, rows):
    jobs = rows(3)
    jobs[0]["inputs"]["num_steps"] = 3
    summary = submit(tmp_path / "out", planned(jobs), ONE)
    assert summary.exit_code == 1
    assert _states(tmp_path / "out") == {"job0": "failed", "job1": "done", "job2": "done"}
    (failure,) = summary.failures
    assert (failure.error_class, failure.attempts) == ("invalid", 1)
    assert "takes no argument 'num_steps'" in failure.error


def test_a_failed_decode_never_costs_a_denoise(
    tmp_path, planned, rows, count_denoises, monkeypatch
):
    real, failures = stages.decode, []

    def failing(pipe, latents):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return real(pipe, latents)

    monkeypatch.setattr(stages, "decode", failing)
    summary = submit(tmp_path / "out", planned(rows(1)), ONE)
    assert summary.exit_code == 0
    assert len(failures) == 2
    assert len(count_denoises) == 1
    assert list((tmp_path / "out" / ".work").iterdir()) == []


def test_latents_outlive_the_process(tmp_path, planned, rows, count_denoises, monkeypatch):
    out, tasks = tmp_path / "out", planned(rows(1))
    with monkeypatch.context() as broken:
        broken.setattr(stages, "decode", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            submit(out, tasks, ONE)
    assert _states(out) == {"job0": "pending"}, "the lease was released"
    assert resume(out, ONE).exit_code == 0
    assert len(count_denoises) == 1
    submit(tmp_path / "plain", tasks, ONE)
    assert _hashes(out) == _hashes(tmp_path / "plain")


def test_decode_goes_on_in_tiles_when_memory_is_short(tmp_path, planned, rows, monkeypatch):
    real, calls = stages.decode, []

    def short(pipe, latents):
        calls.append(getattr(pipe.vae, "use_tiling", None))
        if len(calls) == 1:
            raise MemoryError
        return real(pipe, latents)

    monkeypatch.setattr(stages, "decode", short)
    summary = submit(tmp_path / "out", planned(rows(1)), ONE)
    assert summary.exit_code == 0
    assert calls == [False, True]
    assert "decoded in tiles" in summary.notes[0][1]


def test_unknown_failures_are_tried_twice_transient_ones_thrice(
    tmp_path, planned, rows, monkeypatch
):
    for error, attempts in ((RuntimeError("boom"), 2), (TimeoutError("slow"), 3)):
        monkeypatch.setattr(stages, "denoise", _raise(error))
        summary = submit(tmp_path / type(error).__name__, planned(rows(1)), ONE)
        assert [task.attempts for task in summary.failures] == [attempts]


@pytest.mark.parametrize("stage", ["latents", "sidecar", "ledger"])
def test_a_full_disk_stops_the_render_and_loses_nothing(
    tmp_path, planned, rows, monkeypatch, stage
):
    out = tmp_path / "out"
    with monkeypatch.context() as full:
        if stage == "ledger":
            full.setattr(Ledger, "complete", _raise(sqlite3.OperationalError("disk is full")))
        else:
            suffix = {"latents": ".safetensors", "sidecar": ".json"}[stage]
            full.setattr(os, "replace", _full_for(suffix, os.replace))
        if stage == "ledger":
            with pytest.raises(StorageFault, match="the disk is full"):
                submit(out, planned(rows(3)), ONE)
        else:
            summary = submit(out, planned(rows(3)), ONE)
            assert summary.exit_code == 1
            assert "No space left" in summary.stopped
            assert summary.counts["failed"] == 0
    states = _states(out)
    assert set(states.values()) == {"pending"}
    with Ledger.open(out / "ledger.sqlite") as ledger:
        assert max(task.attempts for task in ledger.tasks()) == 0, "no attempt was burned"
    assert resume(out, ONE).exit_code == 0
    assert set(_states(out).values()) == {"done"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(tmp_path, planned, rows):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", mount])
    if made.returncode != 0:
        pytest.skip("this machine does not let us mount")
    try:
        out = mount / "out"
        stopped = _submit_until_full(out, planned(rows(40)))
        assert "disk is full" in stopped or "No space left" in stopped
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        assert resume(out, ONE).exit_code == 0
        assert len(_hashes(out)) == 40
    finally:
        subprocess.run(["umount", mount], check=True)


def _submit_until_full(out, tasks):
    """What a person is told when the disk is full; SQLite or a picture may notice first."""
    try:
        summary = submit(out, tasks, ONE)
    except StorageFault as fault:
        return str(fault)
    assert summary.exit_code == 1
    assert summary.counts["failed"] == 0
    return summary.stopped


def test_an_unwritable_folder_is_one_line(tmp_path, planned, rows, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFault, match=r"output folder .*file/out: cannot be written"):
        submit(tmp_path / "file" / "out", planned(rows(1)), ONE)
    monkeypatch.setattr(driver, "folder_lock", _raise(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(StorageFault, match="cannot be written"):
        submit(tmp_path / "out", planned(rows(1)), ONE)


def test_a_corrupt_ledger_is_kept_aside_and_rebuilt(tmp_path, planned, rows, count_denoises):
    out = tmp_path / "out"
    submit(out, planned(rows(3)), ONE)
    (out / "job1.png").unlink()
    (out / "ledger.sqlite").write_bytes(b"garbage" * 1000)
    heard = Heard()
    summary = resume(out, ONE, heard)
    assert (summary.exit_code, summary.made, summary.skipped) == (0, 1, 2)
    assert len(count_denoises) == 4
    (aside,) = out.glob("ledger.corrupt-*.sqlite")
    assert aside.read_bytes().startswith(b"garbage")
    assert aside.name in heard.said[0]


def test_missing_outputs_are_made_again(tmp_path, planned, rows):
    out = tmp_path / "out"
    submit(out, planned(rows(2)), ONE)
    before = _hashes(out)
    (out / "job0.json").unlink()
    (out / "job1.png").unlink()
    assert resume(out, ONE).made == 2
    assert _hashes(out) == before


def test_two_renderers_on_one_folder(tmp_path, planned, rows):
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out), pytest.raises(FolderBusy, match=f"process {os.getpid()}"):
        submit(out, planned(rows(1)), ONE)
    assert submit(out, planned(rows(1)), ONE).exit_code == 0


def test_cancel_while_running(tmp_path, planned, rows, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(driver, "TICK_SECONDS", 0.0)

    def cancel(task):
        with Ledger.open(out / "ledger.sqlite") as ledger:
            ledger.cancel([task.id])

    summary = submit(out, planned(rows(3)), ONE, Heard(step=cancel))
    assert (summary.exit_code, summary.counts["cancelled"], summary.made) == (0, 1, 2)
    assert resume(out, ONE).made == 0, "what a person cancelled stays cancelled"
    assert submit(out, planned(rows(3)), ONE).made == 1, "until it is submitted again"


def test_an_interrupt_releases_the_lease_and_refunds_the_attempt(tmp_path, planned, rows):
    out = tmp_path / "out"
    heard = Heard(step=lambda task: os.kill(os.getpid(), 15))
    summary = submit(out, planned(rows(3)), ONE, heard)
    assert summary.exit_code == 130
    assert summary.counts["pending"] == 3 - summary.made
    with Ledger.open(out / "ledger.sqlite") as ledger:
        assert all(task.attempts == 0 for task in ledger.tasks("pending"))
    assert resume(out, ONE).exit_code == 0


def test_a_changed_model_or_recipe_is_noticed(tmp_path, planned, rows, monkeypatch):
    tasks = planned(rows(1))
    monkeypatch.setattr(worker_module, "model_revision", lambda ref: "sha256:other")
    summary = submit(tmp_path / "out", tasks, ONE)
    assert "has changed since this job was submitted" in summary.failures[0].error


def test_a_recipe_that_moved_is_found_where_it_is(tmp_path, planned, rows, monkeypatch):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("accel_recipe: 1\nname: none\nmethods: []\n")
    lost = planned(rows(1), recipe=str(first))
    first.rename(second)
    failed = submit(tmp_path / "out", lost, ONE)
    assert "first.yaml" in failed.failures[0].error
    again = planned(rows(1), recipe=str(second))
    assert again[0].id == lost[0].id
    assert submit(tmp_path / "out", again, ONE).made == 1
    assert load_plan(tmp_path / "out") == again


def test_no_metadata_keeps_the_sidecar(tmp_path, planned, rows):
    from apps.render.media import embedded_record

    out = tmp_path / "out"
    submit(out, planned(rows(1), metadata=False), ONE)
    assert embedded_record(out / "job0.png") is None
    assert outputs.read_sidecar(out / "job0.json")["payload"]["job"]["seed"] == 0


def _raise(error):
    def raising(*_, **__):
        raise error

    return raising


def _full_for(suffix, real):
    def replace(source, target):
        if str(target).endswith(suffix):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    return replace
