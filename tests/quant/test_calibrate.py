"""Calibration: what each part does, resuming, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, HeunDiscreteScheduler
from safetensors.torch import save

from accel.denoiser import denoisers
from accel.method import Recipe, attached
from accel.settings import Settings
from accel.testing import tiny
from caches.interval import IntervalCache
from quant._activations import Groups, activations, static_grids
from quant._dataflow import watch
from quant._program import program
from quant._quantise import OneDenoiser
from quant._reconstruction import Rounding, distance, reconstruct_temporal
from quant._recording import LayerInputs, record
from quant._rounding import nearest, per_channel, searched_scale, static_grid
from quant._stored import quantised, stored
from quant.calibrate import TFMQCalibration
from samplers.swap import SwapScheduler


def test_first_and_last_layer_stay_whole(calibrated):
    layers = calibrated("dit", temporal="plain")[0].settings["layers"]
    assert "transformer.pos_embed.proj" not in layers
    assert "transformer.proj_out_2" not in layers
    assert "transformer.transformer_blocks.0.ff.net.2" in layers


@pytest.mark.parametrize(
    ("name", "first"), [("sdxl", "unet.conv_in"), ("cogvideox", "transformer.patch_embed.proj")]
)
def test_the_first_layer_is_the_first_of_the_sample(name, first, calibrated):
    """Layers of the text and of sizes run before it."""
    layers = calibrated(name)[0].settings["layers"]
    assert first not in layers
    assert any("text_proj" in p or "add_embedding" in p or "attn2.to_k" in p for p in layers)


def test_half_precision_leaves_the_same_layers_to_the_cache():
    """A table and packed weights are weighed by their own bytes, not by those of whole weights."""
    host, kept = tiny("dit"), {}
    plain = {k: v for k, v in host.inputs.items() if k != "output_type"}
    (denoiser,) = denoisers(host.pipe)
    for bits in (4, 8):
        seen = record(host.pipe, denoiser, [plain], Recipe(()), calls=1)
        one = OneDenoiser(TFMQCalibration(bits=bits), denoiser, seen, None, print)
        path = next(p for p, c in one.plan.served.items() if "timestep" in c.labels)
        row = sum(t.nbytes // len(t) for t in one.plan.served[path].tensors)
        packed = sum(p.numel() for p in one.teacher.get_submodule(path).parameters()) * bits // 8
        for steps in (packed // row, packed // row + 1):
            seen.times = list(range(steps))
            kept[bits, steps * row > packed] = one._to_be_cached(path)
        one.teacher.to(torch.bfloat16)
        for larger in (False, True):
            seen.times = list(range(packed // row + larger))
            assert one._to_be_cached(path) == kept[bits, larger]
        one.teacher.to(torch.float32)
    assert kept == {(4, False): True, (4, True): False, (8, False): True, (8, True): False}


def test_temporal_modules_stay_whole_for_the_cache(calibrated):
    layers = calibrated("dit", temporal="cache")[0].settings["layers"]
    assert not any("norm1" in path for path in layers)
    assert any(
        "norm1" in path for path in calibrated("dit", temporal="plain")[0].settings["layers"]
    )


class Temporal(torch.nn.Module):
    """Two projections of one embedding of the time, as in a UNet."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(8, 16)
        self.first, self.second = torch.nn.Linear(16, 12), torch.nn.Linear(16, 12)

    def forward(self, x, timestep):
        base = torch.exp(-torch.arange(4.0))
        wave = timestep[:, None] * base
        h = torch.nn.functional.silu(self.embed(torch.cat((wave.sin(), wave.cos()), 1)))
        return x * self.first(h) + self.second(h)


def test_reconstruction_of_temporal_modules_lowers_their_error():
    torch.manual_seed(0)
    module = Temporal().requires_grad_(False)
    sources, x = {"timestep": torch.tensor([3.0])}, torch.randn(1, 12)
    plan = program(watch(module, lambda: module(x, **sources), sources), module)
    assert plan.needed == {"first", "second"}
    weights = {n: p for n, p in module.named_parameters() if n.endswith("weight")}
    scales = {n: searched_scale(w, 4) for n, w in weights.items()}
    times = [torch.tensor([float(t)]) for t in range(0, 20, 2)]
    everything = dict(module.named_parameters())
    wanted = plan.play(everything.__getitem__, {}, times)

    def error(codes):
        made = {n: c * per_channel(scales[n], 2) for n, c in codes.items()}
        outputs = plan.play({**everything, **made}.__getitem__, {}, times)
        pairs = ((a[p][0], b[p][0]) for a, b in zip(outputs, wanted, strict=True) for p in a)
        return float(sum((a - b).pow(2).sum() for a, b in pairs))

    rounding = Rounding(weights, scales, dict.fromkeys(weights, 4))
    reconstruct_temporal(plan, {}, times, rounding, everything, 150)
    plain = {n: nearest(w, scales[n], 4) for n, w in weights.items()}
    assert error(rounding.codes()) < 0.7 * error(plain)


