"""Calibration: errors are those the policy then makes, and a stopped one goes on."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from accel.denoiser import denoisers
from accel.measure import mean_psnr, pipeline_samples
from accel.method import GuidanceWarning, attached
from accel.testing import assert_same_state, host_state, tiny
from sparse_attn import calibrate
from sparse_attn._live import Place
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.budgets import Budgets
from sparse_attn.calibrate import CalibrationSettings, _decibels, _key, layer_errors, losses
from sparse_attn.estimators import block_scores, complement
from sparse_attn.kernels import reference
from sparse_attn.subblock_lse import SubblockLSE
from sparse_attn.token_order import gilbert

SETTINGS = CalibrationSettings(
    (0.25, 0.5, 1.0), 0.25, 2, checked=(0.5,), blocks=(16, 16), dense=0.0
)


def inputs(host):
    """Without embeddings, which are no JSON: texts are the pipeline's business."""
    return {k: v for k, v in host.inputs.items() if not isinstance(v, torch.Tensor)}


@pytest.fixture
def host(monkeypatch):
    """A tiny Wan whose prompts are given once and for all."""
    return answered(tiny("wan"), monkeypatch)


def answered(host, monkeypatch):
    host.run()
    call = type(host.pipe).__call__
    embeds = {k: v for k, v in host.inputs.items() if isinstance(v, torch.Tensor)}

    @functools.wraps(call)
    def with_embeds(self, **kwargs):
        return call(self, **embeds, **kwargs)

    monkeypatch.setattr(type(host.pipe), "__call__", with_embeds)
    return host


@pytest.mark.parametrize("allocate", ["row", "head", "layer"])
@pytest.mark.parametrize("pooled", [False, True])
def test_errors_are_of_the_attention_through_the_projection(pooled, allocate):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=g) for _ in "qkv")
    weight = torch.randn(16, 16, generator=g)
    place = Place((4, 4, 4), gilbert((4, 4, 4)), 0, (16, 16), "transformer", 0, 1, 0, 1, 0.5, "")
    settings = CalibrationSettings(
        (0.5, 1.0), 0.5, 1, 4, (0.5,), (16, 16), pooled, allocate=allocate
    )
    errors, gains = layer_errors(q, k, v, place, settings, weight)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def missed(keep):
        more = complement(k, v, keep, 16) if pooled else None
        return reference.attend(q, k, v, BlockMap(keep, 16, 16, 64, 64), more).out - right

    def projected(x):
        return x.transpose(1, 2).flatten(2) @ weight.T

    scores = block_scores(q, k, v, (16, 16), pooled)
    off = missed(keep_share(scores * gains[:, None, None], 0.5, allocate))
    share = projected(off).square().sum() / projected(right).square().sum()
    assert errors.tolist() == pytest.approx([share.item(), 0.0], rel=1e-4)
    tried = keep_share(scores, 0.5, "head")
    for h in range(2):
        alone = missed(tried)[:, h] @ weight[:, 8 * h : 8 * h + 8].T
        told = scores[:, h][~tried[:, h]].square().sum()
        gain = (alone.square().sum() / told).sqrt()
        assert gains[h].item() == pytest.approx(gain.item(), rel=1e-4)


def test_losses_are_measured_on_the_sample(host, tmp_path):
    """At the density that was tried they are what one stage alone does to the sample."""
    state = host_state(host.pipe)
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS, str(tmp_path / "parts"))
    assert_same_state(state, host_state(host.pipe))
    losses = artifact.tensors["transformer/losses"]
    assert losses.shape == (2, 3, 3)  # stages, layers, ladder
    assert (losses[..., 0] >= losses[..., 1]).all()
    assert (losses[..., -1] == 0).all()
    assert artifact.tensors["transformer/gains"].shape == (2, 3, 2)
    assert artifact.tensors["transformer/steps"].sum() == host.inputs["num_inference_steps"]
    (file,) = (f for f in (tmp_path / "parts").iterdir() if not f.stem.endswith("checks"))
    parts = json.loads(file.read_text("utf-8"))["transformer"]
    assert losses[..., 0].sum(-1).tolist() == pytest.approx(parts["losses"], rel=1e-6)
    plain = pipeline_samples(host.pipe, inputs(host), 0)
    ref = artifact.save(tmp_path / "budgets.safetensors")
    with attached(method(ref, density=0.25), host.pipe):
        both = pipeline_samples(host.pipe, inputs(host), 0)
    whole = (both - plain).square().mean().item()
    assert 0.3 < whole / sum(parts["losses"]) < 3  # parts add up, about


def test_guidance_is_told_also_by_parts_that_are_kept(host, tmp_path):
    call = {**inputs(host), "guidance_scale": 5.0}
    made = [
        SubblockLSE.calibrate(host.pipe, [call], SETTINGS, str(tmp_path / "parts")) for _ in "ab"
    ]
    assert [artifact.guidance for artifact in made] == [True, True]
    ref = made[1].save(tmp_path / "budgets.safetensors")
    with attached(method(ref, density=0.4), host.pipe), pytest.warns(GuidanceWarning):
        pipeline_samples(host.pipe, {**call, "guidance_scale": 1.0}, 0)


