"""The core beside what the host itself can do to a pipeline: offload, LoRA, caches, compile."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import FirstBlockCacheConfig

import accel
from accel import compat
from accel.testing import assert_equal, assert_same_state, host_state, spy, tiny
from caches.native import FirstBlockCache, TaylorSeer


@pytest.fixture
def dit():
    host = tiny("dit")
    host.run()
    return host


def _calls(live) -> int:
    return live.report()["members"][0]["runs"][-1]["computed"]


def test_model_cpu_offload_enabled_before(dit):
    """diffusers removes and renews its offload hooks after every run, throwing our layers away."""
    expected = dit.run()
    dit.pipe.enable_model_cpu_offload(device="cpu")
    with accel.attached(spy(), dit.pipe) as live:
        for _ in range(3):
            assert_equal(expected, dit.run(), "offloaded run")
            assert _calls(live) > 0, "the layers were lost"
    assert_equal(expected, dit.run(), "after detach")


def test_model_cpu_offload_enabled_while_attached(dit):
    dit.pipe.enable_model_cpu_offload(device="cpu")
    dit.pipe.remove_all_hooks()  # what accelerate leaves behind by itself is not our concern
    expected, state = dit.run(), host_state(dit.pipe)
    live = TaylorSeer(2, 1).attach(dit.pipe)
    cached = dit.run()
    dit.pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_equal(cached, dit.run(), "offloaded run")
    live.detach()
    assert_equal(expected, dit.run(), "after detach, offload still on")
    dit.pipe.remove_all_hooks()
    assert_equal(expected, dit.run(), "after both are gone")
    assert_same_state(state, host_state(dit.pipe))


@pytest.mark.parametrize("order", list(itertools.permutations("abh")))
def test_foreign_hook_in_any_order(dit, order):
    """Two of our methods and accelerate's hook; put on in one order, taken off in all orders."""
    block = dit.pipe.transformer.transformer_blocks[1]
    remove_hook_from_module(add_hook_to_module(block, ModelHook()))  # leaves `forward` behind
    expected, state = dit.run(), host_state(dit.pipe)
    for put_on in itertools.permutations("abh"):
        lives = {}
        for name in put_on:
            if name == "h":
                add_hook_to_module(block, ModelHook())
            else:
                lives[name] = spy().attach(dit.pipe)
        dit.run()
        for name in order:
            if name == "h":
                remove_hook_from_module(block)
            else:
                lives[name].detach()
            assert_equal(expected, dit.run(), f"{put_on} off {order} at {name}")
        assert_same_state(state, host_state(dit.pipe))


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("cache_off_first", [True, False])
def test_diffusers_cache_above_or_below(cache_first, cache_off_first):
    host = tiny("wan")
    expected = host.run()
    transformer = host.pipe.transformer
    config = FirstBlockCacheConfig(threshold=10.0)
    transformer.enable_cache(config)
    cached = host.run()
    transformer.disable_cache()
    assert not torch.equal(expected, cached)

    if cache_first:
        transformer.enable_cache(config)
        live = spy().attach(host.pipe)
    else:
        live = spy().attach(host.pipe)
        transformer.enable_cache(config)
    assert_equal(cached, host.run(), "both on")
    if cache_off_first:
        transformer.disable_cache()
        assert_equal(expected, host.run(), "cache off, ours on")
        assert _calls(live) > 0
        live.detach()
    else:
        live.detach()
        assert_equal(cached, host.run(), "ours off, cache on")
        transformer.disable_cache()
    assert_equal(expected, host.run(), "both off")


def test_same_cache_twice_is_refused():
    host = tiny("wan")
    host.pipe.transformer.enable_cache(FirstBlockCacheConfig())
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match="disable_cache"):
        FirstBlockCache().attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


def test_lora_load_and_unload_while_attached():
    peft = pytest.importorskip("peft")
    host = tiny("wan")
    expected = host.run()
    transformer = host.pipe.transformer
    with accel.attached(spy(), host.pipe) as live:
        transformer.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        with_lora = host.run()
        assert not torch.equal(expected, with_lora)
        assert _calls(live) > 0
        transformer.delete_adapters("default")
        assert_equal(expected, host.run(), "after unloading the LoRA")
    assert_equal(expected, host.run(), "after detach")
    transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    before = host.run()
    with accel.attached(spy(), host.pipe):
        assert_equal(before, host.run(), "layers over a LoRA")


def test_attention_backend_set_while_attached():
    host = tiny("flux")
    expected = host.run()
    default, _ = compat.lookup("attention kernels").get_active_backend()
    with accel.attached(spy(), host.pipe):
        host.pipe.transformer.set_attention_backend("_native_math")
        near = host.run()
    host.pipe.transformer.reset_attention_backend()
    # which leaves the default of the process behind, for all tests that follow
    compat.lookup("attention kernels").set_active_backend(default)
    # another summation order of the same attention in fp32: relative 1e-3 is far above rounding
    torch.testing.assert_close(near, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["dit", "wan"])
def test_fullgraph_compile(dynamo, when, name):
    """The denoiser compiled whole, before or after attaching: same output, clock still right."""
    host = tiny(name)
    expected = host.run()

    def compiled():
        return torch.compile(tiny_denoiser, fullgraph=True, backend="eager")

    tiny_denoiser = host.pipe.transformer
    if when == "before":
        host.pipe.transformer = compiled()
    with accel.attached(spy(), host.pipe) as live:
        if when == "after":
            host.pipe.transformer = compiled()
        for _ in range(2):
            assert_equal(expected, host.run(), "compiled run")
        run = live.report()["runs"][-1]
    branches = {"dit": ["call0"], "wan": ["cond", "uncond"]}[name]
    assert run["branches"] == branches
    assert run["steps"] == host.inputs["num_inference_steps"]
    assert run["finished"]
    assert_equal(expected, host.run(), "after detach")


def test_regional_compile_keeps_block_caches(dynamo):
    """Blocks compiled in place: layers on blocks stay outside the graphs and still skip."""
    host = tiny("dit")
    with accel.attached(FirstBlockCache(10.0), host.pipe) as live:
        expected = host.run()
        reused = live.report()["runs"][-1]["reused"]
        assert reused > 0
        for block in host.pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")
        assert_equal(expected, host.run(), "regionally compiled")
        assert live.report()["runs"][-1]["reused"] == reused


def test_cache_inside_a_whole_graph_says_so(dynamo):
    """A graph over the whole denoiser bypasses block layers: computed in full, and said."""
    host = tiny("dit")
    expected = host.run()
    host.pipe.transformer = torch.compile(host.pipe.transformer, fullgraph=True, backend="eager")
    with accel.attached(FirstBlockCache(10.0), host.pipe), warnings.catch_warnings():
        warnings.simplefilter("ignore", accel.NoEffectWarning)
        with pytest.warns(accel.FallbackWarning, match="compile"):
            output = host.run()
    assert_equal(expected, output, "compiled")


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_denoiser_layers_stay_outside_the_whole_graph(dynamo, how):
    host = tiny("dit")
    seen = []
    with accel.attached(spy(), host.pipe) as live:
        expected = host.run()

        def layer(call_next, *args, **kwargs):
            seen.append((live.now.step, torch.compiler.is_compiling()))
            return call_next(*args, **kwargs)

        live.around_denoiser("transformer", layer)
        if how == "wrapped":
            host.pipe.transformer = torch.compile(host.pipe.transformer, backend="eager")
        else:
            host.pipe.transformer.compile(fullgraph=True, backend="eager")
        assert_equal(expected, host.run(), "compiled")
    assert seen == [(step, False) for step in range(4)]
