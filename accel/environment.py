"""Where and with what something was measured: the block that every figure is stored with."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from accel.artifact import versions


def environment(device: str | None = None, load_before: float | None = None) -> dict[str, Any]:
    """Hardware, threads, versions, commit, date and load: what every figure is stored with.

    load: of the machine at the start and end, one-minute average of runnable processes, this one
    among them; a busy machine shows more than the threads.
    """
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions() | accelerator_versions(device),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": [load_before, load_average()],
    }


def load_average() -> float | None:
    """Of the last minute; ``None`` where the operating system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def hardware(device: str | None = None) -> str:
    """The accelerator if ``device`` is one (or, without ``device``, if there is one), else the
    processor with its core count."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def accelerator_versions(device: str | None = None) -> dict[str, str]:
    """What an accelerator's figures depend on besides: driver, toolkit, cuDNN, Triton."""
    if device == "cpu" or not torch.cuda.is_available():
        return {}
    found = {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _triton(),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


@functools.cache
def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", 1)[0].strip() or None


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this file's repository, with "+changed" if code or weights differ from it."""
    folder = str(Path(__file__).parents[1])

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("diff", "--name-only", "HEAD", "--", "*.py", "*.safetensors")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+changed" if changed else name
