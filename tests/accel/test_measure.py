"""Paired timing, counted work, memory, and the comparison that goes into a recipe file."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from accel import measure
from accel.method import Recipe
from accel.testing import tiny
from caches.native import FirstBlockCache
from samplers.swap import SwapScheduler


def test_paired_time_alternates_and_takes_ratios():
    order = []

    def slow():
        order.append("a")
        time.sleep(0.02)

    def fast():
        order.append("b")
        time.sleep(0.005)

    times = measure.paired_time(slow, fast, rounds=4, warmup=1)
    assert "".join(order) == "abbaabbaab"
    assert len(times.seconds_a) == len(times.seconds_b) == 4
    assert times.speedup.low > 1.5  # sleeps 4:1; a busy machine lengthens both
    with pytest.raises(ValueError, match="rounds"):
        measure.paired_time(slow, fast, rounds=0)


def test_flops_are_counted_exactly():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert measure.counted_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_peak_memory_sees_a_large_allocation():
    size = 64 << 20
    peak = measure.peak_memory(lambda: np.ones(size, dtype=np.uint8).sum())
    if peak is None:
        pytest.skip("the system keeps its high-water mark")
    assert size * 0.9 < peak < size * 3


INPUTS = [{"class_labels": [c], "num_inference_steps": 6, "guidance_scale": 3.0} for c in (1, 2, 3)]


def test_comparison_of_a_cache():
    host = tiny("dit")
    result = measure.compare(host.pipe, Recipe((FirstBlockCache(10.0),)), INPUTS, rounds=2)
    assert result.flops[1] < result.flops[0]
    assert result.nfe == (36, 36)  # the denoiser is still called; its blocks are not
    assert 0 < result.psnr.estimate < measure.PSNR_CAP
    assert result.report["effect"] == "some"
    measured = result.measured()
    assert json.loads(json.dumps(measured)) == measured
    assert measured["samples"] == 3
    assert {"hardware", "versions", "date", "threads", "commit"} <= set(measured)


def test_comparison_counts_fewer_evaluations_of_another_sampler():
    host = tiny("dit")
    same = measure.compare(host.pipe, Recipe(()), INPUTS, rounds=1)
    assert same.psnr.estimate == measure.PSNR_CAP
    assert same.flops[0] == same.flops[1]
    fewer = Recipe((SwapScheduler("DPMSolverMultistepScheduler", steps=4),))
    assert measure.compare(host.pipe, fewer, INPUTS, rounds=1).nfe == (36, 24)


def test_no_inputs():
    host = tiny("dit")
    with pytest.raises(ValueError, match="0 inputs"):
        measure.compare(host.pipe, Recipe(()), [])
    with pytest.raises(ValueError, match="3 inputs, 1 seeds"):
        measure.compare(host.pipe, Recipe(()), INPUTS, seeds=[1])