def test_inputs_with_and_without_guidance_tell_nothing(host):
    calls = [{**inputs(host), "guidance_scale": scale} for scale in (5.0, 1.0)]
    assert SubblockLSE.calibrate(host.pipe, calls, SETTINGS).guidance is None


def test_a_denoiser_that_is_called_at_one_step_has_budgets(monkeypatch):
    """Of Wan 2.2's two, at a boundary that leaves one of them the first step alone."""
    host = answered(tiny("wan22"), monkeypatch)
    host.inputs["num_inference_steps"] = 6
    host.pipe.register_to_config(boundary_ratio=0.99)
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS)
    steps = {d.slot: int(artifact.tensors[f"{d.slot}/steps"].sum()) for d in denoisers(host.pipe)}
    assert sorted(steps.values()) == [1, 5]
    assert all(artifact.tensors[f"{slot}/losses"][..., 0].sum() > 0 for slot in steps)


@pytest.mark.parametrize("allocate", ["head", "layer"])
def test_a_quality_is_what_runs_with_the_allocation_had(host, tmp_path, allocate):
    """By default they share out as the calibration did, to the inputs that it had."""
    calls = [{**inputs(host), "height": 32, "guidance_scale": scale} for scale in (5.0, 3.0)]
    artifact = SubblockLSE.calibrate(host.pipe, calls, replace(SETTINGS, allocate=allocate))
    ref = artifact.save(tmp_path / "budgets.safetensors")
    (density,) = SETTINGS.checked
    expected = Budgets.load(ref, host.pipe).at_density(density)
    seen = runs_with(host, calls, method(ref, density=density))
    assert expected.quality == pytest.approx(sum(seen) / 2, abs=1e-3)
    assert expected.extremes == pytest.approx((min(seen), max(seen)), abs=1e-3)
    other = {"head": "layer", "layer": "head"}[allocate]
    asked = runs_with(host, calls, method(ref, density=density, allocate=other))
    assert asked != pytest.approx(seen, abs=1e-2), "what the user asks for is done"


def runs_with(host, calls, method):
    """dB of each input."""
    found = []
    for i, call in enumerate(calls):
        plain = pipeline_samples(host.pipe, call, i)
        with attached(method, host.pipe):
            found.append(mean_psnr(pipeline_samples(host.pipe, call, i), plain))
    return found


def test_the_first_artifacts_are_of_layers_and_of_no_inputs(host, tmp_path):
    """They do not say what they share out within, and have only means of what was seen."""
    calls = [inputs(host), {**inputs(host), "guidance_scale": 3.0}]
    artifact = SubblockLSE.calibrate(host.pipe, calls, replace(SETTINGS, allocate="layer"))
    new = artifact.save(tmp_path / "new.safetensors")
    del artifact.settings["allocate"], artifact.tensors["transformer/ends"]
    artifact.tensors["seen"] = artifact.tensors["seen"].mean(0)
    old = artifact.save(tmp_path / "old.safetensors")
    found, expected = (Budgets.load(ref, host.pipe).at_density(0.4) for ref in (old, new))
    assert (found.quality, found.extremes) == (pytest.approx(expected.quality), None)
    ours, theirs = (runs_with(host, calls[:1], method(ref, density=0.4)) for ref in (old, new))
    assert ours == theirs
    artifact.tensors["transformer/sigmas"] *= 100  # of a model whose levels have no bound
    unsure = artifact.save(tmp_path / "unsure.safetensors")
    with pytest.raises(ValueError, match="where its stages end; calibrate again"):
        Budgets.load(unsure, host.pipe)


def method(ref, **settings):
    return SubblockLSE((0.0, 0.0), (16, 16), False, canary=1, artifact=ref, **settings)


def test_weights_that_are_away_until_they_are_called(host):
    """Sequential offloading: errors are of heads apart, not through the projection."""
    from accelerate import cpu_offload

    for part in host.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=torch.device("cpu"))
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS)
    assert (artifact.tensors["transformer/losses"][..., 0] > 0).all()


