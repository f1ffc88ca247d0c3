"""Batches that memory does not hold: halved, and the same winner in the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.method import Recipe
from accel.settings import Settings
from accel.testing import assert_same_state, host_state
from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.gradient import Gradient
from samplers.search.particles import Particles
from samplers.search.player import is_out_of_memory
from samplers.search.random import Random
from samplers.search.rollover import Rollover
from samplers.search.verifiers.pixels import Brightness
from samplers.swap import SwapScheduler

FEW = Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=2),))
SEARCHES = {
    "random": Random(),
    "particles": Particles(4, strength=100.0, rounds=1),
    "rollover": Rollover(4, 2, together=4, rounds=1),
    "gradient": Gradient(4, climbers=3, iterations=2),
}
ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": MemoryError(),
    "torch on the host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def run(host, call, name):
    search, settings = SEARCHES[name], SearchSettings(seed=3, batch=4)
    calls, recipe = [{**call, "num_inference_steps": 3}], FEW if search.DRAFTS else Recipe(())
    budget = Budget(renders=12)
    calls *= 2 if name == "random" else 1
    found = search.run(host.pipe, calls, Brightness(), budget, recipe, settings=settings)
    return found.winners


def starved(host, rows, error):
    """The denoiser runs out of memory with more rows than that (guidance doubles samples)."""

    def stop(module, args, kwargs):
        x = args[0] if args else kwargs["sample"]
        if len(x) > rows:
            raise error

    return host.pipe.unet.conv_in.register_forward_pre_hook(stop, with_kwargs=True)


CASES = [*((name, "accelerator") for name in SEARCHES), ("random", "torch on the host")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_winner_is_the_same(host, call, name, kind):
    """What decides are scores of pictures in bytes, and the winner is rendered alone: so bit for
    bit, as long as no score is so near to another that a batch's last bits tell."""
    plenty = run(host, call, name)
    state = host_state(host.pipe)
    handle = starved(host, 4, ERRORS[kind])
    try:
        little = run(host, call, name)
    finally:
        handle.remove()
    for a, b in zip(plenty, little, strict=True):
        assert a.path == b.path
        assert np.array_equal(a.frames, b.frames)
        assert b.report["batch"] == 2
        assert "batch" not in a.report
        for purpose, cost in a.ledger.by_purpose.items():
            own = b.ledger.by_purpose[purpose]
            assert (own.evaluations, own.decodes) == (cost.evaluations, cost.decodes), purpose
    assert_same_state(state, host_state(host.pipe))


def test_it_is_found_out_once(host, call):
    tries = []
    handle = host.pipe.unet.conv_in.register_forward_pre_hook(lambda m, a: tries.append(len(a[0])))
    second = starved(host, 4, ERRORS["host"])
    run(host, call, "random")
    handle.remove()
    second.remove()
    assert sum(n > 4 for n in tries) == 1


def test_what_one_sample_alone_runs_out_with_is_raised(host, call):
    handle = starved(host, 1, ERRORS["accelerator"])
    with pytest.raises(torch.OutOfMemoryError):
        run(host, call, "random")
    handle.remove()


def test_other_errors_are_no_want_of_memory():
    assert all(map(is_out_of_memory, ERRORS.values()))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