def test_rounding_learns_from_outputs():
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    mixing = torch.randn(16, 16) / 4 + torch.eye(16)
    inputs = torch.randn(256, 16) @ mixing
    scale = searched_scale(weight, 4)
    rounding = Rounding({"w": weight}, {"w": scale}, {"w": 4})
    wanted = inputs @ weight.t()
    rounding.fit(lambda soft, step: distance(inputs @ soft["w"].t(), wanted), 300)
    codes = rounding.codes()["w"]
    error = distance(inputs @ (codes * scale[:, None]).t(), wanted)
    plain = distance(inputs @ (nearest(weight, scale, 4) * scale[:, None]).t(), wanted)
    assert float(error) < 0.8 * float(plain)
    assert (codes - (weight / scale[:, None])).abs().max() < 1.5  # a neighbour on the grid


def test_resumes_where_it_stopped(tmp_path, fit):
    class Stopped(Exception):
        pass

    said = []

    def stop(line):
        said.append(line)
        if "2/3" in line:
            raise Stopped

    how = TFMQCalibration(rounding="gptq", calls=1)
    whole = fit(how, tiny("dit"), tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(how, tiny("dit"), tmp_path / "parts", stop)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.safetensors")}
    assert len(before) == 2
    again = fit(how, tiny("dit"), tmp_path / "parts")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.safetensors")}
    assert {k: after[k] for k in before} == before
    assert whole.tensors.keys() == again.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name


def test_parts_of_another_grid_or_with_other_names_are_not_used(tmp_path, fit):
    how = TFMQCalibration(rounding="nearest", calls=1)
    whole = fit(how, tiny("dit"), tmp_path)
    host = tiny("dit")
    host.pipe.scheduler = HeunDiscreteScheduler.from_config(host.pipe.scheduler.config)
    with pytest.raises(ValueError, match="of another scheduler"):
        fit(how, host, tmp_path)
    part = next(tmp_path.glob("transformer.*.safetensors"))
    part.write_bytes(save({"codes": torch.zeros(1)}))
    again = fit(how, tiny("dit"), tmp_path)
    assert all(torch.equal(x, again.tensors[name]) for name, x in whole.tensors.items())


def test_a_folder_of_another_calibration_is_refused(tmp_path, fit):
    fit(TFMQCalibration(rounding="nearest", calls=1), tiny("dit"), tmp_path)
    with pytest.raises(ValueError, match="another calibration"):
        fit(TFMQCalibration(rounding="nearest", calls=1, bits=4), tiny("dit"), tmp_path)
    fit(TFMQCalibration(rounding="nearest", calls=1, activations="static"), tiny("dit"), tmp_path)


def test_calibrates_under_the_cache_that_it_is_for(tmp_path, fit):
    how = TFMQCalibration(rounding="nearest", calls=4, activations="groups")
    recipe = Recipe((IntervalCache(2),))
    whole = fit(how, tiny("dit"), tmp_path / "whole")
    cached = fit(how, tiny("dit"), tmp_path / "cached", recipe=recipe)
    assert whole.settings["layers"].keys() == cached.settings["layers"].keys()
    scales = [n for n in whole.tensors if n.endswith(":ascale")]
    assert scales
    # what is not computed at every step is not measured there
    assert not all(torch.equal(whole.tensors[n], cached.tensors[n]) for n in scales)


@pytest.mark.parametrize("recipe", [IntervalCache(2, parts="output"), IntervalCache(2)], ids=str)
def test_what_a_cache_leaves_out_is_looked_at_in_the_next_step(recipe, tmp_path, fit):
    """With every second step kept, and computed at the others only."""
    host, rows = tiny("dit"), []
    host.inputs["num_inference_steps"] = 8
    plain = {k: v for k, v in host.inputs.items() if k != "output_type"}
    seen = record(host.pipe, denoisers(host.pipe)[0], [plain], Recipe((recipe,)), calls=4)
    rows = {p: len({time for time, _ in x.rows}) for p, x in seen.layers.items()}
    assert seen.calls
    assert min(rows.values()) >= 3, rows


@pytest.mark.parametrize(("steps", "calls"), [(4, 4), (9, 5), (15, 8), (20, 8), (3, 8)])
def test_as_many_calls_are_kept_as_asked(steps, calls):
    host = tiny("dit")
    plain = {**host.inputs, "num_inference_steps": steps}
    del plain["output_type"]
    seen = record(host.pipe, denoisers(host.pipe)[0], [plain], Recipe(()), calls=calls)
    assert len({call.time for call in seen.calls}) == min(steps, calls)


def test_the_grid_is_that_of_the_recipe(tmp_path, fit):
    recipe = Recipe((SwapScheduler("DPMSolverMultistepScheduler", steps=6),))
    made = fit(TFMQCalibration(rounding="nearest", calls=1), tiny("dit"), tmp_path, recipe=recipe)
    assert len(made.grid) == len(made.tensors["transformer:times"]) == 6


class Numbers(DDIMPipeline):
    """Gives its denoiser the timestep as a number."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=4, generator=None, **rest):
        x = torch.randn(1, 3, 8, 12, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, int(t)).sample, t, x).prev_sample
        return (x,)


def test_timesteps_that_are_numbers(tmp_path):
    host = tiny("ddim")
    pipe = Numbers(host.pipe.unet, host.pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    how = TFMQCalibration(rounding="adaround", steps=2, calls=1, temporal="tiar")
    made = how.fit(pipe, [{"num_inference_steps": 2}], str(tmp_path), say=lambda _: None)
    assert made.settings["temporal_error"]["unet"] > 0


def test_inputs_that_are_not_finite_are_told(tmp_path, fit):
    host = tiny("dit")
    with torch.no_grad():
        host.pipe.transformer.transformer_blocks[0].ff.net[2].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"inputs of transformer_blocks\S+ are not finite"):
        fit(TFMQCalibration(calls=1), host, tmp_path)


def test_a_part_of_the_schedule_is_enough(tmp_path, fit):
    """Image to image of little strength begins after the middle of the last part."""
    host = tiny("sd-img2img")
    host.inputs |= {"num_inference_steps": 20, "strength": 0.1}
    made = fit(TFMQCalibration(rounding="nearest", calls=4), host, tmp_path)
    assert made.settings["layers"]


def test_a_denoiser_that_never_runs_is_left_as_it_is(tmp_path, fit):
    host, said = tiny("wan22"), []
    host.pipe.register_to_config(boundary_ratio=0.0)
    made = fit(TFMQCalibration(rounding="nearest", calls=1), host, tmp_path, said.append)
    assert {path.partition(".")[0] for path in made.settings["layers"]} == {"transformer"}
    assert any("transformer_2: never called" in line for line in said)


def test_no_call_among_those_kept_is_told(tmp_path, fit):
    host = tiny("dit")
    host.inputs["num_inference_steps"] = 8
    with pytest.raises(ValueError, match="keep more calls"):
        fit(
            TFMQCalibration(calls=2),
            host,
            tmp_path,
            recipe=Recipe((IntervalCache(9, parts="output"),)),
        )


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_half_precision(rounding, tmp_path, fit):
    """Rounds as well as in float32, but for what half precision itself is off."""
    how = TFMQCalibration(bits=4, rounding=rounding, temporal="tiar", calls=1, steps=20)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        host = tiny("dit")
        host.pipe.transformer.to(dtype)
        host.pipe.vae.to(dtype)
        made = fit(how, host, tmp_path / str(dtype))
        errors.append(made.settings["temporal_error"]["transformer"])
    assert errors[1] < 1.2 * errors[0]


def test_what_is_attached_is_told(tmp_path, fit):
    host = tiny("dit")
    with attached(IntervalCache(2), host.pipe), pytest.raises(ValueError, match="detach caches"):
        fit(TFMQCalibration(), host, tmp_path)


def test_adapters_are_refused(tmp_path, fit):
    from peft import LoraConfig

    host = tiny("wan")
    host.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="fuse"):
        TFMQCalibration().fit(host.pipe, [{}], str(tmp_path))


def test_groups_cover_their_steps_and_a_neighbour():
    times = torch.tensor([9.0, 7.0, 5.0, 3.0])
    seen = LayerInputs()
    for time, width in zip(times.tolist(), (1.0, 2.0, 3.0, 4.0), strict=True):
        seen.see(time, torch.tensor([-width, width]))
    scale, zero = static_grids(seen, times, torch.tensor([0, 0, 1, 1]))
    assert scale.tolist() == pytest.approx([2 * 3 / 255, 2 * 4 / 255])  # 0: 9, 7 and next 5
    assert all(abs(z - 127.5) <= 0.5 for z in zero.tolist())


def test_every_other_input_is_held_out_or_sample_of_a_single_one():
    host = tiny("dit")
    plain = {k: v for k, v in host.inputs.items() if k != "output_type"}

    def seen(inputs):
        (denoiser,) = denoisers(host.pipe)
        return record(host.pipe, denoiser, inputs, Recipe(()), calls=2)

    one, two = seen([plain]), seen([plain, plain])
    for path, found in two.layers.items():
        assert found.fitted.low == one.layers[path].low  # of the first of both
        assert len(found.rows) == len(one.layers[path].rows)  # of the second
    ranges = [(x.low[t], x.fitted.low[t]) for x in one.layers.values() for t in x.low]
    assert all(low <= fitted for low, fitted in ranges)
    assert any(low < fitted for low, fitted in ranges)


def test_schemes_are_chosen_on_what_is_held_out():
    """The second group's own grid, fitted without it, clips a held-out input; one wide scale does
    not. Fitted with it, the group's would look better."""
    times, seen, fitted = [3.0, 2.0, 1.0, 0.0], LayerInputs(), LayerInputs()
    for time, width in zip(times, (64.0, 1.0, 1.0, 1.0), strict=True):
        fitted.see(time, torch.tensor([-width, width]))
        seen.see(time, torch.tensor([-width, width]))
    held = torch.linspace(-8, 8, 64).view(32, 2)
    seen.see(0.0, held)
    seen.rows = [(0.0, held)]
    convolution, groups = torch.ones(3, 2, 1, 1), Groups(times, 2)
    scales = {}
    for name in ("fitted", "everything"):
        seen.fitted = fitted if name == "fitted" else None
        grid = activations("auto", convolution, seen, groups)[1]
        assert grid is not None
        scales[name] = len(grid[0])
    assert scales == {"fitted": 1, "everything": 2}


def test_groups_are_of_neighbours_even_of_several_grids():
    groups = Groups([9.0, 6.0, 3.0, 8.0, 5.0, 2.0], 2)
    assert groups.of == {9.0: 0, 8.0: 0, 6.0: 0, 5.0: 1, 3.0: 1, 2.0: 1}


def test_every_noise_level_counts_as_much():
    """One scale is better where inputs are large, and useless where they are small."""
    times, seen = [1.0, 0.0], LayerInputs()
    for time, size in ((1.0, 200.0), (0.0, 0.01)):
        x = size * torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        seen.see(time, x)
        seen.rows.append((time, x))
    scheme, _ = activations("auto", torch.eye(4), seen, Groups(times, 1))
    assert scheme == "token"
    seen.rows = []  # of a layer that ran in no call that was kept
    assert activations("auto", torch.eye(4), seen, Groups(times, 1))[0] == "static"


def test_layers_that_integers_make_slower_stay_whole(tmp_path, fit, monkeypatch):
    times = {True: (1.0, 2.0), False: (2.0, 1.0)}
    monkeypatch.setattr(OneDenoiser, "seconds", lambda self, path, *_: times[".ff." in path])
    said = []
    how = TFMQCalibration(rounding="nearest", calls=1, only_faster=True)
    layers = fit(how, tiny("dit"), tmp_path, said.append).settings["layers"]
    assert layers
    assert all(".ff." in path for path in layers)
    assert any(f"{len(layers)} of " in line and "stay as they are" in line for line in said)


def test_layers_that_stay_whole_are_whole_for_all_that_follows(tmp_path, fit, monkeypatch):
    """For its error, for the parts behind, and when a stopped calibration goes on."""
    slower, tried = ("norm1", "proj_out_1", "attn1"), []

    def seconds(self, path, *_):
        tried.append(path)
        return (2.0, 1.0) if any(name in path for name in slower) else (1.0, 2.0)

    monkeypatch.setattr(OneDenoiser, "seconds", seconds)
    how = TFMQCalibration(bits=4, calls=1, temporal="tiar", steps=2, only_faster=True)
    made = fit(how, tiny("dit"), tmp_path / "a")
    assert made.settings["temporal_error"]["transformer"] == 0
    layers = made.settings["layers"]
    assert not any(name in path for path in layers for name in slower)
    planned = replace(how, only_faster=False, plan=Settings(dict.fromkeys(layers, 4)))
    same = fit(planned, tiny("dit"), tmp_path / "b")
    for name, tensor in made.tensors.items():
        assert torch.equal(tensor, same.tensors[name]), name
    tried.clear()
    again = fit(how, tiny("dit"), tmp_path / "a")
    assert tried == []
    assert again.settings["layers"] == made.settings["layers"]


def test_a_tiny_model_has_no_layer_that_integers_make_faster(tmp_path, fit):
    """Eight rows of 32 numbers: quantising them alone takes longer than the layer."""
    how = TFMQCalibration(rounding="nearest", calls=1, only_faster=True)
    with pytest.raises(ValueError, match="no layer is left"):
        fit(how, tiny("dit"), tmp_path)


def test_parts_of_another_model_are_refused(tmp_path, fit):
    how = TFMQCalibration(rounding="nearest", calls=1)
    fit(how, tiny("dit"), tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        fit(how, tiny("dit", seed=1), tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        fit(how, tiny("dit"), tmp_path)


def test_a_damaged_part_is_made_again(tmp_path, fit):
    how = TFMQCalibration(rounding="nearest", calls=1)
    whole = fit(how, tiny("dit"), tmp_path)
    part = next(tmp_path.glob("transformer.*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    again = fit(how, tiny("dit"), tmp_path)
    assert all(torch.equal(x, again.tensors[name]) for name, x in whole.tensors.items())


def test_skips_have_grids_of_their_own(calibrated):
    split = calibrated("ddim", skips="split")[0]
    layers = {p: how for p, how in split.settings["layers"].items() if "split" in how}
    assert layers
    assert all("up_blocks" in p and p.endswith("conv_shortcut") for p in layers)
    for path in layers:
        pieces = (f"{path}.hidden", f"{path}.skip")
        assert {f"{p}:ascale" for p in pieces} <= split.tensors.keys()
        assert split.tensors[f"{pieces[0]}:q"].shape[1] == layers[path]["split"]
    joint = calibrated("ddim", skips="joint")[0]
    assert joint.settings["layers"].keys() == split.settings["layers"].keys()
    assert not any("split" in how for how in joint.settings["layers"].values())
    whole = calibrated("ddim")[0]
    assert whole.settings["layers"].keys() == split.settings["layers"].keys() - layers


def test_a_quiet_skip_beside_loud_hidden_states_keeps_its_values():
    """The error of one grid for both is the loud one's step; two grids leave each its own."""
    torch.manual_seed(0)
    own = torch.nn.Conv2d(12, 6, 1).requires_grad_(False)
    own.weight[:, :8] /= 64  # so that both pieces matter as much in the output
    x = torch.cat((64 * torch.randn(2, 8, 5, 5), torch.randn(2, 4, 5, 5)), 1)
    errors = {}
    for split in (0, 8):
        pieces = x.tensor_split([split], 1) if split else [x]
        weights = own.weight.tensor_split([split], 1) if split else [own.weight]
        scales = [per_channel(searched_scale(w, 8), 4).expand_as(w) for w in weights]
        scale = torch.cat(scales, 1)
        how = {"bits": 8, "scheme": "static", **({"split": split} if split else {})}
        grids = [static_grid(p.min()[None], p.max()[None]) for p in pieces]
        tensors = stored("c", how, nearest(own.weight, scale, 8), scale, grids)
        made = {}
        for kernel in ("int8", "reference"):
            layer = quantised(own, tensors, "c", how)
            for piece in layer.pieces():
                piece.kernel = kernel
            made[kernel] = layer(x)
        torch.testing.assert_close(made["int8"], made["reference"])
        errors[split] = float((made["int8"] - own(x)).pow(2).mean())
    assert errors[8] < errors[0] / 4


@pytest.mark.parametrize("name", ["groups", "steps", "calls"])
def test_bad_settings(name):
    with pytest.raises(ValueError, match=name):
        TFMQCalibration(**{name: 0})
    with pytest.raises(ValueError, match="no inputs"):
        TFMQCalibration().fit(tiny("dit").pipe, [], "nowhere")
