"""The `measured` block of a recipe file, renewed in place: comments and layout stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

KEY = "measured"


def store_measured(path: Path, measured: dict[str, Any]) -> None:
    """Write ``measured`` into a recipe file, atomically; every other byte of it stays.

    Raises:
        ValueError: the file is not laid out in lines (as JSON, say); it is left as it was.
    """
    from accel.files import write_atomically

    text = path.read_bytes().decode("utf-8")  # `read_text` would turn CRLF into LF
    renewed = with_measured(text, measured)
    if _content(renewed) != {**_content(text), KEY: measured}:
        raise ValueError(
            f"{path}: cannot renew its {KEY!r} block in place; write each key of the recipe on a "
            "line of its own, or measure with --no-write"
        )
    write_atomically(path, renewed.encode("utf-8"))


def with_measured(text: str, measured: dict[str, Any]) -> str:
    """A recipe's text with another ``measured`` block; at its end if there was none."""
    lines = text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(f"{KEY}:")]
    begin = starts[0] if starts else len(lines)
    end = min(begin + 1, len(lines))
    while end < len(lines) and (lines[end].startswith((" ", "\t")) or not lines[end].strip()):
        end += 1
    while end > begin + 1 and not lines[end - 1].strip():
        end -= 1  # blank lines after the block are not of it
    newline = "\r\n" if "\r\n" in text else "\n"
    block = yaml.safe_dump({KEY: measured}, sort_keys=False, width=100, line_break=newline)
    before = "".join(lines[:begin])
    return (
        before
        + (newline if before and not before.endswith("\n") else "")
        + block
        + "".join(lines[end:])
    )


def _content(text: str) -> dict[str, Any]:
    """What a text says; nothing if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
