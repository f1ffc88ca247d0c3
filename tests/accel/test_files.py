"""A final name holds a complete file or nothing, whatever fails."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from accel.files import clear_temporaries, remove, write_atomically


def test_write_replace_remove(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]
    remove(path)
    remove(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_only_our_litter_is_cleared(tmp_path):
    for name in (".a.png.0123abcd.part", ".a.part", "b.part", ".bashrc", "a.png"):
        (tmp_path / name).write_bytes(b"")
    assert clear_temporaries(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == [".a.part", ".bashrc", "a.png", "b.part"]


def test_threads_may_write_one_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_atomically(tmp_path / "a", bytes([i]) * 1000), range(64)))
    assert len(set((tmp_path / "a").read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(tmp_path, full_disk):
    target = tmp_path / "kept.json"
    write_atomically(target, b"old")
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        write_atomically(target, b"longer than there is room for")
    assert caught.value.filename == str(target)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("kept.json", b"old")
    ]
