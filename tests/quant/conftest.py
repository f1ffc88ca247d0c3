"""One calibration of a tiny model for many tests."""

from __future__ import annotations

import functools

import pytest
import torch

from accel.testing import tiny
from quant.calibrate import TFMQCalibration


def plain_inputs(host):
    """The calls of a tiny pipeline; tensors are allowed in tests."""
    return {k: v for k, v in host.inputs.items() if k != "output_type"}


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory, fit):
    """``calibrated(name, **settings)`` -> (artifact, its file), made once."""
    known = {}

    def make(name, **settings):
        key = (name, tuple(sorted(settings.items())))
        if key not in known:
            folder = tmp_path_factory.mktemp("tfmq")
            how = TFMQCalibration(**{"rounding": "nearest", "calls": 2, "steps": 20, **settings})
            artifact = fit(how, tiny(name), folder / "parts")
            known[key] = artifact, artifact.save(folder / "tfmq.safetensors")
        return known[key]

    return make


@pytest.fixture(scope="session")
def fuse_and_forget():
    """``fuse_and_forget(model, target)``: an adapter goes into the weights and leaves no trace."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig

    def change(model, target):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        model.fuse_lora()
        recurse_remove_peft_layers(model)
        del model.peft_config
        model._hf_peft_config_loaded = False

    return change


@pytest.fixture(scope="session")
def fit():
    """``fit(calibration, tiny pipeline, folder)``: prompt tensors, no JSON, are put in its call."""
    return _fit


def _fit(how, host, folder, say=lambda _: None, recipe=None):
    call = type(host.pipe).__call__
    tensors = {k: v for k, v in host.inputs.items() if isinstance(v, torch.Tensor)}

    class WithTensors(type(host.pipe)):
        @functools.wraps(call)
        def __call__(self, **kwargs):
            return call(self, **{**tensors, **kwargs})

    kind, host.pipe.__class__ = type(host.pipe), WithTensors
    try:
        plain = {k: v for k, v in plain_inputs(host).items() if k not in tensors}
        return how.fit(host.pipe, [plain, plain], str(folder), recipe, say)
    finally:
        host.pipe.__class__ = kind
