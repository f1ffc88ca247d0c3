"""Where figures are kept: ``results/NAME.json``, and ``NAME_DEVICE.json`` off the CPU.

Studies that go on where they were stopped refuse what another machine or other versions of
packages have measured; their ``--fresh`` measures again what is there (beside ``--only``: of that),
which is what ``make`` asks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from accel.files import write_atomically
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


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """The option that every study has which keeps rows of an earlier run."""
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")


def require_machine(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ``ValueError`` where two environments' figures do not stand in one file.

    Of versions those count that both name, but not this project's own: rows have commits.
    """
    for key in ("hardware", "threads"):
        if there[key] != here[key]:
            raise ValueError(
                f"the rows in the file are of {key} {there[key]!r}, this is {here[key]!r}; "
                "measure all of them again (without --only; with --fresh, where there is one)"
            )
    ours, theirs = here.get("versions", {}), there.get("versions", {})
    for package in sorted((ours.keys() & theirs.keys()) - {"accel"}):
        if ours[package] != theirs[package]:
            raise ValueError(
                f"the rows in the file are of {package} {theirs[package]}, this is "
                f"{ours[package]}; measure all of them again (without --only; with --fresh, where "
                "there is one)"
            )


def read(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """A result, or ``None`` if it has not been measured. Raises ``ValueError`` if it is wrong."""
    file = path(name, device)
    return checked(name, file.read_text("utf-8")) if file.is_file() else None
