"""The cut at the autoencoder gives the frames of the plain pipeline, on every family."""

import numpy as np
import pytest
import torch

from accel.tiny import TINY_NAMES, tiny
from apps.render import latents as latents_file
from apps.render import stages
from apps.render.faults import InvalidJob

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
WITHOUT_AUTOENCODER = {"ddpm", "ddim"}


def _call(subject):
    return {**subject.inputs, "generator": torch.Generator("cpu").manual_seed(5)}


def _plain(subject):
    return np.asarray(subject.pipe(**{**_call(subject), "output_type": "np"})[0])


def _count_decodes(pipe):
    calls = []
    for decoder in filter(None, [getattr(getattr(pipe, "vae", None), "decoder", None)]):
        decoder.register_forward_hook(lambda *a: calls.append(1))
    return calls


@pytest.mark.parametrize("name", TINY_NAMES)
def test_cut_through_disk_equals_the_plain_call(name, tmp_path):
    subject = tiny(name)
    expected = _plain(subject)
    decodes = _count_decodes(subject.pipe)

    kept = stages.denoise(subject.pipe, _call(subject))
    assert kept.mode == ("frames" if name in WITHOUT_AUTOENCODER else "decode")
    assert decodes == [], "the autoencoder ran before its arguments were on disk"
    latents_file.write(tmp_path / "x", kept)
    again = latents_file.read(tmp_path / "x")
    frames = stages.decode(subject.pipe, again)

    assert frames.dtype == expected.dtype
    assert np.array_equal(frames, expected)
    assert "decode" not in vars(getattr(subject.pipe, "vae", subject)), "left on the host"


def test_quantise_rounds_as_the_host_does():
    subject = tiny("dit")
    images = subject.pipe(**{**_call(subject), "output_type": "pil"}).images
    frames = stages.decode(subject.pipe, stages.denoise(subject.pipe, _call(subject)))
    (quantised,) = stages.quantise(frames)
    assert np.array_equal(quantised, np.asarray(images[0]))


def test_an_autoencoder_that_must_be_upcast():
    """SDXL decodes half-precision latents in float32; so does a retry from disk."""
    subject = tiny("dit")
    kept = stages.denoise(subject.pipe, _call(subject))
    expected = stages.decode(subject.pipe, kept)
    weights = {k: v.clone() for k, v in subject.pipe.vae.state_dict().items()}
    rounded = {k: v.half().float() for k, v in weights.items()}
    subject.pipe.vae.load_state_dict(rounded)
    expected = stages.decode(subject.pipe, kept)
    subject.pipe.vae.half()
    assert np.array_equal(stages.decode(subject.pipe, kept), expected)
    assert subject.pipe.vae.dtype is torch.float16


def test_a_living_safety_checker_sees_the_real_picture():
    subject = tiny("sd")
    expected = _plain(subject)
    pipe, seen = subject.pipe, []

    def checker(images, clip_input):
        seen.append(np.asarray(images))
        return np.zeros_like(images), [True]

    pipe.run_safety_checker = lambda image, device, dtype: (
        (image, None) if pipe.safety_checker is None else _blank(image, seen)
    )
    pipe.safety_checker = checker
    kept = stages.denoise(pipe, _call(subject))
    assert kept.mode == "frames"
    assert seen[0].shape[-2:] == expected.shape[1:3]
    assert kept.story["notes"] == ["the safety checker blanked a picture"]


def _blank(image, seen):
    seen.append(image.detach().numpy())
    return torch.full_like(image, -1.0), [True]


@pytest.mark.parametrize("change", ["crop", "tint"])
def test_a_pipeline_that_changes_its_frames_is_not_cut(change):
    """The test card notices; the frames of the uncut call are the pipeline's own."""
    subject = tiny("pixart")
    processor = subject.pipe.image_processor
    real = type(processor).postprocess

    def changed(image, output_type="pil"):
        frames = real(processor, image, output_type=output_type)
        return frames[:, :-1] if change == "crop" else frames * 0.5

    def host(image, **kwargs):
        # What the pipeline does is no longer what our postprocess does.
        return changed(image, **kwargs) if host.inside else real(processor, image, **kwargs)

    host.inside = False
    processor.postprocess = host
    call = type(subject.pipe).__call__

    class Changed(type(subject.pipe)):
        def __call__(self, *args, **kwargs):
            host.inside = True
            try:
                return call(self, *args, **kwargs)
            finally:
                host.inside = False

        __call__.__signature__ = __import__("inspect").signature(call)

    subject.pipe.__class__ = Changed
    with pytest.raises(stages.Uncut, match="changes the decoded frames"):
        stages.denoise(subject.pipe, _call(subject))
    expected = _plain(subject)
    kept = stages.denoise(subject.pipe, _call(subject), cut=False)
    assert np.array_equal(stages.decode(subject.pipe, kept), expected)


def test_arguments_are_checked_by_name():
    pipe = tiny("dit").pipe
    stages.check_inputs(pipe, {"class_labels": [1], "guidance_scale": 1.0})
    with pytest.raises(InvalidJob, match=r"takes no argument 'num_steps'; it takes class_labels"):
        stages.check_inputs(pipe, {"class_labels": [1], "num_steps": 1})
    with pytest.raises(InvalidJob, match="needs the argument 'class_labels'"):
        stages.check_inputs(pipe, {})


def test_one_generator_per_sample():
    assert stages.sample_count({"class_labels": [1, 2, 3]}) == 3
    assert stages.sample_count({"prompt": "x", "num_images_per_prompt": 4}) == 4
    assert stages.sample_count({"prompt": ["x", "y"], "num_videos_per_prompt": 2}) == 4
    assert stages.sample_count({"batch_size": 5}) == 5
    assert stages.sample_count({}) == 1
    single, many = stages.generators(7, 1), stages.generators(6, 2)
    assert torch.equal(torch.randn(3, generator=single), torch.randn(3, generator=many[1]))


def test_tiles_when_memory_is_short():
    subject = tiny("sd")
    kept = stages.denoise(subject.pipe, _call(subject))
    whole = stages.decode(subject.pipe, kept)
    tiled = stages.decode_tiled(subject.pipe, kept)
    assert tiled.shape == whole.shape
    assert not subject.pipe.vae.use_tiling, "put back"
