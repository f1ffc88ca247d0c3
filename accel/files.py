"""Writing files so that a final name only ever holds a complete file. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.part$")


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` under ``path`` whole or not at all, in a folder that is made; any thread may.

    On return the file and its name are on disk (fsync of file and folder).

    Raises:
        OSError: naming ``path``; what was there before still is, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # not of the temporary name, or of none
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync(path.parent)


def move_folder(folder: Path, to: Path) -> None:
    """Give a folder of files its final name when all of it is on disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    os.replace(folder, to)
    _sync(to.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there, durably."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _sync(path.parent)


def clear_temporaries(folder: Path) -> int:
    """Remove what interrupted writers left in ``folder``; return how many files."""
    left = [path for path in folder.iterdir() if _TEMPORARY.match(path.name)]
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return len(left)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
