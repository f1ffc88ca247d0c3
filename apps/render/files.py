"""Writing files so that a final name only ever holds a complete file."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.part$")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, flush it to disk, then rename; OSError leaves nothing.

    On return the file and its name are on disk (fsync of both file and folder).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there, durably."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_temporaries(folder: Path) -> int:
    """Remove what interrupted writers left in `folder`; return how many files."""
    left = [path for path in folder.iterdir() if _TEMPORARY.match(path.name)]
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return len(left)
