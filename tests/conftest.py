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


@pytest.fixture
def reads():
    """``with reads() as seen``: how often the block asked a tensor for values, as a list."""
    import torch  # only after what is settled above
    from torch.overrides import TorchFunctionMode

    @contextlib.contextmanager
    def watched():
        seen = []

        class Reads(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__):
                    seen.append(func)
                return func(*args, **(kwargs or {}))

        with Reads():
            yield seen

    return watched


@pytest.fixture
def made_current(monkeypatch):
    """``made_current(module)``: the devices that its ``on_device`` has made current, now."""

    def watch(module):
        current = []

        @contextlib.contextmanager
        def on_device(device):
            current.append(device)
            yield
            current.pop()

        monkeypatch.setattr(module, "on_device", on_device)
        return current

    return watch
