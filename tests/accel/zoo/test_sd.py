import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from torch import nn

from accel import zoo
from accel.checkpoints import newest_checkpoint
from accel.zoo import sd, train
from accel.zoo.judge import Judge
from accel.zoo.training import ema_weights
from accel.zoo.world import BACKGROUNDS, COLOURS, LEVELS, DigitWorld, caption

NAME = "digits-sd"
HALF_ROUNDING = {"rtol": 2**-11, "atol": 2**-25}  # relative; absolute below the normal numbers
shipped = pytest.mark.skipif(NAME not in zoo.names(), reason=f"{NAME} is not shipped")


class Recorder(nn.Module):
    """Stands for both networks; keeps what it was called with and predicts zero."""

    def forward(self, x, t, ids):
        self.x, self.t, self.ids = x, t, ids
        return torch.zeros_like(x)


def pool(count: int):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(count, 4, 8, 8, generator=g)
    content = [torch.randint(n, (count,), generator=g) for n in (10, 10, 5)]
    return means, torch.full_like(means, 0.1), torch.stack(content, 1)


def test_loss_is_a_function_of_the_step():
    losses = [sd.LatentLoss(pool(8), 4, 0, "cpu")(Recorder(), step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_captions_say_what_the_picture_shows_or_less_of_it():
    loss = sd.LatentLoss(pool(2000), 4, 0, "cpu")
    ids = loss.captions(loss.content, torch.Generator().manual_seed(1))
    texts = sd.build_tokenizer().batch_decode(ids, skip_special_tokens=True)
    whole = [caption(*row) for row in loss.content.tolist()]
    for text, full in zip(texts, whole, strict=True):
        assert set(text.split()) <= {*full.split(), "a", "an"}
    shares = {
        "": sd.CAPTION_DROPOUT,
        "whole": (1 - sd.CAPTION_DROPOUT) * (1 - sd.PART_DROPOUT) ** 2,
    }
    counts = {"": texts.count(""), "whole": sum(a == b for a, b in zip(texts, whole, strict=True))}
    for name, p in shares.items():  # five standard deviations of a count
        assert counts[name] == pytest.approx(2000 * p, abs=5 * (2000 * p * (1 - p)) ** 0.5)


def test_fresh_network_predicts_its_input():
    """As test_ddpm.py says; here each input has 64 numbers."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = sd.SDConfig().build()(x, torch.tensor([3, 700]), sd.caption_table()[:2, 0, 0])
    assert torch.allclose(out, x, rtol=5 * (2 / 64) ** 0.5 / 130, atol=1e-5)


def test_fresh_text_encoder_tells_every_word_apart():
    """Each digit changes its own token most of all, though the sentences are alike otherwise."""
    ids = sd.caption_table()[:, 0, 0]  # "a red zero on a black background", and so on
    text = sd.SDConfig().build().text_encoder(ids).last_hidden_state
    spread = text.std(dim=0).mean(dim=1)  # (16,)
    assert spread.argmax() == 3
    assert spread[3] > 0.5  # of 1, which the last normalisation gives each token


def test_terminal_step_still_holds_signal():
    """Stable Diffusion's own figure: its last step keeps 0.068 of the picture (Lin et al. 2023)."""
    alpha = sd.build_scheduler().alphas_cumprod[-1].item()
    assert alpha**0.5 == pytest.approx(0.0683, abs=5e-5)
    assert not sd.build_scheduler().config.rescale_betas_zero_snr


def test_background_level_is_that_of_the_world():
    for number, (name, level) in enumerate(LEVELS.items()):
        images, _ = DigitWorld("heldout").batch(np.arange(50), backgrounds=np.full(50, number))
        # Jitter is uniform +-0.04 and texture at most +-0.06: a deviation of at most 0.05, clipped
        # at the ends, where the mean moves by up to half of the 0.04.
        assert sd.background_level(images).mean() == pytest.approx(level, abs=0.025), name


def test_trained_shipped_and_loaded_from_nothing(tmp_path):
    train.main([NAME, "--preset", "smoke", "--steps", "2", "--out", str(tmp_path)])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "shipped")
    assert pipe("a red three", num_inference_steps=1).images[0].size == (32, 32)
    trained = ema_weights(newest_checkpoint(tmp_path / "denoiser"))
    loaded = sd.TextToNoise(pipe.unet, pipe.text_encoder).state_dict()
    assert loaded.keys() == trained.keys()
    for name, weight in loaded.items():
        assert torch.allclose(weight, trained[name], **HALF_ROUNDING), name
    record = json.loads((tmp_path / "shipped" / "training.json").read_text())
    assert record["stages"]["denoiser"]["step"] == 2


@shipped
def test_warm_restart_goes_on_from_both_shipped_networks(tmp_path):
    smoke = ["--preset", "smoke", "--steps", "1", "--out", str(tmp_path), "--start", "shipped"]
    train.main([NAME, *smoke])
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path(NAME))
    shipped = sd.TextToNoise(pipe.unet, pipe.text_encoder).state_dict()
    for name, weight in ema_weights(newest_checkpoint(tmp_path / "denoiser")).items():
        # Adam's first step is at most lr = 1e-3 / warmup 200, of which the average takes a part.
        assert torch.allclose(weight, shipped[name], atol=1e-5), name


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path(NAME))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@shipped
def test_shipped_folder_is_stock_small_and_half_precision(pipe):
    assert type(DiffusionPipeline.from_pretrained(zoo.path(NAME))) is StableDiffusionPipeline
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert type(pipe.scheduler) is DDIMScheduler
    settings, expected = (
        {name: value for name, value in scheduler.config.items() if name[0] != "_"}
        for scheduler in (pipe.scheduler, sd.build_scheduler())
    )
    assert settings == expected
    assert pipe.safety_checker is None
    files = list(zoo.path(NAME).rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 7e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118
    for file in zoo.path(NAME).rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


@shipped
def test_autoencoder_is_that_of_digits_dit(pipe):
    other = sd.AutoencoderKL.from_pretrained(zoo.path("digits-dit") / "vae")
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, pipe.vae.state_dict()[name]), name
    assert pipe.vae.config.scaling_factor == other.config.scaling_factor
    assert pipe.vae_scale_factor == 4


