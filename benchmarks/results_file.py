"""Where figures are kept: ``results/NAME.json``, and ``NAME_DEVICE.json`` off the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def path(name: str, device: str = "cpu") -> Path:
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}_{device}.json")


def write(name: str, device: str, content: dict[str, Any]) -> Path:
    """Write one result; floats as they are, keys in the order given."""
    target = path(name, device)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    print(f"wrote {target}")
    return target


def read(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """A result, or ``None`` if it has not been measured."""
    file = path(name, device)
    return json.loads(file.read_text("utf-8")) if file.is_file() else None
