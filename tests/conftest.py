"""Shared settings of all tests."""

from __future__ import annotations

import os
from pathlib import Path

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
