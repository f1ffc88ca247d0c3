"""One renderer per folder; the lock dies with its holder."""

import subprocess
import sys
import threading

import pytest

from apps.render.lock import FolderBusy, folder_lock, is_held

HOLDER = """
import sys, time
from pathlib import Path
from apps.render.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_busy_names_the_holder_and_kill_9_frees_it(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(FolderBusy, match=f"process {holder.pid}"),
            folder_lock(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path):
            pass


def test_wait(tmp_path):
    order = []
    with folder_lock(tmp_path):
        waiter = threading.Thread(target=_wait_for, args=(tmp_path, order))
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive()
        order.append("first")
    waiter.join(5)
    assert order == ["first", "second"]


def _wait_for(folder, order):
    with folder_lock(folder, wait=True):
        order.append("second")


def test_one_can_look_whether_it_is_held(tmp_path):
    assert not is_held(tmp_path)
    with folder_lock(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path), "looking holds nothing, and a lock file alone is no lock"
    with folder_lock(tmp_path):
        pass
