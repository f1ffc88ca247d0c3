"""A denoiser's calls made again, and weights beside its own."""

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import nn

from accel.denoiser import denoisers
from accel.patch import Patch
from accel.testing import TINY_NAMES, assert_equal, tiny
from samplers.distillation import HIGH, LOW, Call, Weights, lora_layers, merge


@pytest.mark.parametrize("name", ["dit", "sd", "wan", "flux"])
def test_a_call_made_again_gives_the_same(name):
    _made_again(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_call_made_again_gives_the_same_everywhere(name):
    _made_again(name)


def _made_again(name):
    host = tiny(name)
    if len(denoisers(host.pipe)) > 1:
        with pytest.raises(ValueError, match="2 denoisers"):
            Call.of(host.pipe, host.inputs)
        return
    first = _first_output(host)
    seeded = host.inputs | {"generator": torch.Generator().manual_seed(0)}
    call = Call.of(host.pipe, seeded)
    x = denoisers(host.pipe)[0].sample(call.args, call.kwargs)
    told = torch.as_tensor(call.denoiser.argument("timestep", call.args, call.kwargs)).flatten()[0]
    time = told / call.scale
    grid = host.pipe.scheduler.timesteps.float()
    assert ((grid - time.float()).abs() <= 2**-22 * time).any(), "a time of the grid, but rounded"
    assert call.scale == pytest.approx(0.001 if name == "flux" else 1), "Flux is told sigmas"
    again = call(x, time.expand(len(x)))
    assert_equal(first[:, : x.shape[1]].float(), again, "the first call")
    other = call(x, (time / 2).expand(len(x)))
    assert not torch.equal(other, again), "the time is not passed on"


def test_the_scale_of_times_is_known_inside_the_grid():
    host = tiny("flux")
    pipe = FluxImg2ImgPipeline(**host.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    call = Call.of(pipe, host.inputs | {"image": torch.rand(1, 3, 16, 24), "strength": 0.5})
    assert call.scale == pytest.approx(0.001)


@pytest.mark.parametrize(("name", "told"), [("dit", 0), ("sd", 0), ("wan", 0), ("flux", 1)])
def test_calls_that_ask_the_network_twice_are_refused(name, told):
    """Doubled batches, with and without a pipeline that says so, two calls, and none."""
    host = tiny(name)
    assert host.inputs["guidance_scale"] > 1
    plain = Call.without_guidance(host.pipe, host.inputs | {"guidance_scale": 1.0})
    if told:
        assert Call.without_guidance(host.pipe, host.inputs).shape == plain.shape
    else:
        with pytest.raises(ValueError, match="leave guidance_scale out"):
            Call.without_guidance(host.pipe, host.inputs)


def test_an_adapter_is_no_part_of_what_is_trained():
    peft = pytest.importorskip("peft")
    network = denoisers(tiny("dit").pipe)[0].module
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    peft.inject_adapter_in_model(config, network, "mine")
    for rank in (None, 2):
        with pytest.raises(ValueError, match="has an adapter"):
            Weights(network, rank)


def _first_output(host):
    """What the denoiser gives at the first call of a whole run."""
    outputs, patch = [], Patch()

    def layer(call_next, *args, **kwargs):
        out = call_next(*args, **kwargs)
        outputs.append(out[0] if isinstance(out, tuple) else out.sample)
        return out

    patch.around_call(denoisers(host.pipe)[0].module, layer)
    host.run()
    patch.undo()
    return outputs[0]


def test_weights_begin_as_the_network_s_own():
    net = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Conv1d(1, 1, 3))
    full, low = Weights(net), Weights(net, rank=2)
    own = dict(net.named_parameters())
    assert set(full.merged()) == set(low.merged()) == set(own)
    assert low.names == ["0.weight" + LOW, "0.weight" + HIGH], "of linear layers only"
    for weights in (full, low):
        for name, value in weights.merged().items():
            torch.testing.assert_close(value, own[name], atol=0, rtol=0)
            assert value is not own[name]


def test_a_low_rank_change_is_a_product():
    base = {"a.weight": torch.randn(5, 6)}
    low, high = torch.randn(2, 6), torch.randn(5, 2)
    merged = dict(merge(base, {"a.weight" + LOW: low, "a.weight" + HIGH: high}))
    torch.testing.assert_close(merged["a.weight"], base["a.weight"] + high @ low)


def test_gradients_reach_what_is_trained_and_nothing_else():
    net = nn.Sequential(nn.Linear(4, 3))
    for rank in (None, 2):
        weights = Weights(net, rank)
        torch.func.functional_call(net, weights.merged(), torch.randn(7, 4)).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in weights.parameters())
        assert all(p.grad is None for p in net.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no weights"):
        Weights(nn.Sequential(nn.Conv1d(1, 1, 3)), rank=2)


def test_a_pipeline_that_makes_no_call_is_refused():
    host = tiny("dit")
    host.pipe.scheduler.set_timesteps = lambda *a, **k: None
    host.pipe.scheduler.timesteps = torch.tensor([])
    with pytest.raises(ValueError, match="did not call"):
        Call.of(host.pipe, host.inputs)


def test_low_rank_students_load_as_lora():
    pytest.importorskip("peft")
    host = tiny("wan")
    module = denoisers(host.pipe)[0].module
    weights = Weights(module, rank=2)
    with torch.no_grad():
        for value in weights.values:
            value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    patch, plain = Patch(), host.run()
    for name, value in merge(dict(module.named_parameters()), weights.tensors()):
        patch.write(module.get_parameter(name), value.detach())
    ours = host.run()
    patch.undo()
    assert not torch.allclose(plain, ours, atol=1e-2)
    host.pipe.load_lora_weights(lora_layers(weights.tensors(), "transformer"))
    torch.testing.assert_close(host.run(), ours, atol=1e-4, rtol=1e-4)


def test_full_students_are_no_lora():
    with pytest.raises(ValueError, match="full weight"):
        lora_layers({"a.weight": torch.zeros(2, 2)}, "unet")
