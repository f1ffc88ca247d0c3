"""digits-sd: a small Stable Diffusion (Rombach et al. 2022) for the captions of DigitWorld.

A UNet with cross-attention and its CLIP text encoder, trained together on the latents of
digits-dit's autoencoder. As in DeepFloyd IF, pooled text scales and shifts the residual blocks,
too: a UNet this small is slow to learn a shape by cross-attention alone.

Noise prediction under the scaled-linear schedule, whose last step still holds signal: so the
brightness of a picture leaks from the mean of its noise (Lin et al. 2023, "Common Diffusion Noise
Schedules and Sample Steps are Flawed"). That flaw is here on purpose.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from accel import zoo
from accel.loop import LoopSettings, step_generator
from accel.zoo.autoencoder import encode_pool, nameless
from accel.zoo.ddpm import add_noise, min_snr_error, predict_the_input, stratified_timesteps
from accel.zoo.judge import to_tensor
from accel.zoo.tokens import BEGIN, END, LENGTH, build_tokenizer, phrase, write_tokenizer
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, LEVELS, DigitWorld

CAPTION_DROPOUT = 0.1  # to "", for guidance
PART_DROPOUT = 0.05  # of the colour, and of the background: so that "a red three" is known, too
CODE_STD = 0.5  # of a fresh token
CORNER = 4  # pixels; free of strokes


@dataclass(frozen=True)
class SDConfig:
    """Widths of the UNet at 8x8 and 4x4, attention heads as wide as `head_dim`, and the text.

    Attention at 4x4 only: at 8x8 it would take a third of the time.
    """

    widths: tuple[int, int] = (32, 64)
    head_dim: int = 16
    groups: int = 8
    text_width: int = 64
    text_layers: int = 1
    latent_channels: int = 4
    latent_size: int = 8

    def build(self) -> TextToNoise:
        """Fresh networks; the UNet predicts its input."""
        unet = UNet2DConditionModel(
            sample_size=self.latent_size,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            block_out_channels=self.widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=self.groups,
            cross_attention_dim=self.text_width,
            # In this class the name means the number of heads.
            attention_head_dim=tuple(width // self.head_dim for width in self.widths),
            addition_embed_type="text",
            addition_embed_type_num_heads=self.text_width // self.head_dim,
            resnet_time_scale_shift="scale_shift",
        )
        predict_the_input(unet)
        text_encoder = CLIPTextModel(self._text())
        say_each_word(text_encoder)
        return TextToNoise(unet, text_encoder)

    def _text(self) -> CLIPTextConfig:
        tokens = build_tokenizer().get_vocab()
        return CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=self.text_width,
            intermediate_size=2 * self.text_width,
            projection_dim=self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_width // self.head_dim,
            max_position_embeddings=LENGTH,
            bos_token_id=tokens[BEGIN],
            eos_token_id=tokens[END],
            pad_token_id=tokens[END],
        )


def say_each_word(text_encoder: CLIPTextModel) -> None:
    """Starts a text encoder as a table of words: blocks that add nothing, tokens far apart.

    CLIP's own start has tokens of 0.02 among sums of tens of them: backgrounds and colours, learned
    first because they lower the loss most, then crowd the digit out before it is of any use.
    """
    nn.init.normal_(text_encoder.get_input_embeddings().weight, std=CODE_STD)
    for name, module in text_encoder.named_modules():
        if name.endswith((".out_proj", ".fc2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class TextToNoise(nn.Module):
    """UNet and text encoder as one module, so that one loop trains and averages both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Latents (n, 4, 8, 8), timesteps (n,), token numbers (n, 16) -> noise like the latents."""
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=text).sample


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule and DDIM settings."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def caption_table() -> Tensor:
    """Token numbers of every caption (10, 11, 6, 16): digit, colour or none, background or none."""
    colours, grounds = [*range(len(COLOURS)), None], [*range(len(BACKGROUNDS)), None]
    texts = [phrase(d, c, b) for d in range(len(DIGITS)) for c in colours for b in grounds]
    ids = _tokens(texts)
    return ids.view(len(DIGITS), len(colours), len(grounds), LENGTH)


def _tokens(texts: list[str]) -> Tensor:
    return build_tokenizer()(texts, padding="max_length", return_tensors="pt").input_ids


class LatentLoss:
    """`min_snr_error` of the predicted noise, over a fixed pool of latents.

    means, stds: (count, 4, 8, 8) scaled latents; content: (count, 3) digit, colour, background. The
    step decides the pictures, the noise, the timesteps and what is left out of the captions.
    """

    def __init__(self, pool: tuple[Tensor, Tensor, Tensor], batch: int, seed: int, device):
        self.means, self.stds, self.content = pool
        self.batch, self.seed, self.device = batch, seed, device
        self.alphas = build_scheduler().alphas_cumprod
        self.table, self.empty = caption_table(), _tokens([""])

    def captions(self, content: Tensor, g: torch.Generator) -> Tensor:
        """Token numbers (n, 16) for content (n, 3), some with parts left out."""
        digit, colour, ground = content.unbind(1)
        drop = torch.rand(3, len(content), generator=g)
        colour = torch.where(drop[0] < PART_DROPOUT, len(COLOURS), colour)
        ground = torch.where(drop[1] < PART_DROPOUT, len(BACKGROUNDS), ground)
        ids = self.table[digit, colour, ground]
        return torch.where(drop[2, :, None] < CAPTION_DROPOUT, self.empty, ids)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        g = step_generator(self.seed, step)
        rows = torch.randint(len(self.content), (self.batch,), generator=g)
        shape = (self.batch, *self.means.shape[1:])
        x0 = self.means[rows] + self.stds[rows] * torch.randn(shape, generator=g)
        eps = torch.randn(shape, generator=g)
        t = stratified_timesteps(self.batch, len(self.alphas), g)
        ids = self.captions(self.content[rows], g)
        xt = add_noise(x0, eps, self.alphas[t])
        predicted = model(xt.to(self.device), t.to(self.device), ids.to(self.device))
        snr = self.alphas[t] / (1 - self.alphas[t])
        error = predicted.float() - eps.to(self.device)
        return min_snr_error(error, snr.to(self.device)).mean()


def latent_pool(vae: AutoencoderKL, world: DigitWorld, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents of the first `count` pictures, and what they show: as `LatentLoss` wants."""
    means, stds, _ = encode_pool(vae, world, count)
    what = world.attributes(np.arange(count))
    content = np.stack([what.digit, what.colour, what.background], axis=1)
    scale = vae.config.scaling_factor
    return means * scale, stds * scale, torch.from_numpy(content)