@shipped
def test_samples_show_what_was_asked_for(pipe):
    """Digit, colour and background, of 20, at 20 steps to be fast; 1 in 500 is right by chance.

    A share of 0.9 falls below 12 once in 16,000 draws.
    """
    rows = [(i % 10, i * 3 % 10, i % 5) for i in range(20)]
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [caption(*row) for row in rows]
    images = sd.draw(pipe, prompts, noise, guidance_scale=4.0, num_inference_steps=20)
    answers = Judge.load(zoo.path("digits-judge")).answers(images)
    asked = dict(zip(("digit", "colour", "background"), np.array(rows).T, strict=True))
    right = np.logical_and.reduce([answers[k] == v for k, v in asked.items()])
    assert right.mean() >= 0.6


@shipped
def test_brightness_leaks_from_the_mean_of_the_noise(pipe):
    """Nobody asked for a brightness; the same noise, shifted, gives a brighter picture.

    A network without the flaw gives the same level at both shifts, 0; one that followed the noise
    alone would go from black to white, 0.96.
    """
    prompts = [f"a {colour} three" for colour in COLOURS if colour != "orange"]
    levels = sd.leaked_levels(pipe, prompts, (-2.0, 2.0), num_inference_steps=10)
    assert (levels[2.0] - levels[-2.0]).mean() > 0.2
    assert (levels[2.0] >= levels[-2.0]).mean() > 0.8


@shipped
def test_backgrounds_asked_for_are_in_order(pipe):
    levels = sd.asked_levels(pipe, 4, num_inference_steps=10, guidance_scale=4.0)
    drawn = [levels[name]["samples"] for name in BACKGROUNDS]
    assert drawn == sorted(drawn)


@shipped
def test_backgrounds_nobody_asked_for_are_greyer_than_real_ones(pipe):
    """The flaw: a fifth of the world is black and a fifth white. Shares of 50 real pictures and 50
    samples; a network without it differs by more than 0.1 in either direction alike.
    """
    shares = sd.unasked_shares(pipe, 50, num_inference_steps=10, guidance_scale=4.0)
    for name in ("real", "samples"):
        assert sum(share[name] for share in shares.values()) == pytest.approx(1)
    extreme = {n: shares["black"][n] + shares["white"][n] for n in ("real", "samples")}
    assert extreme["samples"] < extreme["real"]
