"""Calibration: errors are those the policy then makes, and a stopped one goes on."""

from __future__ import annotations

import math

import pytest
import torch

from accel.denoiser import denoisers
from accel.method import attached
from accel.testing import assert_same_state, host_state, tiny
from sparse_attn._live import Place
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.budgets import Budgets
from sparse_attn.calibrate import CalibrationSettings, head_errors
from sparse_attn.estimators import block_scores, complement
from sparse_attn.kernels import reference
from sparse_attn.subblock_lse import SubblockLSE
from sparse_attn.token_order import gilbert

SETTINGS = CalibrationSettings(ladder=(0.25, 0.5, 1.0), stages=2, blocks=(16, 16))


def inputs(host):
    """Without embeddings, which are no JSON: texts are the pipeline's business."""
    return {k: v for k, v in host.inputs.items() if not isinstance(v, torch.Tensor)}


@pytest.fixture
def host(monkeypatch):
    """A tiny Wan whose prompts are given once and for all."""
    host = tiny("wan")
    host.run()
    call = type(host.pipe).__call__
    embeds = {k: v for k, v in host.inputs.items() if isinstance(v, torch.Tensor)}
    monkeypatch.setattr(
        type(host.pipe), "__call__", lambda self, **kwargs: call(self, **embeds, **kwargs)
    )
    return host


@pytest.mark.parametrize("pooled", [False, True])
def test_errors_are_of_the_attention_through_the_projection(pooled):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=g) for _ in "qkv")
    weight = torch.randn(16, 16, generator=g)
    place = Place((4, 4, 4), gilbert((4, 4, 4)), 0, (16, 16), "transformer", 0, 1, 0, 1, 0.5, "")
    settings = CalibrationSettings((0.5, 1.0), 1, queries=4, blocks=(16, 16), pooled=pooled)
    found = head_errors(q, k, v, place, settings, weight)
    keep = keep_share(block_scores(q, k, v, (16, 16), pooled), 0.5, "head")
    more = complement(k, v, keep, 16) if pooled else None
    out = reference.attend(q, k, v, BlockMap(keep, 16, 16, 64, 64), more).out
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    projected = [
        x[0].transpose(0, 1)[:, h] @ weight[:, 8 * h : 8 * h + 8].T
        for x in (out - right, right)
        for h in range(2)
    ]
    squared = [x.square().sum().item() for x in projected]
    whole = squared[2] + squared[3]
    assert found[:, 0].tolist() == pytest.approx([s / whole for s in squared[:2]], rel=1e-4)
    assert found[:, 1].tolist() == [0, 0]


def test_budgets_are_measured_kept_and_used(host, tmp_path):
    state = host_state(host.pipe)
    parts = tmp_path / "parts"
    artifact = SubblockLSE.calibrate(host.pipe, [inputs(host)], SETTINGS, str(parts))
    assert_same_state(state, host_state(host.pipe))
    errors = artifact.tensors["transformer/errors"]
    assert errors.shape == (2, 3, 2, 3)  # stages, layers, heads, ladder
    assert (errors[..., 0] >= errors[..., 1]).all()
    assert (errors[..., -1] == 0).all()
    ref = artifact.save(tmp_path / "budgets.safetensors")
    allocation = Budgets.load(ref, host.pipe).at_density(0.5)
    method = SubblockLSE((0.0, 0.0), (16, 16), False, canary=1, density=0.5, artifact=ref)
    with attached(method, host.pipe) as live:
        host.pipe(**inputs(host), generator=torch.Generator().manual_seed(0))
        run = live.report()["runs"][0]
    # what a layer keeps follows its shares: at most a block a row more, of two blocks
    layers = len(denoisers(host.pipe)[0].blocks)
    shares = allocation.shares_by_slot["transformer"].mean((0, 2))
    for layer, density in run["detail"]["density_by_layer"]:
        assert shares[layer] - 0.26 <= density <= shares[layer] + 0.51
    assert layers == len(run["detail"]["density_by_layer"])
    assert math.isfinite(run["detail"]["output_error"]["mean"])


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
    unsubscribe()
    assert runs.count("run") == 1  # only the second input ran
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, again.tensors[name], rtol=1e-6), name


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


@pytest.mark.parametrize(
    "settings",
    [
        {"ladder": (0.5, 0.2, 1.0)},
        {"ladder": (0.2, 0.5)},
        {"ladder": (0.0, 1.0)},
        {"stages": 0},
        {"queries": 0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="CalibrationSettings"):
        CalibrationSettings(**settings)


def test_no_inputs_are_refused(host):
    with pytest.raises(ValueError, match="input"):
        SubblockLSE.calibrate(host.pipe, [])