def train(run: Training) -> None:
    """UNet and text encoder, on the latents of the autoencoder that digits-dit ships."""
    run.seed_weights()
    model = SDConfig().build()
    if run.shipped:
        unet = UNet2DConditionModel.from_pretrained(run.shipped / "unet")
        model.unet.load_state_dict(unet.state_dict())
        text = CLIPTextModel.from_pretrained(run.shipped / "text_encoder", dtype=torch.float32)
        model.text_encoder.load_state_dict(text.state_dict())
    vae = AutoencoderKL.from_pretrained(zoo.path("digits-dit") / "vae").to(run.device)
    pool = latent_pool(vae, DigitWorld("train", run.seed), run.preset.pool)
    print(f"denoiser: {run.preset.pool} pictures encoded", flush=True)
    loss = LatentLoss(pool, run.batch("denoiser"), run.seed, run.device)
    run.stage("denoiser", model.train(), loss)


def write(out: Path, folder: Path) -> None:
    """A stock StableDiffusionPipeline folder in half precision, with digits-dit's autoencoder."""
    model = SDConfig().build()
    model.load_state_dict(trained_weights(out, "denoiser"))
    vae = nameless(zoo.path("digits-dit") / "vae")
    for part in (model.unet, model.text_encoder, vae):
        nn.Module.half(part)  # diffusers' own warns of modules to keep in float32: it has none
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder / "tokenizer")
    _load_as_float32(folder / "text_encoder" / "config.json")


