"""The plugin: stock folder plus recipe; stock diffusers still loads it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

import accel
from accel.loading import RECIPE_FILE, SHIM_FILE
from accel.method import Recipe
from accel.testing import assert_equal, assert_same_state, host_state, tiny
from caches.native import FirstBlockCache
from samplers.swap import SwapScheduler

RECIPE = Recipe((SwapScheduler("DPMSolverMultistepScheduler"), FirstBlockCache(10.0)))


@pytest.fixture
def saved(tmp_path):
    host = tiny("dit")
    host.pipe.save_pretrained(tmp_path / "stock")  # which writes a class name into the config
    state = host_state(host.pipe)
    folder = accel.save(host.pipe, RECIPE, tmp_path / "dit-fast", measured={"speedup": 2.0})
    assert_same_state(state, host_state(host.pipe))
    return host, folder


def _run(pipe, host) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator().manual_seed(0), **host.inputs}
    return torch.as_tensor(pipe(**arguments).images)


def test_load_attaches_the_recipe(saved):
    host, folder = saved
    with accel.attached(RECIPE, host.pipe):
        expected = _run(host.pipe, host)
    pipe = accel.load(folder)
    assert type(pipe) is DiTPipeline
    assert_equal(expected, _run(pipe, host), "loaded with recipe")
    recipe = accel.live_on(pipe)[-1]
    assert recipe.report()["effect"] == "some"
    recipe.detach()
    assert_equal(_run(host.pipe, host), _run(pipe, host), "detached")


def test_stock_diffusers_loads_the_folder(saved):
    host, folder = saved
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is DiTPipeline
    assert_equal(_run(host.pipe, host), _run(pipe, host), "stock load")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    read = accel.read_recipe(folder / RECIPE_FILE)
    assert read.recipe == RECIPE
    assert read.measured == {"speedup": 2.0}


def test_custom_pipeline_shim(saved, monkeypatch, tmp_path):
    """Stock diffusers with custom_pipeline= attaches the recipe, and saves stock again."""
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "m")
    )
    host, folder = saved
    with accel.attached(RECIPE, host.pipe):
        expected = _run(host.pipe, host)
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True
    )
    assert_equal(expected, _run(pipe, host), "through the shim")
    assert len(accel.live_on(pipe)) == 3
    _run(pipe, host)
    assert len(accel.live_on(pipe)) == 3, "attached once"
    accel.live_on(pipe)[-1].detach()
    assert_equal(_run(host.pipe, host), _run(pipe, host), "detached for good")
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert (folder / SHIM_FILE).read_text().count("diffusers.DiTPipeline") == 2


def test_a_hub_id_brings_its_recipe(saved, tmp_path):
    _, folder = saved
    home, commit = tmp_path / "hub" / "models--me--fast", "a" * 40
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    pipe = accel.load("me/fast", cache_dir=str(tmp_path / "hub"), local_files_only=True)
    assert accel.live_on(pipe)[-1].method == RECIPE


def test_a_shim_that_does_not_find_its_recipe_says_so(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "m")
    )
    host, folder = saved
    monkeypatch.chdir(folder.parent)
    pipe = DiffusionPipeline.from_pretrained(
        folder.name, custom_pipeline=folder.name, trust_remote_code=True
    )
    monkeypatch.chdir(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"no accel_recipe.yaml in 'dit-fast'.*absolute path"):
        _run(pipe, host)
    monkeypatch.chdir(folder.parent)
    _run(pipe, host)
    assert len(accel.live_on(pipe)) == 3


def test_what_a_package_of_methods_has_quantised_is_loaded(tmp_path, monkeypatch):
    from diffusers.quantizers import auto

    from quant.diffusers_quantizer import TFMQConfig

    tiny("dit").pipe.save_pretrained(tmp_path)
    model = DiTTransformer2DModel.from_pretrained(
        tmp_path / "transformer", quantization_config=TFMQConfig()
    )
    model.save_pretrained(tmp_path / "transformer")
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, "tfmq")  # as in a fresh process
    monkeypatch.delitem(sys.modules, "quant.diffusers_quantizer")
    loaded = accel.load(tmp_path).transformer.state_dict()
    for name, value in model.state_dict().items():
        assert_equal(value, loaded[name], name)


def test_save_refuses_while_something_is_attached(tmp_path):
    host = tiny("dit")
    with (
        accel.attached(FirstBlockCache(), host.pipe),
        pytest.raises(ValueError, match=r"detach caches\.native:FirstBlockCache"),
    ):
        accel.save(host.pipe, RECIPE, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_save_refuses_a_recipe_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="UNet2DModel has none"):
        accel.save(tiny("ddim").pipe, Recipe((FirstBlockCache(),)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no model_index"):
        accel.load(tmp_path)
    with pytest.raises(ValueError, match="digits-dit"):
        accel.load("zoo:nothing")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        accel.load("zoo:digits-dit", device="abacus")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model_index.json", "{}"),
        ("model_index.json", "[]"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}'),
        ("transformer/config.json", '{"_class_name": "DiTTransformer2DModel", "num_layers": "x"}'),
    ],
)
def test_a_spoiled_config_is_told_with_its_folder(saved, tmp_path, name, text):
    folder = tmp_path / "spoiled"
    shutil.copytree(saved[1], folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{folder} cannot be loaded by diffusers"):
        accel.load(folder)


def test_load_dtype_and_recipe_of_hostile_folder(saved):
    _, folder = saved
    pipe = accel.load(folder, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    (folder / RECIPE_FILE).write_text("accel_recipe: 1\nmethods: [{method: 'os.path:Join'}]")
    with pytest.raises(ValueError, match="not registered"):
        accel.load(folder)
