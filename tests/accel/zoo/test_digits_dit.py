import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from safetensors import safe_open

from accel import zoo
from accel.zoo.autoencoder import AutoencoderConfig, measure_scaling, reconstruct, sobel
from accel.zoo.judge import Judge
from accel.zoo.world import COLOURS, DIGITS, NULL_CLASS, DigitWorld


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(zoo.path("digits-dit"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_loaders_read_the_folder(pipe):
    assert type(DiffusionPipeline.from_pretrained(zoo.path("digits-dit"))) is DiTPipeline
    half = DiTPipeline.from_pretrained(zoo.path("digits-dit"), dtype=torch.float16)
    assert half.transformer.dtype == half.vae.dtype == torch.float16
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, half.transformer.state_dict()[name].float())
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.beta_schedule == "linear"
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert not pipe.scheduler.config.clip_sample
    assert pipe.transformer.config.num_embeds_ada_norm == NULL_CLASS
    assert pipe.transformer.config.out_channels == pipe.transformer.config.in_channels


def test_weights_on_disk_are_half_precision():
    for file in zoo.path("digits-dit").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    for file in zoo.path("digits-dit").rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_labels_name_every_class(pipe):
    assert pipe.get_label_ids(["red zero", "blue seven"]) == [0, 10 * COLOURS.index("blue") + 7]
    assert sorted(pipe.labels.values()) == list(range(len(DIGITS) * len(COLOURS)))


def test_samples_show_what_was_asked_for(pipe):
    """At guidance 2 and 20 steps, to be fast; the card has 50. By chance 1 in 100 is right."""
    asked = np.arange(0, 100, 5)
    generators = [torch.Generator().manual_seed(int(i)) for i in asked]
    images = pipe(
        class_labels=asked.tolist(),
        guidance_scale=2.0,
        num_inference_steps=20,
        generator=generators,
        output_type="np",
    ).images
    judge = Judge.load(zoo.path("digits-judge"))
    answers = judge.answers(np.round(images * 255).astype(np.uint8))
    right = answers["digit"] + 10 * answers["colour"] == asked
    assert right.mean() >= 0.8


def test_latents_have_unit_variance(pipe):
    means = DigitWorld("train")
    ratio = pipe.vae.config.scaling_factor / measure_scaling(pipe.vae, means, 512)
    # 512 pictures: backgrounds alone make the variance uncertain by some per cent.
    assert ratio == pytest.approx(1.0, abs=0.05)


def test_autoencoder_keeps_heldout_pictures(pipe):
    images, what = DigitWorld("heldout").batch(np.arange(100))
    again = reconstruct(pipe.vae, images)
    error = ((images.astype(float) - again) ** 2).mean() / 255**2
    assert -10 * np.log10(error) > 25  # dB
    answers = Judge.load(zoo.path("digits-judge")).answers(again)
    assert (answers["digit"] == what.digit).mean() >= 0.9
    assert (answers["colour"] == what.colour).mean() >= 0.9


def test_architecture_in_the_code_is_the_one_shipped(pipe):
    fresh = AutoencoderConfig().build()
    assert isinstance(fresh, AutoencoderKL)
    fresh.load_state_dict(pipe.vae.state_dict())


def test_sobel_of_a_ramp_is_its_slope():
    """One unit per pixel is two per the kernel's two pixels; times the 4/4 of its weights."""
    ramp = torch.arange(6.0).expand(1, 3, 6, 6)
    edges = sobel(ramp)
    assert edges.shape == (1, 6, 4, 4)
    across, down = edges[:, 0::2], edges[:, 1::2]
    assert torch.equal(across.abs(), torch.full_like(across, 2.0))
    assert torch.equal(down, torch.zeros_like(down))
