"""File stems that are safe on every common file system, and the default stem of a job."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

MAX_STEM_BYTES = 120  # leaves room for a number, a suffix and a temporary prefix within 255 bytes
_RESERVED = {"con", "prn", "aux", "nul", "ledger", "plan"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in range(1, 10)
}
_FORBIDDEN = set('<>:"|?*')
_BESIDE = (".search", ".candidates", ".curve")  # what a search leaves beside its output
_NUMBERED = re.compile(r"\.\d+$")


def stem_problem(stem: str) -> str | None:
    """Say in a few words why `stem` is not a safe file stem; None when it is safe."""
    if not stem:
        return "is empty"
    if any(unicodedata.category(letter).startswith("C") for letter in stem):
        return "contains control or invisible characters"
    if "/" in stem or "\\" in stem:
        return "contains a path separator; outputs go into the output folder itself"
    if stem.startswith(".") or stem[0] in " -":
        return "starts with a dot, a space or a dash"
    if stem[-1] in " .":
        return "ends with a space or a dot"
    if bad := _FORBIDDEN & set(stem):
        return f"contains {''.join(sorted(bad))!r}"
    if stem.split(".")[0].casefold() in _RESERVED:
        return "is a reserved file name"
    if _NUMBERED.search(stem):
        return "ends with a dot and a number, which is how several images of a job are numbered"
    if len(stem.encode()) > MAX_STEM_BYTES:
        return f"is longer than {MAX_STEM_BYTES} bytes"
    return None


def name_problem(name: str) -> str | None:
    """As `stem_problem`, of a name that a person gives to a job."""
    ending = next((e for e in _BESIDE if folded(name).endswith(e)), None)
    if ending is not None:
        return f"ends with {ending!r}, as the record of a search does"
    return stem_problem(name)


def folded(stem: str) -> str:
    """The key under which two stems name the same file on some file system."""
    return unicodedata.normalize("NFC", stem).casefold()


def default_stem(index: int, identity: str, inputs: dict[str, Any]) -> str:
    """`0007-a-red-three-1a2b3c4d`: position, what it shows, and the start of its identity."""
    parts = [f"{index:04d}", _slug(inputs), identity[:8]]
    return "-".join(part for part in parts if part)


def _slug(inputs: dict[str, Any]) -> str:
    for key in ("prompt", "class_labels"):
        value = inputs.get(key)
        if isinstance(value, list) and value:
            value = value[0] if isinstance(value[0], str) else "-".join(map(str, value[:4]))
        if isinstance(value, str) and value:
            prefix = "" if key == "prompt" else "label-"
            return prefix + _ascii(value)
    return ""


def _ascii(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text[:200]).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40].strip("-")
