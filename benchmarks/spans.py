"""An estimate with its interval, as every table has it."""

from __future__ import annotations

from collections.abc import Mapping


def span(value: Mapping[str, float], form: str = "{:.2f}", unit: str = "") -> str:
    """``1.54x (1.20 to 1.80)``, from ``estimate``, ``low`` and ``high``."""
    at, low, high = (form.format(value[key]) for key in ("estimate", "low", "high"))
    return f"{at}{unit} ({low} to {high})"
