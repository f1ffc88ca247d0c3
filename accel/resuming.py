"""Which work a folder holds: what was cut off goes on, anything else is refused. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel.files import write_atomically

LONG = 60  # letters; beyond that a value says nothing to a person


def require_same_work(mark: Path, record: dict[str, Any], what: str) -> None:
    """Write ``record`` to ``mark``, in the folder of a ``what``, unless another one is there, or
    checkpoints of nobody knows what.

    record: plain JSON, all that the result depends on.

    Raises:
        ValueError: naming the folder and what differs; the folder stays as it was.
    """
    text = json.dumps(record, sort_keys=True)
    if mark.is_file() and mark.read_text("utf-8", "replace") != text:
        raise ValueError(
            f"{mark.parent} holds another {what} ({_difference(mark, json.loads(text))}); give "
            "another folder, or delete it if that one is of no use any more"
        )
    if not mark.is_file() and any(mark.parent.glob("checkpoint-*")):
        raise ValueError(
            f"{mark.parent} holds checkpoints, and no {mark.name} that says of which {what}; "
            "delete the folder, or give another"
        )
    write_atomically(mark, text.encode())


def _difference(mark: Path, now: dict[str, Any]) -> str:
    try:
        was = dict(json.loads(mark.read_bytes()))
    except (ValueError, TypeError):
        was = {}
    if not was:
        return f"its {mark.name} is damaged"
    keys = sorted(k for k in {**was, **now} if was.get(k) != now.get(k))
    told = [f"{k} {was.get(k)!r} there, {now.get(k)!r} here" for k in keys]
    return ", ".join(
        t if len(t) < LONG else f"of another {k}" for k, t in zip(keys, told, strict=True)
    )
