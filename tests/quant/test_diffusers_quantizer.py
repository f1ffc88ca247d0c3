"""quant_method "tfmq" through stock from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from diffusers.quantizers import auto

from accel.method import attached
from accel.testing import assert_equal, tiny
from quant._layers import Bins
from quant.diffusers_quantizer import BINS, TFMQConfig, chosen, connect, save_quantised
from quant.temporal_cache import TemporalCache
from quant.tfmq import TFMQ


@pytest.mark.parametrize(("name", "bits"), [("dit", 4), ("dit", 8), ("ddim", 4)])
def test_saved_and_loaded_it_gives_the_same_bits(name, bits, calibrated, tmp_path):
    artifact, ref = calibrated(name, bits=bits)
    host = tiny(name)
    with attached(TFMQ(ref), host.pipe):
        wanted = host.run()
    save_quantised(host.pipe, artifact, tmp_path)
    slot = "transformer" if name == "dit" else "unet"
    own = getattr(host.pipe, slot)
    loaded = type(own).from_pretrained(tmp_path / slot)
    setattr(host.pipe, slot, loaded)
    assert_equal(wanted, host.run(), "loaded")
    loaded.save_pretrained(tmp_path / "again")
    again = type(own).from_pretrained(tmp_path / "again")
    assert loaded.state_dict().keys() == again.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert_equal(value, again.state_dict()[key], key)
    written = json.loads((tmp_path / slot / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "tfmq"


def test_a_whole_pipeline_loads(calibrated, tmp_path):
    artifact, ref = calibrated("dit")
    host = tiny("dit")
    with attached(TFMQ(ref), host.pipe):
        wanted = host.run()
    save_quantised(host.pipe, artifact, tmp_path)
    host.pipe = DiffusionPipeline.from_pretrained(tmp_path)
    host.pipe.set_progress_bar_config(disable=True)
    assert_equal(wanted, host.run(), "the pipeline")


def test_scales_are_exact_in_half_precision(calibrated, tmp_path):
    host = tiny("dit")
    save_quantised(host.pipe, calibrated("dit")[0], tmp_path)
    place, load = tmp_path / "transformer", DiTTransformer2DModel.from_pretrained
    whole, half = load(place), load(place, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    compared = 0
    for key, value in whole.state_dict().items():
        if not value.is_floating_point():
            assert_equal(value, half.state_dict()[key], key)
            compared += key.endswith("wscale")
    assert compared > 0
    host.pipe.transformer = half
    host.pipe.vae.to(torch.bfloat16)
    assert host.run().isfinite().all()


def test_a_copy_hears_of_its_own_timesteps(calibrated, tmp_path):
    """Weights that are packed for the kernel can be neither copied nor pickled; they are again."""
    host = tiny("ddim")
    save_quantised(host.pipe, calibrated("ddim", activations="groups", groups=4)[0], tmp_path)
    loaded = host.pipe.unet = type(host.pipe.unet).from_pretrained(tmp_path / "unet")
    wanted = host.run()
    host.pipe.unet = copy.deepcopy(loaded)
    del loaded
    assert_equal(wanted, host.run(), "the copy")
    torch.save(host.pipe.unet, io.BytesIO())


def test_the_timestep_is_found_wherever_it_stands():
    class Model(torch.nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            return hidden_states

    model = Model()
    bins = Bins(2).fill(torch.tensor([900.0, 100.0]), torch.tensor([0, 1]))
    model.add_module(BINS, bins)
    connect(model)
    x = torch.zeros(1)
    model(x, x, torch.tensor([120.0]))
    assert bins.index.item() == 1
    model(x, x, timestep=880)
    assert bins.index.item() == 0
    model(x, x, torch.tensor([[0.0, 0.0, 900.0]]))  # tokens of a given frame have none
    assert bins.index.item() == 0


def test_gradients_are_refused_not_lost(calibrated, tmp_path):
    host = tiny("dit")
    save_quantised(host.pipe, calibrated("dit")[0], tmp_path)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        wanted = model(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, dtype=torch.long))
    out = model(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, dtype=torch.long))
    assert_equal(wanted.sample, out.sample, "with gradients on")
    with pytest.raises(RuntimeError, match="no gradients"):
        out.sample.sum().backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_on_the_fly(bits, tmp_path):
    host = tiny("dit")
    plain = host.run()
    host.pipe.save_pretrained(tmp_path)
    asked = PipelineQuantizationConfig(
        quant_mapping={"transformer": TFMQConfig(bits=bits, skip=["proj_out", "pos_embed"])}
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=asked)
    pipe.set_progress_bar_config(disable=True)
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "qweight")]
    assert len(layers) > 20
    assert all(m.qweight.nbytes == m.shape[0] * m.shape[1] * bits // 8 for m in layers)
    host.pipe = pipe
    error = float((host.run() - plain).abs().max())
    assert 0 < error < {4: 0.3, 8: 0.03}[bits]


def test_one_config_for_several_models(tmp_path):
    host = tiny("dit")
    host.pipe.save_pretrained(tmp_path / "plain")
    config = TFMQConfig()
    asked = PipelineQuantizationConfig(quant_mapping={"transformer": config, "vae": config})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "plain", quantization_config=asked)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert config.layers == {}
    for name in ("transformer", "vae"):
        for key, value in getattr(pipe, name).state_dict().items():
            assert_equal(value, getattr(again, name).state_dict()[key], key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_looks_at_its_parts_parameters(dtype, tmp_path):
    """Wan does for the type of its time embedder, which it wants in float32 always."""
    host = tiny("wan")
    model = host.pipe.transformer
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    loaded = type(model).from_pretrained(
        tmp_path, torch_dtype=dtype, quantization_config=TFMQConfig()
    )
    own = dict(stock.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == own[name].dtype, name
    host.pipe.transformer = loaded
    if dtype == torch.float32:
        assert host.run().isfinite().all()


def test_a_single_file(tmp_path):
    model = tiny("wan").pipe.transformer
    model.save_pretrained(tmp_path)
    wanted = type(model).from_pretrained(tmp_path, quantization_config=TFMQConfig(bits=4))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = type(model).from_single_file(
        str(file), config=str(tmp_path), quantization_config=TFMQConfig(bits=4)
    )
    for key, value in wanted.state_dict().items():
        assert_equal(value, loaded.state_dict()[key], key)


def test_other_weights_are_packed_again(tmp_path):
    models, x = [], (torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, dtype=torch.long))
    for seed in (0, 1):
        tiny("dit", seed=seed).pipe.transformer.save_pretrained(tmp_path)
        load = DiTTransformer2DModel.from_pretrained
        models.append(load(tmp_path, quantization_config=TFMQConfig()))
    wanted = models[1](*x).sample
    assert not torch.equal(models[0](*x).sample, wanted)
    models[0].load_state_dict(models[1].state_dict())
    assert_equal(wanted, models[0](*x).sample, "the other's weights")


def test_what_cannot_be_saved(calibrated, tmp_path):
    artifact, ref = calibrated("dit")
    host, target = tiny("dit"), tmp_path / "saved"
    with (
        attached((TFMQ(ref), TemporalCache(weights="disk")), host.pipe),
        pytest.raises(ValueError, match="detach"),
    ):
        save_quantised(host.pipe, artifact, target)
    with pytest.raises(ValueError, match="calibrate again"):
        save_quantised(tiny("dit", seed=1).pipe, artifact, target)
    with pytest.raises(ValueError, match="transformer"):
        save_quantised(tiny("sd").pipe, artifact, target)
    assert not target.exists()


def test_without_the_import_diffusers_says_what_is_missing(calibrated, tmp_path, monkeypatch):
    save_quantised(tiny("dit").pipe, calibrated("dit")[0], tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "tfmq")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "tfmq")
    with pytest.raises(ValueError, match="tfmq"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")


def test_bad_settings():
    with pytest.raises(ValueError, match="bits"):
        TFMQConfig(bits=3)
    with pytest.raises(ValueError, match="activations"):
        TFMQConfig(activations="static")
    with pytest.raises(ValueError, match="a list"):
        TFMQConfig(skip="proj_out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bit"):
        TFMQConfig(bit=4)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no layer"):
        chosen(tiny("dit").pipe.transformer, TFMQConfig(skip=[""]))
    assert "tfmq" in repr(TFMQConfig())
