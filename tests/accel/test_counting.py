"""Counted work and memory: exact, and the same every time."""

from __future__ import annotations

import torch

from accel.counting import counted_flops, peak_memory

MEGABYTE = 1 << 20


def test_flops_are_counted_exactly():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counted_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_attention_counts_whatever_kernel_runs_it():
    q, k = torch.ones(2, 3, 8, 16), torch.ones(2, 3, 32, 16)
    mask = torch.ones(8, 32, dtype=torch.bool)
    attend = torch.nn.functional.scaled_dot_product_attention
    both = 2 * (2 * 2 * 3 * 8 * 32 * 16)  # scores, then values
    assert counted_flops(lambda: attend(q, k, k)) == both
    assert counted_flops(lambda: attend(q, k, k, mask)) == both
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert counted_flops(lambda: attend(q, k, k)) == both


def _chain(length: int) -> torch.Tensor:
    x = torch.zeros(MEGABYTE, dtype=torch.uint8)
    for _ in range(length):
        x = x + 1  # the old one dies when the new one is there
    return x


def test_peak_memory_counts_what_is_alive_at_once():
    assert peak_memory(lambda: torch.zeros(MEGABYTE, dtype=torch.uint8), "cpu") == MEGABYTE
    assert peak_memory(lambda: _chain(1), "cpu") == 2 * MEGABYTE
    assert peak_memory(lambda: _chain(9), "cpu") == 2 * MEGABYTE


def test_views_and_what_was_there_before_cost_nothing():
    weight = torch.zeros(MEGABYTE, dtype=torch.uint8)
    assert peak_memory(lambda: weight.view(2, -1).t(), "cpu") == 0
    assert peak_memory(lambda: weight.add_(1), "cpu") == 0
    kept = []
    assert peak_memory(lambda: kept.extend(weight + i for i in range(3)), "cpu") == 3 * MEGABYTE
