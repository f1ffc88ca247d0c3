"""TFMQ: conformance, integers equal to their reference, timesteps, fallback, composition."""

from __future__ import annotations

import pytest
import torch

from accel.artifact import Artifact
from accel.measure import mean_psnr
from accel.method import FallbackWarning, Recipe, attached
from accel.testing import assert_equal, checks, conform, tiny
from caches.interval import IntervalCache
from caches.native import TaylorSeer
from quant.temporal_cache import TemporalCache
from quant.tfmq import TFMQ


@pytest.mark.parametrize("check", checks())
def test_conformance(check, calibrated):
    conform(check, TFMQ(calibrated("dit")[1]), "dit")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["sd", "ddim", "flux", "wan", "sd3", "pixart"])
def test_conformance_matrix(check, pipeline, calibrated):
    conform(check, TFMQ(calibrated(pipeline)[1], weights="disk"), pipeline)


@pytest.mark.parametrize("name", ["dit", "sd", "wan", "ddim"])
def test_integers_are_what_the_reference_says(name, calibrated):
    ref, outputs = calibrated(name)[1], {}
    for kernel in ("int8", "reference"):
        host = tiny(name)
        with attached(TFMQ(ref, kernel=kernel), host.pipe) as live:
            outputs[kernel] = host.run()
            assert live.report()["runs"][0]["fallbacks"] == {}
    plain = tiny(name).run()
    a, b, c = (x.reshape(-1, *x.shape[-3:]) for x in (*outputs.values(), plain))
    assert not torch.equal(a, c)
    # a unit in the last place of a float may flip a code, which is a quantisation error like others
    assert mean_psnr(a, b) > mean_psnr(a, c) + 3


def test_more_bits_are_nearer(calibrated):
    plain = tiny("dit").run()
    psnr = {}
    for bits in (4, 8):
        host = tiny("dit")
        with attached(TFMQ(calibrated("dit", bits=bits, temporal="plain")[1]), host.pipe):
            psnr[bits] = mean_psnr(host.run(), plain)
    assert psnr[8] > psnr[4] + 10


def test_four_bits_take_half_the_file(calibrated):
    sizes = {}
    for bits in (4, 8):
        tensors = calibrated("dit", bits=bits, temporal="plain")[0].tensors
        sizes[bits] = sum(t.nbytes for n, t in tensors.items() if n.endswith(":q"))
    assert sizes[4] * 2 == sizes[8]


def test_weights_leave_to_disk_and_come_back(calibrated):
    host = tiny("sd")
    kept = {k: v.clone() for k, v in host.pipe.unet.state_dict().items()}
    ref = calibrated("sd")[1]
    with attached(TFMQ(ref), host.pipe):
        wanted = host.run()
    with attached(TFMQ(ref, weights="disk"), host.pipe) as live:
        assert_equal(wanted, host.run(), "with the model's weights gone")
        gone = [p for p in host.pipe.unet.parameters() if p.isnan().any()]
        detail = live.report()["runs"][0]["detail"]
    assert sum(p.nbytes for p in gone) == detail["weights_bytes"]
    for key, value in host.pipe.unet.state_dict().items():
        assert_equal(kept[key], value, key)


@pytest.mark.parametrize("weights", ["keep", "disk"])
def test_an_output_that_is_not_finite_is_computed_whole(weights, calibrated, tmp_path):
    artifact, ref = calibrated("dit")
    broken = Artifact.load(ref)
    name = "transformer.transformer_blocks.2.ff.net.2:wscale"
    infinite = torch.full_like(broken.tensors[name].view(torch.float32), float("inf"))
    broken.tensors = {**artifact.tensors, name: infinite.view(torch.int32)}
    host = tiny("dit")
    plain = host.run()
    method = TFMQ(broken.save(tmp_path / "broken.safetensors"), weights=weights)
    with attached(method, host.pipe) as live:
        with pytest.warns(FallbackWarning, match="not finite"):
            assert_equal(plain, host.run(), "with the model's own weights")
        report = live.report()["runs"][0]
    assert report["fallbacks"] == {"an output was not finite": report["calls"]}


def test_scales_follow_the_timestep(calibrated):
    artifact, ref = calibrated("ddim", activations="groups", groups=4)
    static = [n for n in artifact.tensors if n.endswith(":ascale")]
    assert static
    assert all(len(artifact.tensors[n]) == 4 for n in static)
    host = tiny("ddim")
    with attached(TFMQ(ref), host.pipe) as live:
        seen = []
        bins = live.bins["unet"]
        live.patch.around_call(
            host.pipe.unet, lambda nxt, *a, **k: (nxt(*a, **k), seen.append(int(bins.index)))[0]
        )
        host.run()
    assert seen == [0, 1, 2, 3]  # four steps, a group each


def test_two_denoisers(calibrated):
    artifact, ref = calibrated("wan22")
    slots = {path.partition(".")[0] for path in artifact.settings["layers"]}
    assert slots == {"transformer", "transformer_2"}
    host = tiny("wan22")
    with attached(TFMQ(ref), host.pipe) as live:
        host.run()
        assert live.report()["runs"][0]["fallbacks"] == {}


def test_another_model_is_refused(calibrated):
    with pytest.raises(ValueError, match="calibrate again"):
        TFMQ(calibrated("dit")[1]).attach(tiny("dit", seed=1).pipe)
    with pytest.raises(ValueError, match="transformer"):
        TFMQ(calibrated("dit")[1]).attach(tiny("sd").pipe)


def test_an_adapter_stays_whole_beside_the_layers(calibrated):
    from peft import LoraConfig

    host = tiny("wan")
    with attached(TFMQ(calibrated("wan")[1]), host.pipe):
        without = host.run()
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host.pipe.transformer.add_adapter(config)
    with attached(TFMQ(calibrated("wan")[1]), host.pipe) as live:
        beside = host.run()
        host.pipe.transformer.disable_adapters()
        assert_equal(without, host.run(), "the adapter off")
        assert live.report()["runs"][0]["fallbacks"] == {}
    assert not torch.equal(without, beside)


@pytest.mark.parametrize("first", [True, False])
def test_composes_with_the_temporal_cache_and_feature_caches(first, calibrated):
    quantised = TFMQ(calibrated("dit")[1])
    for cache in (TaylorSeer(interval=2, warmup=2), IntervalCache(2, parts="blocks")):
        host = tiny("dit")
        with attached(Recipe((quantised, cache)), host.pipe):
            wanted = host.run(num_inference_steps=6)
        temporal = TemporalCache(weights="disk")
        recipe = Recipe((temporal, quantised, cache) if first else (quantised, cache, temporal))
        with attached(recipe, host.pipe) as live:
            for _ in range(2):
                assert_equal(wanted, host.run(num_inference_steps=6), str(recipe))
        assert all(m["effect"] == "some" for m in live.report()["members"])
