"""diffusers' caches through the contract: conformance, mended defects, parity with the host."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig

import accel
from accel import compat
from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.measure import compare
from accel.method import Recipe
from accel.testing import assert_equal, assert_same_state, checks, conform, host_state, tiny
from caches.native import FirstBlockCache, MagCache, TaylorSeer, mean_ratios

RATIOS = (1.0, 0.95, 0.97, 0.96)
METHODS = [
    FirstBlockCache(threshold=10.0),
    TaylorSeer(interval=2, warmup=1),
    TaylorSeer(interval=2, warmup=1, modules="lite"),
    MagCache(threshold=0.3, ratios=RATIOS),
]
TRANSFORMERS = ["dit", "pixart", "flux", "wan", "wan22", "cogvideox", "hunyuanvideo", "ltx", "sd3"]
REFUSED = {("FirstBlockCache", "sd3"), ("lite", "sd3")}


def _id(method) -> str:
    return getattr(method, "modules", "") or type(method).__name__


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("method", METHODS, ids=_id)
def test_conformance(check, method):
    conform(check, method, "dit")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", TRANSFORMERS)
@pytest.mark.parametrize("method", METHODS, ids=_id)
def test_conformance_matrix(check, method, pipeline):
    if (_id(method), pipeline) not in REFUSED:
        conform(check, method, pipeline)


@pytest.mark.parametrize(
    ("method", "pipeline", "words"),
    [
        (METHODS[0], "sd", "UNet2DConditionModel has none"),
        (METHODS[3], "ddpm", "UNet2DModel has none"),
        (METHODS[0], "sd3", "returns no text stream"),
        (METHODS[2], "sd3", "returns no text stream"),
    ],
)
def test_unsupported_is_refused_with_nothing_changed(method, pipeline, words):
    host = tiny(pipeline)
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match=words):
        method.attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


def test_feed_forwards_in_chunks_are_refused():
    host = tiny("pixart")
    for block in host.pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    with pytest.raises(ValueError, match="in chunks"):
        TaylorSeer(2, 1).attach(host.pipe)
    TaylorSeer(2, 1, modules="attention").attach(host.pipe).detach()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FirstBlockCache(threshold=-0.1), "threshold"),
        (lambda: FirstBlockCache(threshold="0.1"), "threshold"),
        (lambda: TaylorSeer(interval=0), "interval"),
        (lambda: TaylorSeer(modules="conv"), "modules"),
        (lambda: MagCache(), "ratios"),
        (lambda: MagCache(ratios=RATIOS, retention=2.0), "retention"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- the same as the host where the host works -------------------------------------------------


def _host_cache(host, config) -> torch.Tensor:
    host.pipe.transformer.enable_cache(config)
    try:
        return host.run()
    finally:
        host.pipe.transformer.disable_cache()


@pytest.mark.parametrize("pipeline", ["wan", "flux", "cogvideox"])
def test_first_block_cache_equals_the_hosts(pipeline):
    host = tiny(pipeline)
    expected = _host_cache(host, FirstBlockCacheConfig(threshold=10.0))
    with accel.attached(FirstBlockCache(10.0), host.pipe):
        assert_equal(expected, host.run(), "FirstBlockCache")


def test_mag_cache_equals_the_hosts():
    host = tiny("flux")
    config = MagCacheConfig(0.3, 3, 0.2, host.inputs["num_inference_steps"], list(RATIOS))
    expected = _host_cache(host, config)
    with accel.attached(MagCache(0.3, ratios=RATIOS), host.pipe):
        assert_equal(expected, host.run(), "MagCache")


# -- the host's defects ------------------------------------------------------------------------


def test_host_defect_context_is_missing_on_dit():
    """diffusers raises there, which is why we supply the branch; delete ours when this fails."""
    from diffusers.hooks import apply_first_block_cache

    host = tiny("dit")
    apply_first_block_cache(host.pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="context"):
        host.run()


def test_state_does_not_leak_into_a_run_of_another_size():
    """An interrupted run leaves diffusers' caches with residuals of the old shape."""
    host = tiny("dit")
    with accel.attached(FirstBlockCache(10.0), host.pipe) as live:
        alone = host.run()
        host.run(class_labels=[1, 2, 3])
        assert_equal(alone, host.run(), "after a larger batch")
        assert live.report()["runs"][-1]["reused"] > 0


