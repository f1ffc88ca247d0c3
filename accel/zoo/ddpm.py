"""digits-ddpm: a small UNet2DModel that predicts noise in pixels, without conditions.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models". Nothing guides it, so its world is the
plain one: all that it has to learn is handwriting, ten colours and five greys.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from accel.loop import LoopSettings, step_generator
from accel.zoo.judge import to_tensor
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.world import DigitWorld

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting"
SCALES = (2, 4)  # pixels
CONSTANT = 8.0  # beside inputs of deviation 1


@dataclass(frozen=True)
class UNetConfig:
    """Widths at 32, 16, 8 and 4 pixels.

    Few channels where pixels are many; attention in the middle block only.
    """

    widths: tuple[int, ...] = (16, 16, 48, 96)
    head_dim: int = 16
    groups: int = 4
    canvas: int = 32

    def build(self) -> UNet2DModel:
        """A fresh network that predicts its input, with convolutions in channels-last order."""
        levels = len(self.widths)
        model = UNet2DModel(
            sample_size=self.canvas,
            in_channels=3,
            out_channels=3,
            block_out_channels=self.widths,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=self.groups,
            attention_head_dim=self.head_dim,
            resnet_time_scale_shift="scale_shift",
        )
        predict_the_input(model)
        return nn.Module.to(model, memory_format=torch.channels_last)  # a quarter faster here


def build_scheduler() -> DDPMScheduler:
    """The linear schedule of the DDPM paper, with its clipping of predicted pictures."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=True,
    )


@torch.no_grad()
def predict_the_input(unet: nn.Module) -> None:
    """Starts a UNet of diffusers as the identity, the right noise to predict at the last timestep.

    In one group of channels for each input, that input, its negative, and a constant with its
    negative go past all blocks; the last normalisation leaves them alone, and
    silu(x) - silu(-x) = x. Learned from zero, the copy stays some per cent wrong for thousands of
    steps; at the last timesteps that is far more than the signal, clipping turns it into grey, and
    every sample gets a grey background. Without the constant the normalisation divides by the
    sample's own deviation: a sample of 2 % more noise than most is predicted 2 % too little at
    every step, and the rest is left in the picture.

    Raises ValueError for fewer groups than inputs, or fewer than four channels in a group.
    """
    inputs, last = unet.config.in_channels, unet.up_blocks[-1].resnets[-1]
    width, norm = unet.conv_in.out_channels, unet.conv_norm_out
    size = width // norm.num_groups
    if norm.num_groups < inputs or size < 4:
        raise ValueError(f"{norm.num_groups} groups of {size} for {inputs} inputs")
    for layer in (unet.conv_out, last.conv2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for source in range(inputs):
        first = source * size
        kept = torch.arange(first, first + 4)
        for layer in (unet.conv_in, last.conv_shortcut):
            layer.weight[kept] = 0
            layer.bias[kept] = 0
        skip = last.conv_shortcut.in_channels - width  # the skip is concatenated last
        last.conv_shortcut.weight[kept, skip + kept] = 1
        unet.conv_in.bias[kept[2:]] = torch.tensor([CONSTANT, -CONSTANT])
        norm.weight[kept[:2]] = ((1 + CONSTANT**2) / size * 2) ** 0.5
        for sign, channel in ((1, first), (-1, first + 1)):
            unet.conv_in.weight[channel, source, 1, 1] = sign
            unet.conv_out.weight[source, channel, 1, 1] = sign


def stratified_timesteps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """One timestep (batch,) in each of `batch` equal parts of 0..count - 1.

    The mean over them is that of independent draws, with less variance.
    """
    part = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (part * count).long().clamp(max=count - 1)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """x0, eps (n, c, h, w), cumulative alpha (n,) -> the noisy x_t; DDPM, Eq. 4."""
    a = alpha[:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def min_snr_error(error: Tensor, snr: Tensor) -> Tensor:
    """Error (n,) of noise, from its differences (n, c, h, w) and the ratio of variances snr (n,).

    Hang et al. 2023: each timestep counts as the error of the picture would, up to gamma.
    """
    return snr.clamp(max=MIN_SNR_GAMMA) / snr * error.square().mean(dim=(1, 2, 3))


def multiscale_error(error: Tensor, snr: Tensor) -> Tensor:
    """Squared error (n,) of noise, plus `min_snr_error` of its averages over 2 and 4 pixels.

    error (n, c, h, w), snr (n,). An average over s x s pixels has s^2 times the ratio of variances
    of a pixel; many scales as in Hoogeboom et al. 2023, "simple diffusion". The best prediction is
    the same; but by pixels alone, the shape of a digit, an 8x8 scan drawn 24 pixels large, is a
    fraction of the loss. With Min-SNR on pixels, too, the last noise stays in the picture.
    """
    total = error.square().mean(dim=(1, 2, 3))
    for side in SCALES:
        total = total + side**2 * min_snr_error(F.avg_pool2d(error, side), side**2 * snr)
    return total


class NoiseLoss:
    """`multiscale_error` of the predicted noise, on fresh pictures at every step."""

    def __init__(self, batch: int, seed: int, device: torch.device | str):
        self.world = DigitWorld("train", seed, plain=True)
        self.batch, self.seed, self.device = batch, seed, device
        self.alphas = build_scheduler().alphas_cumprod

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        indices = np.arange(step * self.batch, (step + 1) * self.batch)
        x0, g = to_tensor(self.world.batch(indices)[0]), step_generator(self.seed, step)
        eps = torch.randn(x0.shape, generator=g)
        t = stratified_timesteps(self.batch, len(self.alphas), g)
        xt = add_noise(x0, eps, self.alphas[t]).to(self.device, memory_format=torch.channels_last)
        predicted = model(xt, timestep=t.to(self.device)).sample
        snr = self.alphas[t] / (1 - self.alphas[t])
        error = predicted.float() - eps.to(self.device)
        return multiscale_error(error, snr.to(self.device)).mean()


def train(run: Training) -> None:
    """One stage."""
    run.seed_weights()
    unet = UNetConfig().build()
    if run.shipped:
        unet.load_state_dict(UNet2DModel.from_pretrained(run.shipped / "unet").state_dict())
    unet.eval()  # has no dropout; in training mode diffusers copies to another memory order
    run.stage("unet", unet, NoiseLoss(run.batch("unet"), run.seed, run.device))


def write(out: Path, folder: Path) -> None:
    """A stock DDPMPipeline folder in half precision."""
    unet = UNetConfig().build()
    unet.load_state_dict(trained_weights(out, "unet"))
    nn.Module.half(unet)  # diffusers' own warns of modules to keep in float32: it has none
    nn.Module.to(unet, memory_format=torch.contiguous_format)
    for part in ("unet", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    DDPMPipeline(unet, build_scheduler()).save_pretrained(folder, safe_serialization=True)


MODEL = Model(
    presets={
        # For one free core of a server CPU.
        "cpu": Preset(
            "cpu",
            "no",
            {"unet": Stage(32, LoopSettings(minutes=70, lr=2e-3, warmup=500))},
        ),
        # For a better model where a GPU is at hand. No shipped weights come from it yet.
        "gpu": Preset(
            "cuda",
            "bf16",
            {
                "unet": Stage(
                    512, LoopSettings(steps=100_000, lr=1e-3, warmup=1000, ema_decay=0.9999)
                )
            },
        ),
        # Proves the machinery in seconds; the result is noise.
        "smoke": Preset(
            "cpu",
            "no",
            {"unet": Stage(4, LoopSettings(steps=6, checkpoint_steps=2, log_steps=2))},
        ),
    },
    train=train,
    write=write,
)
