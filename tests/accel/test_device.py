"""The current device, and random numbers that leave no trace."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch

from accel.device import forked_rng, on_device


def test_a_cpu_needs_no_switch_and_a_gpu_becomes_the_current_one(monkeypatch):
    made = []
    monkeypatch.setattr(
        torch.accelerator, "device_index", lambda i: made.append(i) or nullcontext()
    )
    with on_device(torch.device("cpu")):
        assert made == []
    with on_device(torch.device("cuda", 1)), on_device(torch.device("xpu", 0)):
        assert made == [1, 0]


def test_what_is_drawn_leaves_no_trace():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with forked_rng():
        torch.manual_seed(5)
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)


def test_every_gpu_is_forked_without_a_warning(monkeypatch):
    forked = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: forked.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: forked.append(device))
    with warnings.catch_warnings(), forked_rng():
        warnings.simplefilter("error")
        assert forked == [0, 1]
    assert forked == [0, 1, 0, 1]
