"""Where figures are kept: ``results/NAME.json``, and ``NAME_DEVICE.json`` off the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from accel.artifact import write_atomically
from benchmarks.schema import checked

RESULTS = Path(__file__).parent / "results"
DEVICES = ("cpu", "cuda")
_NUMBERS = re.compile(r"\[\s+(-?[\d.]+(?:e[-+]?\d+)?(?:,\s+-?[\d.]+(?:e[-+]?\d+)?)*)\s+\]")


def path(name: str, device: str = "cpu") -> Path:
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}_{device}.json")


def write(name: str, device: str, content: dict[str, Any]) -> Path:
    """Write one result whole or not at all; floats as they are, keys in the order given.

    Raises:
        ValueError: it is not what ``benchmarks.schema`` wants; nothing is written.
    """
    text = as_text(content)
    checked(name, text)
    target = path(name, device)
    write_atomically(target, text.encode())
    print(f"wrote {target}")
    return target


def as_text(content: dict[str, Any]) -> str:
    """Indented JSON, with a list of numbers on one line."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return _NUMBERS.sub(lambda m: f"[{' '.join(m[1].split())}]", text)


def read(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """A result, or ``None`` if it has not been measured. Raises ``ValueError`` if it is wrong."""
    file = path(name, device)
    return checked(name, file.read_text("utf-8")) if file.is_file() else None