def test_weights_of_a_quantised_model_are_no_reason_to_stop(host, tmp_path):
    """torchao's say that they are floating-point numbers, and cannot be looked at."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(host.pipe.transformer, torchao.Int8WeightOnlyConfig())
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS)
    assert (artifact.tensors["transformer/losses"][..., 0] > 0).all()
    ref = artifact.save(tmp_path / "budgets.safetensors")
    with attached(method(ref, density=0.4), host.pipe) as live:
        pipeline_samples(host.pipe, inputs(host), 0)
        assert live.report()["effect"] == "some"
    with attached(method(ref, density=0.4), tiny("wan").pipe):
        pass  # of the same architecture


def test_budgets_are_used(host, tmp_path):
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS)
    ref = artifact.save(tmp_path / "budgets.safetensors")
    allocation = Budgets.load(ref, host.pipe).at_density(0.5)
    with attached(method(ref, density=0.5), host.pipe) as live:
        host.pipe(**inputs(host), generator=torch.Generator().manual_seed(0))
        run = live.report()["runs"][0]
    # what a layer keeps follows its shares: at most a block a row more, of two blocks
    layers = len(denoisers(host.pipe)[0].blocks)
    shares = allocation.shares["transformer"].mean(0)
    for layer, density in run["detail"]["density_by_layer"]:
        assert shares[layer] - 0.26 <= density <= shares[layer] + 0.51
    assert layers == len(run["detail"]["density_by_layer"])
    assert math.isfinite(run["detail"]["output_error"]["mean"])


def test_a_layer_that_reaches_further_gets_more():
    """Two layers with like errors of their own; the second one's reach the output twice."""
    found = losses(
        stages=torch.tensor([[0.03]]),
        reach=torch.tensor([[[0.1, 0.2]]]),
        errors=torch.tensor([[[[0.4, 0.2, 0.0], [0.4, 0.2, 0.0]]]]),
        tried=1,
    )
    assert found.flatten().tolist() == pytest.approx([0.02, 0.01, 0.0, 0.04, 0.02, 0.0])


def test_a_stopped_calibration_goes_on(host, tmp_path):
    calls = [inputs(host), {**inputs(host), "guidance_scale": 3.0}]
    whole = SubblockLSE.calibrate(host.pipe, calls, SETTINGS)
    parts = str(tmp_path)
    SubblockLSE.calibrate(host.pipe, calls[:1], SETTINGS, parts)  # then it was stopped

    runs = []
    unsubscribe = None
    from accel.clock import clock_of

    clock = clock_of(host.pipe)
    unsubscribe = clock.subscribe(lambda event: runs.append(event.kind))
    again = SubblockLSE.calibrate(host.pipe, calls, SETTINGS, parts)
    # only the second input is measured, then both are checked
    assert runs.count("run") == 1 + SETTINGS.stages + 2 * (1 + len(SETTINGS.checked))
    runs.clear()
    SubblockLSE.calibrate(host.pipe, calls, SETTINGS, parts)
    assert not runs
    damaged = max(tmp_path.glob("*.json"), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:100])
    SubblockLSE.calibrate(host.pipe, calls, SETTINGS, parts)
    assert runs.count("run") == 1 + SETTINGS.stages, "one input is measured again"
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, again.tensors[name], rtol=1e-6), name
    unsubscribe()


def test_other_artifacts_are_refused(host, tmp_path):
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS)
    artifact.method = "caches.native:MagCache"
    ref = artifact.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="MagCache"):
        SubblockLSE(density=0.5, artifact=ref).attach(host.pipe)
    artifact.method = SubblockLSE.name()
    ref = artifact.save(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        SubblockLSE(density=0.5, artifact=ref).attach(tiny("ltx").pipe)
    with pytest.raises(ValueError, match=r"calibrated with dense 0.0, not 0.2"):
        SubblockLSE((0.2, 0.0), (16, 16), density=0.5, artifact=ref).attach(host.pipe)
    with pytest.raises(ValueError, match=r"calibrated with blocks \[16, 16\], not \(32, 16\)"):
        SubblockLSE(blocks=(32, 16), density=0.5, artifact=ref).attach(host.pipe)


def test_kept_parts_are_of_one_schedule():
    """Not only of a class of schedulers: other noise levels, other figures."""
    host = tiny("wan")
    keys = []
    for shift in (3.0, 3.0, 12.0):
        config = host.pipe.scheduler.config
        host.pipe.scheduler = type(host.pipe.scheduler).from_config(config, flow_shift=shift)
        keys.append(_key(host.pipe, SETTINGS))
    assert keys[0] == keys[1] != keys[2]


def test_samples_that_are_not_finite_are_no_measurement(host, monkeypatch):
    broken = torch.full((4,), math.nan)
    with pytest.raises(ValueError, match="not finite"):
        _decibels(broken, torch.zeros(4))
    assert _decibels(torch.zeros(4), torch.zeros(4)) == pytest.approx(120)
    samples = iter([torch.zeros(4), broken])
    monkeypatch.setattr(calibrate, "_sample", lambda *_: next(samples))
    live = SimpleNamespace(
        begin=lambda: None, end=lambda: {"transformer": {}}, stages=lambda slot: [[0]], guided=True
    )
    with pytest.raises(ValueError, match="not finite"):
        calibrate._measure(host.pipe, live, {}, 0, None)


def test_by_default_the_policys_dense_steps_are_left_out():
    assert CalibrationSettings().dense == SubblockLSE().dense[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"ladder": (0.5, 0.2, 1.0)},
        {"ladder": (0.2, 0.5)},
        {"ladder": (0.0, 1.0)},
        {"tried": 0.25},
        {"tried": 1.0},
        {"checked": ()},
        {"checked": (0.01,)},
        {"stages": 0},
        {"queries": 0},
        {"allocate": "block"},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="CalibrationSettings"):
        CalibrationSettings(**settings)


def test_no_inputs_are_refused(host):
    with pytest.raises(ValueError, match="input"):
        SubblockLSE.calibrate(host.pipe, [])