def test_memory_is_the_peak_of_a_run():
    host, held = tiny("dit"), []
    with accel.attached(MagCache(10.0, 9, 0.0, ratios=RATIOS), host.pipe) as live:
        assert live.memory() == {"bytes_device": 0, "bytes_host": 0}
        managers = compat.state_managers(live.hooks)
        live.clock.subscribe(lambda event: held.append(compat.state_bytes(managers)[1]))
        host.run()
        assert live.report()["runs"][0]["bytes_host"] == max(held) > 0


def test_taylor_seer_reaches_the_modules_the_host_misses():
    """diffusers' own patterns match nothing in DiT: the wrapper must really extrapolate."""
    host = tiny("dit")
    expected = host.run()
    with accel.attached(TaylorSeer(interval=2, warmup=1), host.pipe) as live:
        assert not torch.equal(expected, host.run())
        run = live.report()["runs"][0]
    blocks = len(host.pipe.transformer.transformer_blocks)
    assert run["computed"] + run["reused"] == run["calls"] * blocks * 2  # attention, feed-forward
    assert run["reused"] > 0
    assert run["bytes_host"] > 0


@pytest.mark.parametrize("pipeline", [p for p in TRANSFORMERS if p != "sd3"])
def test_taylor_lite_extrapolates_a_last_projection(pipeline):
    """diffusers' own patterns find none in DiT: all blocks skipped, nothing in their place."""
    host = tiny(pipeline)
    with accel.attached(TaylorSeer(2, 1, modules="lite"), host.pipe):
        live = accel.live_on(host.pipe)[0]
        active = [h for _, h in live.hooks if not h.state_manager._init_kwargs["is_inactive"]]
    assert len(active) == len(denoisers(host.pipe))


@pytest.mark.parametrize(
    "method", [TaylorSeer(2, 5, modules="lite"), TaylorSeer(3), FirstBlockCache(0.05)], ids=_id
)
def test_a_trained_model_still_draws_the_same(method):
    """20 dB: an unrelated sample of the same class scores about 10, noise below."""
    pipe = accel.load("zoo:digits-dit")
    pipe.set_progress_bar_config(disable=True)
    inputs = [{"class_labels": [3, 67], "num_inference_steps": 50, "guidance_scale": 3.0}]
    result = compare(pipe, Recipe((method,)), inputs, seeds=[5], rounds=1)
    assert result.psnr.estimate > 20
    assert result.flops[1] < 0.8 * result.flops[0]


def test_branches_keep_separate_states():
    """Wan calls cond and uncond in turn: one state for both would feed cond's to uncond."""
    host = tiny("wan")
    managers = []
    with accel.attached(FirstBlockCache(10.0), host.pipe) as live:
        live = next(x for x in accel.live_on(host.pipe) if x.method == FirstBlockCache(10.0))
        manager = next(h for _, h in live.hooks if h._is_stateful).state_manager
        live.clock.subscribe(lambda e: managers.append(set(manager._state_cache)))
        host.run()
    assert {"cond", "uncond"} in managers


