"""cache-dit as a recipe member: it has an effect, and leaves nothing behind."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from accel.measure import Study
from accel.method import Recipe, attached
from accel.settings import Settings
from accel.testing import tiny
from benchmarks.peers import CacheDit
from samplers.swap import SwapScheduler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cache_dit") is None, reason="the peers extra is not installed"
)
CALL = {"class_labels": [1], "num_inference_steps": 6}
# every step after the second may reuse, whatever it differs
EAGER = Settings(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1e9)


def _names(module):
    return {
        path: set(vars(m)) | {name for name, _ in m.named_children()}
        for path, m in module.named_modules()
    }


@pytest.mark.parametrize("order", [0, 1])
def test_it_reuses_blocks_and_gives_the_pipeline_back(order):
    pipe = tiny("dit").pipe
    before, call = _names(pipe.transformer), type(pipe).__call__
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    study = Study(pipe, [CALL])
    plain = study.run()
    done = study.run(Recipe((CacheDit(EAGER, order),)))
    assert done.flops < plain.flops
    (member,) = done.report["members"]
    blocks, calls = len(pipe.transformer.transformer_blocks), member["runs"][0]["calls"]
    assert member["runs"][0]["reused"] == (blocks - 1) * (calls - 2)
    assert member["runs"][0]["computed"] + member["runs"][0]["reused"] == blocks * calls
    assert _names(pipe.transformer) == before
    assert type(pipe).__call__ is call
    after = pipe.transformer.state_dict()  # in another order: the blocks are registered again
    assert set(after) == set(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert torch.equal(Study(pipe, [CALL]).run().samples, plain.samples)


@pytest.mark.parametrize("first", ["solver", "cache"], ids=lambda name: f"{name}-off-first")
@pytest.mark.parametrize("runs", [0, 1])
def test_beside_another_method_it_gives_the_pipeline_back_in_any_order(first, runs):
    """The other method's clock has a layer on the forward that cache-dit replaces."""
    pipe = tiny("dit").pipe
    before = _names(pipe.transformer)
    plain = pipe(**CALL, generator=torch.manual_seed(0), output_type="np").images
    solver = SwapScheduler("DPMSolverMultistepScheduler", steps=4).attach(pipe)
    cache = CacheDit(EAGER, 1).attach(pipe)
    for _ in range(runs):
        pipe(**CALL, output_type="np")
    lives = [solver, cache] if first == "solver" else [cache, solver]
    lives[0].detach()
    pipe(**CALL, output_type="np")
    lives[1].detach()
    assert [bool(live.report()["runs"]) for live in lives] == [bool(runs), True]
    assert _names(pipe.transformer) == before
    again = pipe(**CALL, generator=torch.manual_seed(0), output_type="np").images
    assert np.array_equal(again, plain)


def test_an_exception_in_a_run_leaves_nothing_behind():
    pipe = tiny("dit").pipe
    before, call = _names(pipe.transformer), type(pipe).__call__
    too_many = CacheDit(Settings(Fn_compute_blocks=99))
    with pytest.raises(AssertionError, match="Fn_compute_blocks"), attached(too_many, pipe):
        pipe(**CALL, output_type="np")
    assert _names(pipe.transformer) == before
    assert type(pipe).__call__ is call
