"""Faster Diffusion: conformance, parity with the algorithm written out, decoders in one batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

from accel.method import attached
from accel.patch import Patch
from accel.testing import assert_equal, checks, conform, tiny
from caches.encoder_propagation import EncoderPropagation

EVERY = EncoderPropagation(every=2)
BATCHED = EncoderPropagation(every=3, noise=0.0, parallel=True)


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("method", [EVERY, BATCHED], ids=["sequential", "parallel"])
def test_conformance(check, method):
    conform(check, method, "sd")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["ddpm", "ddim", "sd-img2img", "sdxl"])
@pytest.mark.parametrize("method", [EVERY, BATCHED], ids=["sequential", "parallel"])
def test_conformance_matrix(check, method, pipeline):
    conform(check, method, pipeline)


def test_transformers_are_refused():
    with pytest.raises(ValueError, match="no encoder and decoder"):
        EVERY.attach(tiny("dit").pipe)


@pytest.mark.parametrize(
    "settings",
    [
        {"keys": (1, 2)},
        {"keys": (0, -5)},
        {"keys": (0, 50)},
        {"every": -1},
        {"noise": -1.0},
        {"noise": float("inf")},
        {"noise_below": 2.0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"key|noise"):
        EncoderPropagation(**settings)


def test_key_steps_are_the_papers_and_scale_with_the_run():
    method = EncoderPropagation()
    assert sorted(method.key_steps(50)) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert sorted(method.key_steps(20)) == [0, 1, 2, 4, 6, 10, 14]
    assert sorted(EncoderPropagation(every=4).key_steps(10)) == [0, 4, 8]


def _features(unet, x, t, states):
    """The encoder's half of a UNet2DConditionModel, written out."""
    embedding = unet.time_embedding(unet.time_proj(t.expand(len(x))))
    hidden = unet.conv_in(x)
    skips = (hidden,)
    for block in unet.down_blocks:
        if hasattr(block, "attentions"):
            hidden, more = block(hidden, embedding, encoder_hidden_states=states)
        else:
            hidden, more = block(hidden, embedding)
        skips += more
    return unet.mid_block(hidden, embedding, encoder_hidden_states=states), skips


def _decoded(unet, hidden, skips, t, states):
    """The decoder's half."""
    embedding = unet.time_embedding(unet.time_proj(t.expand(len(hidden))))
    for block in unet.up_blocks:
        count = len(block.resnets)
        own, skips = skips[-count:], skips[:-count]
        if hasattr(block, "attentions"):
            hidden = block(hidden, own, embedding, encoder_hidden_states=states)
        else:
            hidden = block(hidden, own, embedding)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


@pytest.mark.parametrize("parallel", [False, True])
def test_parity_with_the_algorithm_written_out(parallel):
    host = tiny("sd")
    unet = host.pipe.unet
    x = torch.randn(3, 2, unet.config.in_channels, 8, 8)
    states = torch.randn(2, 7, unet.config.cross_attention_dim)
    host.pipe.scheduler.set_timesteps(3)
    times = host.pipe.scheduler.timesteps
    method = EncoderPropagation(every=3, noise=0.0, parallel=parallel)
    with torch.no_grad(), attached(method, host.pipe) as live:
        live.clock.begin(host.pipe.scheduler)
        got = []
        for i, t in enumerate(times):
            with live.clock.at(i):
                got.append(unet(x[i], t, encoder_hidden_states=states, return_dict=False)[0])
        live.clock.end()
        report = live.report()["runs"][0]
        hidden, skips = _features(unet, x[0], times[0], states)
        for i, t in enumerate(times):  # the samples of steps 1 and 2 do not enter
            want = _decoded(unet, hidden, skips, t, states)
            assert torch.allclose(got[i], want, atol=1e-5), f"step {i}"
    columns = len(unet.down_blocks) + 2
    assert report["computed"] == columns
    assert report["reused"] == 2 * columns


def test_decoders_in_one_batch_are_the_decoders_one_by_one():
    outputs = {}
    for parallel in (False, True):
        host = tiny("sdxl")
        calls = []
        patch = Patch()
        patch.around_call(
            host.pipe.unet, lambda nxt, *a, n=calls, **k: (n.append(1), nxt(*a, **k))[1]
        )
        method = EncoderPropagation(every=4, noise=0.0, parallel=parallel)
        with attached(method, host.pipe, strict=True):
            outputs[parallel] = host.run(num_inference_steps=8)
        patch.undo()
        assert len(calls) == (4 if parallel else 8)  # two key steps, each with one batch
    assert torch.allclose(outputs[True], outputs[False], atol=1e-4)


def test_the_first_noise_comes_back_in_the_second_half():
    host = tiny("sd")
    seen = {}
    for noise in (0.0, 0.01):
        found = seen.setdefault(noise, [])
        patch = Patch()

        def look(call_next, output, t, sample, *a, found=found, **k):
            found.append((float(t), sample.clone()))
            return call_next(torch.zeros_like(output), t, sample, *a, **k)

        patch.around(host.pipe.scheduler, "step", look)
        with attached(EncoderPropagation(every=2, noise=noise), host.pipe):
            host.run(num_inference_steps=6)
        patch.undo()
    first = seen[0.0][0][1]
    total = torch.zeros_like(first)
    for (t, plain), (_, noisy) in zip(seen[0.0], seen[0.01], strict=True):
        if t >= 500:
            assert_equal(plain, noisy, f"sample at {t}")
        else:
            total = noisy - plain
            # what was added lies along the first noise
            cosine = torch.nn.functional.cosine_similarity(total.flatten(), first.flatten(), dim=0)
            assert cosine > 0.99
    assert total.abs().max() > 0


def test_the_second_half_is_counted_where_timesteps_are_logarithms():
    host = tiny("sd")
    host.pipe.scheduler = EDMEulerScheduler()
    with attached(EncoderPropagation(every=2), host.pipe) as live:
        host.run(num_inference_steps=6)
    assert live.counts["changed"] == 2  # of 6, those behind the middle


def test_the_noise_follows_a_scheduler_that_is_replaced():
    host, changed = tiny("sd"), []
    first = host.pipe.scheduler
    with attached(EncoderPropagation(every=2), host.pipe) as live:
        for scheduler in (first, type(first).from_config(first.config), first):
            host.pipe.scheduler = scheduler
            host.run(num_inference_steps=6)
            changed.append(live.counts["changed"])
    assert changed[0] == changed[1] == changed[2] > 0
    assert "step" not in vars(scheduler)


def test_noise_is_as_large_in_sigma_space():
    """Euler's samples are (1 + sigma^2)^(1/2) times larger, and so must the noise be."""
    host = tiny("sd")
    scheduler = EulerDiscreteScheduler.from_config(host.pipe.scheduler.config)
    host.pipe.scheduler = scheduler
    seen = {"before": [], "after": []}

    def look(where):
        def layer(call_next, output, t, sample, *a, **k):
            seen[where].append(sample.clone())
            return call_next(output, t, sample, *a, **k)

        return layer

    patch = Patch()
    patch.around(scheduler, "step", look("after"))  # inside what is attached next
    with attached(EncoderPropagation(every=2, noise=0.01), host.pipe):
        patch.around(scheduler, "step", look("before"))
        host.run(num_inference_steps=6)
    patch.undo()
    unit = seen["before"][0] / scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        added = seen["after"][i] - seen["before"][i]
        size = (1 + scheduler.sigmas[i] ** 2) ** 0.5 if t < 500 else 0.0
        assert torch.allclose(added, 0.01 * size * unit, atol=1e-5), f"step {i}"
