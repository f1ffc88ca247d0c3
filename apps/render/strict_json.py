"""JSON read strictly and written canonically: one text for one value, so that it can be hashed.

Strictly means: UTF-8, no duplicate keys, no NaN or infinity (not even by way of 1e999), no lone
surrogates, bounded size and depth. Everything refused raises ValueError with a one-line reason.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_BYTES = 1 << 20  # one job; a prompt is a few kilobytes, so a megabyte is already a mistake
MAX_DEPTH = 16


def loads(raw: bytes) -> Any:
    """Parse one JSON text of at most MAX_BYTES bytes; ValueError with a one-line reason."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"is {len(raw):,} bytes long; at most {MAX_BYTES:,} are allowed")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid UTF-8 (byte {error.start + 1})") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from None
    check(value)
    return value


def canonical(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def check(value: Any, depth: int = 0) -> None:
    """Refuse what JSON cannot carry unchanged: depth, non-finite numbers, lone surrogates."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"has a key that is no text: {key!r}")
            check(key, depth + 1)
            check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check(item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("contains a number that is not finite")
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("contains half of a surrogate pair, which is no character") from None
    elif value is not None and not isinstance(value, (bool, int)):
        raise ValueError(f"contains a {type(value).__name__}, which JSON does not have")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"has the key {key[:60]!r} twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"contains {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"contains the number {text[:40]}, which is too large")
    return number


def _bounded(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"contains a whole number of {len(text)} digits")
    return int(text)