def _load_as_float32(config: Path) -> None:
    """Else transformers loads the half precision of the file, while diffusers loads float32."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))


def background_level(images: np.ndarray) -> np.ndarray:
    """Mean of the four corners, where no stroke is: (n, 32, 32, 3) uint8 -> (n,) in 0..1."""
    rows = np.concatenate([images[:, :CORNER], images[:, -CORNER:]], axis=1)
    corners = np.concatenate([rows[:, :, :CORNER], rows[:, :, -CORNER:]], axis=2)
    return corners.mean(axis=(1, 2, 3)) / 255


def brightness_axis(vae: AutoencoderKL, world: DigitWorld, count: int = 64) -> Tensor:
    """Unit vector (4,) from the mean latent of black backgrounds to that of white ones."""
    means = []
    for background in (0, len(BACKGROUNDS) - 1):
        images, _ = world.batch(np.arange(count), backgrounds=np.full(count, background))
        means.append(encode(vae, images).mean(dim=(0, 2, 3)))
    return F.normalize(means[1] - means[0], dim=0)


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """(n, 32, 32, 3) uint8 -> mean latents (n, 4, 8, 8)."""
    return vae.encode(to_tensor(images)).latent_dist.mean


def draw(pipe: StableDiffusionPipeline, prompts: list[str], noise: Tensor, **options) -> np.ndarray:
    """Pictures (n, 32, 32, 3) uint8 for n prompts from noise (n, 4, 8, 8), in batches of 50."""
    parts = [
        pipe(prompts[i : i + 50], latents=noise[i : i + 50], output_type="np", **options).images
        for i in range(0, len(prompts), 50)
    ]
    return np.round(np.concatenate(parts) * 255).astype(np.uint8)


def asked_levels(pipe, count: int, *, seed: int = 0, **options) -> dict[str, dict[str, float]]:
    """Mean background level that each background has in the world, and in `count` samples each.

    options: arguments of the pipeline, such as guidance_scale.
    """
    world, found = DigitWorld("heldout", seed), {}
    for number, name in enumerate(BACKGROUNDS):
        images, what = world.batch(np.arange(count), backgrounds=np.full(count, number))
        noise = torch.randn(count, 4, 8, 8, generator=step_generator(seed, number))
        drawn = draw(pipe, what.captions(), noise, **options)
        found[name] = {
            "real": float(background_level(images).mean()),
            "samples": float(background_level(drawn).mean()),
        }
    return found


def unasked_shares(pipe, count: int, *, seed: int = 0, **options) -> dict[str, dict[str, float]]:
    """Share of pictures whose background is nearest to each level, where no prompt names one.

    Of `count` pictures of the world, and of as many samples of "a red three" and so on.
    """
    images, what = DigitWorld("heldout", seed).batch(np.arange(count))
    prompts = [phrase(d, c) for d, c in zip(what.digit, what.colour, strict=True)]
    noise = torch.randn(count, 4, 8, 8, generator=step_generator(seed, len(BACKGROUNDS)))
    shares = {}
    for name, pictures in (("real", images), ("samples", draw(pipe, prompts, noise, **options))):
        distance = background_level(pictures)[:, None] - np.array(list(LEVELS.values()))
        shares[name] = np.bincount(np.abs(distance).argmin(1), minlength=len(LEVELS)) / count
    return {
        ground: {name: float(share[i]) for name, share in shares.items()}
        for i, ground in enumerate(BACKGROUNDS)
    }


def leaked_levels(
    pipe, prompts: list[str], shifts: tuple[float, ...], *, seed: int = 0, **options
) -> dict[float, np.ndarray]:
    """Background levels (n,) of n prompts whose noise is shifted along the brightness axis.

    The noise is the same but for the shift of its mean, in standard deviations of the mean of an
    honest draw (1/8: a latent has 64 pixels). A schedule that ended in noise alone would teach the
    network to ignore it.
    """
    axis = brightness_axis(pipe.vae, DigitWorld("heldout", seed))[:, None, None]
    noise = torch.randn(len(prompts), 4, 8, 8, generator=step_generator(seed, 0))
    return {
        shift: background_level(draw(pipe, prompts, noise + axis * shift / 8, **options))
        for shift in shifts
    }


MODEL = Model(
    presets={
        # For one free core of a server CPU.
        "cpu": Preset(
            "cpu",
            "no",
            {"denoiser": Stage(64, LoopSettings(minutes=60, lr=2e-3, warmup=500))},
            pool=32_768,
        ),
        # For a better model where a GPU is at hand. No shipped weights come from it yet.
        "gpu": Preset(
            "cuda",
            "bf16",
            {
                "denoiser": Stage(
                    1024, LoopSettings(steps=100_000, lr=1e-3, warmup=1000, ema_decay=0.9999)
                )
            },
            pool=524_288,
        ),
        # Proves the machinery in seconds; the result is noise.
        "smoke": Preset(
            "cpu",
            "no",
            {"denoiser": Stage(4, LoopSettings(steps=6, checkpoint_steps=2, log_steps=2))},
            pool=32,
        ),
    },
    train=train,
    write=write,
)
