"""TFMQ: conformance, integers equal to their reference, timesteps, fallback, composition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch._dynamo.testing import CompileCounter

from accel.artifact import Artifact, Fingerprint
from accel.measure import mean_psnr
from accel.method import FallbackWarning, GuidanceWarning, NoEffectWarning, Recipe, attached
from accel.testing import (
    assert_equal,
    assert_same_state,
    checks,
    conform,
    host_state,
    tiny,
)
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, TaylorSeer
from quant._layers import Bins
from quant._rounding import bits_of, floats_of
from quant.calibrate import TFMQCalibration
from quant.temporal_cache import TemporalCache
from quant.tfmq import TFMQ
from samplers.rlg import RLG


@pytest.fixture
def broken(calibrated, tmp_path):
    """An artifact for "dit" with one layer whose output is not finite."""
    found = Artifact.load(calibrated("dit")[1])
    name = "transformer.transformer_blocks.2.ff.net.2:wscale"
    infinite = torch.full_like(floats_of(found.tensors[name]), float("inf"))
    found.tensors = {**found.tensors, name: bits_of(infinite)}
    return found.save(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("check", checks())
def test_conformance(check, calibrated):
    conform(check, TFMQ(calibrated("dit")[1]), "dit")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TFMQ. some timesteps were not calibrated")  # of other steps
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
            (run,) = live.report()["runs"]
        assert run["fallbacks"] == {}
        assert all(kind.endswith(f", {kernel}") for kind in run["detail"]["layers"])
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


@pytest.mark.parametrize("bits", [4, 8])
def test_where_activations_are_whole_weights_stay_packed(bits, calibrated):
    """After a run, too: none are kept in floating point."""
    artifact, ref = calibrated("dit", bits=bits, activations="whole", temporal="plain")
    held = sum(t.nbytes for n, t in artifact.tensors.items() if n.endswith((":q", ":wscale")))
    host = tiny("dit")
    with attached(TFMQ(ref), host.pipe) as live:
        host.run()
        biases = sum(p.nbytes for x in live.layers.values() for p in x.parameters())
        assert live.memory()["bytes_host"] == held + biases
        (run,) = live.report()["runs"]
    assert set(run["detail"]["layers"]) == {f"weight, {bits} bits, float"}


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


def test_what_is_saved_meanwhile_is_whole(calibrated, tmp_path):
    host = tiny("dit")
    model = host.pipe.transformer
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with attached(TFMQ(calibrated("dit")[1], weights="disk"), host.pipe):
        host.run()
        model.save_pretrained(tmp_path)
    for name, value in type(model).from_pretrained(tmp_path).state_dict().items():
        assert_equal(kept[name], value, name)


def test_weights_are_whole_after_the_model_was_cast(calibrated, broken, tmp_path):
    """Casting a model spreads what stands in for a weight to its size."""
    host = tiny("dit")
    model = host.pipe.transformer
    kept = {name: value.to(torch.float64) for name, value in model.state_dict().items()}
    with attached(TFMQ(broken, weights="disk"), host.pipe):
        host.pipe.to(torch.float64)
        model.save_pretrained(tmp_path)
        with pytest.warns(FallbackWarning, match="not finite"):
            whole = host.run()
        layer = model.transformer_blocks[2].ff.net[2].weight
        assert layer.untyped_storage().nbytes() == layer.element_size()
    assert_equal(host.run(), whole, "with the model's own weights")
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64)
    for name, value in again.state_dict().items():
        assert_equal(kept[name], value, name)


@pytest.mark.parametrize("weights", ["keep", "disk"])
def test_an_output_that_is_not_finite_is_computed_whole(weights, broken):
    host = tiny("dit")
    plain = host.run()
    method = TFMQ(broken, weights=weights)
    with attached(method, host.pipe) as live:
        with pytest.warns(FallbackWarning, match="not finite"):
            assert_equal(plain, host.run(), "with the model's own weights")
        report = live.report()["runs"][0]
    assert report["fallbacks"] == {"an output was not finite": report["calls"]}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "cache",
    [
        TaylorSeer(interval=2, warmup=2),
        TaylorSeer(interval=2, warmup=2, modules="lite"),
        FirstBlockCache(0.05),
    ],
    ids=str,
)
def test_what_is_computed_whole_passes_caches_that_saw_it_go_wrong(cache, first, broken):
    """What they kept of the first call is not finite: of the second they take nothing from it."""
    host, quantised = tiny("dit"), TFMQ(broken)
    plain = host.run()
    recipe = Recipe((quantised, cache) if first else (cache, quantised))
    with attached(recipe, host.pipe) as live:
        with pytest.warns(NoEffectWarning), pytest.warns(FallbackWarning, match="not finite"):
            assert_equal(plain, host.run(), "with the model's own weights, nothing reused")
        found = [m["runs"][0]["fallbacks"] for m in live.report()["members"]]
    assert {"an output was not finite"} == found[0].keys() | found[1].keys()


def test_what_is_wrong_with_the_models_own_weights_too_is_told(calibrated):
    host = tiny("dit")
    with attached(TFMQ(calibrated("dit")[1]), host.pipe) as live:

        def dead(call_next, *args, **kwargs):
            output = call_next(*args, **kwargs)
            return type(output)(sample=output.sample * 0)

        live.patch.around_call(host.pipe.transformer, dead)
        with pytest.warns(FallbackWarning) as warned:
            host.run()
        report = live.report()["runs"][0]
    assert "own weights too" in str(warned[-1].message)
    assert set(report["fallbacks"].values()) == {report["calls"]}
    assert len(report["fallbacks"]) == 2


def test_inputs_far_outside_the_calibrated_range_are_computed_whole(calibrated, tmp_path):
    """As if the model had been calibrated on inputs a hundred times smaller."""
    artifact, _ = calibrated("ddim", activations="static")
    name = "unet.mid_block.resnets.0.conv1"
    small = floats_of(artifact.tensors[f"{name}:ascale"]) / 100
    tensors = {**artifact.tensors, f"{name}:ascale": bits_of(small)}
    method = TFMQ(replace(artifact, tensors=tensors).save(tmp_path / "small.safetensors"))
    host = tiny("ddim")
    with attached(method, host.pipe) as live:
        with pytest.warns(FallbackWarning, match="outside the calibrated range"):
            rescued = host.run()
        report = live.report()["runs"][0]
    assert report["detail"]["clipped_calls"] == {name: report["calls"]}
    assert sum(report["fallbacks"].values()) == report["calls"]
    held = dict(artifact.settings["layers"])
    del held[name]
    settings = {**artifact.settings, "layers": held}
    without = replace(artifact, settings=settings).save(tmp_path / "without.safetensors")
    with attached(TFMQ(without), host.pipe):
        assert_equal(host.run(), rescued, "that layer whole, all others quantised")


def test_an_output_that_says_nothing_is_computed_whole(calibrated):
    host = tiny("dit")
    plain = host.run()
    with attached(TFMQ(calibrated("dit")[1]), host.pipe) as live:

        def dead(call_next, *args, **kwargs):
            output = call_next(*args, **kwargs)
            return output if live.whole else type(output)(sample=output.sample * 0)

        live.patch.around_call(host.pipe.transformer, dead)
        with pytest.warns(FallbackWarning, match="the same everywhere"):
            assert_equal(plain, host.run(), "with the model's own weights")


@pytest.mark.parametrize(("name", "first"), [("dit", True), ("dit", False), ("ddim", True)])
def test_one_graph_for_the_whole_model(name, first, calibrated):
    """With a scale for each timestep (ddim) as well; the sentinel on outputs is outside of it."""
    ref = calibrated(name, activations="groups" if name == "ddim" else "auto", groups=4)[1]
    host, frames = tiny(name), CompileCounter()
    with attached(TFMQ(ref), host.pipe):
        wanted = host.run()
    module = host.pipe.transformer if name == "dit" else host.pipe.unet
    torch._dynamo.reset()
    if first:
        module.compile(backend=frames, fullgraph=True)
    with attached(TFMQ(ref), host.pipe) as live:
        if not first:
            module.compile(backend=frames, fullgraph=True)
        for _ in range(2):
            assert_equal(wanted, host.run(), "compiled")
        report = live.report()
    assert frames.frame_count == 1
    assert report["effect"] == "some"
    assert "graphs" in report["runs"][0]["detail"]


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


def test_timesteps_that_were_not_calibrated_are_told(calibrated, recwarn):
    host = tiny("ddim")
    with attached(TFMQ(calibrated("ddim", activations="groups", groups=4)[1]), host.pipe) as live:
        host.run()
        assert not [w for w in recwarn if "not calibrated" in str(w.message)]
        host.inputs["num_inference_steps"] = 3  # of 1,000: none of the four but the last
        with pytest.warns(UserWarning, match="nearest ones"):
            host.run()
        host.run()
        host.inputs["num_inference_steps"] = 4
        host.run()
        before, there, _, after = live.report()["runs"]
    assert not [w for w in recwarn if "nearest ones" in str(w.message)], "it warned again"
    assert "grid" in there["detail"]
    assert "grid" not in before["detail"] | after["detail"]


def test_timesteps_that_the_host_rounds_are_those_that_were_calibrated():
    """Pipelines in half precision round on the way to the denoiser."""
    times = torch.linspace(1, 0.01, 20)
    bins = Bins(len(times)).fill(times, torch.arange(20))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for time in times:
            bins.set(time.to(dtype))
        assert not bins.is_off_grid(), dtype
    bins.set((times[3] + 0.02).to(torch.bfloat16))
    assert bins.is_off_grid()


def test_one_scale_for_all_timesteps_fits_any_grid(calibrated):
    host = tiny("ddim")
    with attached(TFMQ(calibrated("ddim", activations="static")[1]), host.pipe) as live:
        host.inputs["num_inference_steps"] = 3
        host.run()
        (run,) = live.report()["runs"]
    assert "grid" not in run["detail"]


def test_runs_without_the_guidance_of_the_calibration_are_told(calibrated):
    artifact, ref = calibrated("dit")
    host = tiny("dit")
    assert artifact.guidance == (host.inputs["guidance_scale"] > 1)
    host.inputs["guidance_scale"] = 1.0 if artifact.guidance else 4.0
    with attached(TFMQ(ref), host.pipe), pytest.warns(GuidanceWarning, match="guidance"):
        host.run()


def test_gradients_are_those_of_the_models_own_weights(calibrated):
    host = tiny("dit")
    model, x = host.pipe.transformer, torch.ones(1, 4, 8, 8)

    def gradient():
        given = x.clone().requires_grad_()
        model(given, torch.ones(1), torch.ones(1, dtype=torch.long)).sample.sum().backward()
        return given.grad

    right = gradient()
    with attached(TFMQ(calibrated("dit")[1]), host.pipe) as live:
        host.pipe.scheduler.set_timesteps(2)
        with live.clock.at(0), pytest.warns(FallbackWarning, match="no gradients"):
            found = gradient()
        live.clock.end()
    assert_equal(right, found, "gradient")


def test_layers_follow_a_model_that_is_moved(calibrated):
    with attached(TFMQ(calibrated("dit")[1]), tiny("dit").pipe) as live:
        with pytest.warns(FallbackWarning, match="no integer kernels"):
            live.follow("transformer", torch.device("meta"))
        held = [b for layer in live.layers.values() for b in layer.buffers()]
        assert {b.device.type for b in (*held, live.bins["transformer"].index)} == {"meta"}


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
    host = tiny("wan22")
    host.pipe.transformer_2 = tiny("wan22", seed=1).pipe.transformer_2
    with pytest.raises(ValueError, match="transformer_2"):
        TFMQ(calibrated("wan22")[1]).attach(host.pipe)


def test_offloaded_weights_are_told(calibrated):
    host, method = tiny("dit"), TFMQ(calibrated("dit")[1])
    with attached(method, host.pipe) as live:
        wanted = host.run()
        cpu_offload(host.pipe.transformer, execution_device=torch.device("cpu"))
        assert_equal(wanted, host.run(), "offloaded after attaching")
        assert live.report()["runs"][-1]["fallbacks"] == {}
    with pytest.raises(ValueError, match="attach first"):
        method.attach(host.pipe)


FIRST = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": []},
        {"layers": {FIRST: {"bits": 5, "scheme": "token"}}},
        {"layers": {FIRST: {"bits": 8, "scheme": "token", "split": "2"}}},
        {"layers": {FIRST: {"bits": 8, "scheme": "static", "split": -3}}},
        {"layers": {"transformer.nowhere": {"bits": 8, "scheme": "token"}}},
        {"layers": {"transformer.transformer_blocks": {"bits": 8, "scheme": "token"}}},
    ],
    ids=str,
)
def test_settings_that_say_no_layers_are_refused(settings, calibrated, tmp_path):
    broken = replace(calibrated("dit")[0], settings=settings)
    _is_refused(TFMQ(broken.save(tmp_path / "broken.safetensors")))


@pytest.mark.parametrize("name", [f"{FIRST}:q", f"{FIRST}:wscale", "transformer:times"])
@pytest.mark.parametrize("instead", [None, torch.zeros(1, dtype=torch.int8)], ids=str)
def test_tensors_of_another_form_are_refused(name, instead, calibrated, tmp_path):
    artifact = calibrated("dit")[0]
    tensors = {k: v for k, v in artifact.tensors.items() if k != name}
    if instead is not None:
        tensors[name] = instead
    broken = replace(artifact, tensors=tensors)
    _is_refused(TFMQ(broken.save(tmp_path / "broken.safetensors")))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("times", lambda t: t.long()),
        ("times", lambda t: t[None]),
        ("groups", lambda t: t.float()),
        ("groups", lambda t: t + 4),
        ("groups", lambda t: t - 1),
        ("both", lambda t: t[:0]),
    ],
)
def test_timesteps_without_scales_are_refused(name, instead, calibrated, tmp_path):
    artifact = calibrated("ddim", activations="groups", groups=4)[0]
    names = ("times", "groups") if name == "both" else (name,)
    wrong = {f"unet:{n}": instead(artifact.tensors[f"unet:{n}"]) for n in names}
    broken = replace(artifact, tensors={**artifact.tensors, **wrong})
    host = tiny("ddim")
    with pytest.raises(ValueError, match="calibrate again"):
        TFMQ(broken.save(tmp_path / "broken.safetensors")).attach(host.pipe)


def _is_refused(method):
    host = tiny("dit")
    host.run()
    state = host_state(host.pipe)
    with pytest.raises(ValueError):
        method.attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


def test_methods_with_weights_of_their_own_are_refused(calibrated, tmp_path, fit):
    host = tiny("dit")
    model = host.pipe.transformer
    weight = dict(model.named_parameters())["proj_out_2.weight"].detach()
    tuned = Artifact(RLG.name(), Fingerprint.of(model), {"proj_out_2.weight": weight + 1})
    student = RLG(artifact=tuned.save(tmp_path / "tuned.safetensors"))
    with pytest.raises(ValueError, match="both claim 'weights'"):
        Recipe((TFMQ(calibrated("dit")[1]), student)).attach(host.pipe)
    with pytest.raises(ValueError, match="weights of its own"):
        fit(TFMQCalibration(), host, tmp_path / "parts", recipe=Recipe((student,)))


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
        host.pipe.transformer.enable_adapters()
        host.pipe.transformer.fuse_lora()
        with pytest.warns(FallbackWarning, match="weights were changed"):
            fused = host.run()
        host.pipe.transformer.unfuse_lora()
        assert mean_psnr(host.run(), beside) > 60  # up to what fusing and unfusing rounds
    assert not torch.equal(without, beside)
    assert mean_psnr(fused, beside) > mean_psnr(fused, without) + 3  # it is not lost


def test_an_adapter_that_was_fused_and_unloaded_is_not_lost(calibrated, fuse_and_forget):
    host = tiny("wan")
    with attached(TFMQ(calibrated("wan")[1]), host.pipe) as live:
        without = host.run()
        fuse_and_forget(host.pipe.transformer, "to_q")
        with pytest.warns(FallbackWarning, match="weights were changed"):
            fused = host.run()
        assert any("to_q" in path for path in live.others)
        assert not any("to_k" in path for path in live.others)
    assert mean_psnr(fused, host.run()) > mean_psnr(fused, without) + 3


def test_weights_rounded_to_another_type_are_the_same(calibrated):
    host = tiny("dit")
    with attached(TFMQ(calibrated("dit")[1]), host.pipe) as live:
        host.run()
        host.pipe.to(torch.bfloat16)
        host.run()
        assert live.report()["runs"][-1]["fallbacks"] == {}


def test_looking_at_ranges_does_not_stop_the_temporal_cache(calibrated):
    """Projections of the text are quantised and known before the sample is."""
    ref = calibrated("sd", activations="static")[1]
    host = tiny("sd")
    with attached(TFMQ(ref), host.pipe):
        wanted = host.run()
    with attached(Recipe((TFMQ(ref), TemporalCache(weights="disk"))), host.pipe) as live:
        for _ in range(2):
            assert_equal(wanted, host.run(), "with the cache")
        assert [run["fallbacks"] for m in live.report()["members"] for run in m["runs"]] == [{}] * 4


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


def test_an_artifact_of_another_method_or_a_damaged_one_is_refused(calibrated, tmp_path):
    artifact, ref = calibrated("dit")
    other = replace(artifact, method="caches.router:RouterCache", settings={})
    with pytest.raises(ValueError, match="is for caches"):
        TFMQ(other.save(tmp_path / "other.safetensors")).attach(tiny("dit").pipe)
    data = bytearray(Path(ref.path).read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    damaged = replace(ref, path=str(tmp_path / "damaged.safetensors"))
    with pytest.raises(ValueError, match="SHA-256"):
        TFMQ(damaged).attach(tiny("dit").pipe)
