"""Where commands compute: on a GPU if there is one and nothing else is said."""

from __future__ import annotations

import pytest
import torch
import typer

import accel
from apps.commands.device import Dtype, kind_of_device, plain_pipeline


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_auto_is_what_is_here(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert kind_of_device("auto") == expected
    assert kind_of_device("cpu") == "cpu"
    assert kind_of_device("cuda", here=False) == "cuda"


@pytest.mark.parametrize("wanted", ["cuda", "tpu"])
def test_what_is_not_here_is_told(monkeypatch, wanted, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        kind_of_device(wanted)
    assert ended.value.exit_code == 2
    assert f"--device {wanted}" in capsys.readouterr().err


def test_a_model_is_loaded_where_and_as_wanted(tiny_model, gpu, monkeypatch):
    asked = []
    load = accel.load

    def on_cpu(ref, *, device, dtype):
        asked.append(device)
        return load(ref, dtype=dtype)

    monkeypatch.setattr(accel, "load", on_cpu)
    pipe = plain_pipeline(tiny_model, "auto", Dtype.bfloat16)
    assert asked == ["cuda"]
    assert pipe.dtype == torch.bfloat16
    plain_pipeline(tiny_model, "cuda:1", Dtype.float32)
    assert asked[1:] == ["cuda:1"]


def test_a_device_that_is_not_here_is_told_before_anything_is_loaded(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", never)
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used here"):
        plain_pipeline("zoo:digits-dit", "nowhere", Dtype.float32)
