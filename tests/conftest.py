"""Shared settings of all tests."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Triton kernels run in its interpreter where there is no GPU. That must be settled before anything
# imports triton.
if not any(Path(f"/dev/{device}").exists() for device in ("nvidia0", "kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The machine decides how long an example takes, so time is no criterion here. Under CI the examples
# are the same every time; elsewhere they are new ones, and failures are kept in .hypothesis.
settings.register_profile(
    "accel",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("accel")


@pytest.fixture
def full_disk():
    """A context in which no file of this process grows beyond some bytes, whatever writes it."""

    @contextlib.contextmanager
    def full(size=8):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full
