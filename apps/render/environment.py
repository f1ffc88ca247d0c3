"""Versions of what decides pixels, read from package metadata (nothing is imported)."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("accel", "diffusers", "torch", "transformers", "numpy")


@cache
def versions() -> dict[str, str]:
    """`{"torch": "2.13.0", ..., "python": "3.11.7"}`; packages not installed are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}
