"""The cut at the autoencoder gives the frames of the plain pipeline, on every family."""

import numpy as np
import pytest
import torch
from accel.tiny import tiny
from apps.render import latents as latents_file
from apps.render import stages
from apps.render.faults import InvalidJob

FAMILIES = [
    "ddpm",
    "dit",
    "sd",
    "sdxl",
    "wan",
    "cogvideox",
    "ltx",
    "sd3",
    "pixart",
    "flux",
    "hunyuan",
]


def _plain(tiny_pipeline):
    generator = torch.Generator("cpu").manual_seed(5)
    call = {**tiny_pipeline.inputs, "generator": generator, "output_type": "np"}
    return np.asarray(tiny_pipeline.pipe(**call)[0])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_cut_through_disk_equals_the_plain_call(name, tmp_path):
    subject = tiny(name)
    expected = _plain(subject)
    decodes = _count_decodes(subject.pipe)

    call = {**subject.inputs, "generator": torch.Generator("cpu").manual_seed(5)}
    kept = stages.denoise(subject.pipe, call)
    assert decodes == [] and kept.mode == ("frames" if name == "ddpm" else "decode")
    latents_file.write(tmp_path / "x", kept)
    again = latents_file.read(tmp_path / "x")
    frames = stages.decode(subject.pipe, again)

    assert frames.dtype == expected.dtype and np.array_equal(frames, expected)
    assert "decode" not in vars(getattr(subject.pipe, "vae", subject)), "left on the host"


def _count_decodes(pipe):
    calls = []
    if hasattr(pipe, "vae"):
        real = type(pipe.vae)._decode if hasattr(type(pipe.vae), "_decode") else None
        assert real is not None
        pipe.vae.register_forward_hook(lambda *a: calls.append(a))
        pipe.vae.decoder.register_forward_hook(lambda *a: calls.append(a))
    return calls
