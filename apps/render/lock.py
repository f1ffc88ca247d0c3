"""One renderer per folder, by an flock: the kernel drops it when its process dies, even killed."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderBusy(Exception):
    """Another renderer works on this folder."""


@contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock; FolderBusy names the holder, or with `wait` its end is awaited.

    The file stays behind: removing it would let two processes lock two files of the same name.
    """
    descriptor = os.open(folder / "render.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _try(descriptor):
            if not wait:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise FolderBusy(
                    f"another renderer (process {holder or 'unknown'}) is working in {folder}; "
                    "wait for it, or use --wait"
                )
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a renderer works on this folder now, however it was left by another."""
    try:
        descriptor = os.open(folder / "render.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
