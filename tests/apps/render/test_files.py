"""A final name holds a complete file or nothing, whatever fails."""

import errno
import os

import pytest

from apps.render.files import clear_temporaries, remove, write_atomically


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