def test_mag_cache_counts_from_the_first_step_of_the_run():
    """Where a run starts in mid-schedule, the ratios are indexed by grid position."""
    host = tiny("dit")
    seen = []

    class FromTheMiddle(type(host.pipe.scheduler)):
        @property
        def begin_index(self):
            return 1

    host.pipe.scheduler = FromTheMiddle.from_config(host.pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", accel.NoEffectWarning)
        live = MagCache(0.0, ratios=RATIOS).attach(host.pipe)
        manager = live.hooks[0][1].state_manager
        live.clock.subscribe(
            lambda e: seen.extend(s.step_index for s in manager._state_cache.values())
        )
        host.run()
        live.detach()
    assert seen[0] == 2  # begun at 1, one step done


def test_mag_cache_of_a_pair_indexes_both_by_the_step_of_the_run():
    host, seen = tiny("wan22"), []
    with accel.attached(MagCache(10.0, 9, 0.0, ratios=(1.0,) * 10), host.pipe) as live:
        states = [hook.state_manager for _, hook in live.hooks if hasattr(hook, "state_manager")]

        def note(event):
            steps = [s.step_index for m in states for s in m._state_cache.values()]
            seen.append((event.kind, event.step, max(steps, default=0)))

        live.clock.subscribe(note)
        host.run(num_inference_steps=10)
    assert [(i, n) for kind, i, n in seen if kind == "step" and i < 9] == [
        (i, i + 1) for i in range(9)
    ]


# -- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [MagCache(10.0, 9, 0.2, ratios=(1.0,) * 8), TaylorSeer(interval=9, warmup=2)],
    ids=lambda m: type(m).__name__,
)
def test_guidance_that_ends_early_begins_anew(method):
    """What is kept is of two rows, and the call has one: diffusers adds nothing, or too much."""
    host = tiny("sd3")
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    computed = []

    def end_guidance(pipe, step, time, tensors):
        computed.append(live.counts["computed"])
        if step != 5:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[1] for name in names}

    call = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": names}
    with accel.attached(method, host.pipe) as live:
        host.run(num_inference_steps=8, **call)
        (run,) = live.report()["runs"]
    assert run["detail"]["cleared"] == 1
    assert computed[5] == computed[4]  # nothing was computed any more
    assert computed[6] > computed[5]


def test_mag_calibration_is_the_ratio_of_residual_norms(tmp_path):
    host = tiny("dit")
    inputs = [{"class_labels": [c], "num_inference_steps": 5, "output_type": "np"} for c in (1, 2)]
    state = host_state(host.pipe)
    artifact = MagCache.calibrate(host.pipe, inputs)
    host.run()
    assert_same_state(state, host_state(host.pipe))
    ratios = artifact.tensors["ratios"]
    assert ratios.shape == (5,)
    assert ratios[0] == 1.0
    assert artifact.guidance is True

    ref = artifact.save(tmp_path / "mag.safetensors")
    with accel.attached(MagCache(5.0, artifact=ref, retention=0.0), host.pipe) as live:
        host.run(num_inference_steps=5)
        assert live.report()["runs"][0]["reused"] > 0
        host.run(num_inference_steps=7)
        assert live.report()["runs"][1]["detail"]["ratios_resampled"] == [5, 7]


def test_mag_calibration_draws_the_same_twice():
    host, draws = tiny("dit"), torch.random.get_rng_state()
    inputs = [{"class_labels": [1], "num_inference_steps": 3}]
    found = [MagCache.calibrate(host.pipe, inputs).tensors["ratios"] for _ in range(2)]
    assert_equal(*found, "ratios")
    assert_equal(draws, torch.random.get_rng_state(), "the global generator")


def test_mag_artifact_of_another_model_is_refused(tmp_path):
    host, other = tiny("dit"), tiny("pixart")
    inputs = [{"class_labels": [1], "num_inference_steps": 4, "output_type": "np"}]
    ref = MagCache.calibrate(host.pipe, inputs).save(tmp_path / "mag.safetensors")
    assert Artifact.load(ref).method == "caches.native:MagCache"
    with pytest.raises(ValueError, match="DiTTransformer2DModel"):
        MagCache(artifact=ref).attach(other.pipe)
    foreign = Artifact.load(ref)
    foreign.method = "caches.router:RouterCache"
    with pytest.raises(ValueError, match=r"is for caches\.router:RouterCache"):
        MagCache(artifact=foreign.save(tmp_path / "other.safetensors")).attach(host.pipe)


def test_mean_ratios():
    assert mean_ratios([[1.0, 2.0], [3.0, 6.0]]) == [2.0, 4.0]
