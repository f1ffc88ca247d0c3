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

from accel.loop import LoopSettings, step_seed
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.world import LEVEL_JITTER, LEVELS, PALETTE, ink, scans, split_scans

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting"
SCALES = (2, 4)  # pixels
CONSTANT = 8.0  # beside inputs of deviation 1
PLAIN_SIZE = 24.5 / 32  # of the canvas; the plain world's digits
SHAPED = (200, 650)  # timesteps in which the shape of a digit comes about
ROUNDED = 0.0025  # variance of noise, from there on up much larger than the rounding of pictures


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
    device = generator.device
    within = torch.rand(batch, generator=generator, device=device)
    part = (torch.arange(batch, device=device) + within) / batch
    return (part * count).long().clamp(max=count - 1)


def shaping_timesteps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (batch,) of 0..count - 1, half of them of `SHAPED`; both halves stratified.

    There the samples that are no digits go wrong: continued from real pictures with the noise of
    its first timestep, nearly all become digits; with that of its last, as few as from noise alone.
    """
    first, last = SHAPED
    shaping = stratified_timesteps(batch // 2, last - first, generator)
    return torch.cat([first + shaping, stratified_timesteps(batch - batch // 2, count, generator)])


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


class PlainPictures:
    """The plain `DigitWorld` of a split on one device, which mixes its pictures itself.

    There every scan is at one place in one size: all strokes are one table, and a picture is a row
    of it, a colour and a grey.
    """

    def __init__(self, split: str, canvas: int, device: torch.device | str):
        rows = split_scans(split)
        rows = rows[np.argsort(scans()[1][rows], kind="stable")]
        middle = np.full((len(rows), 2), canvas / 2)
        size = np.full(len(rows), canvas * PLAIN_SIZE)
        opacity = torch.from_numpy(ink(scans()[0][rows], middle, size, canvas))
        counts = torch.from_numpy(np.bincount(scans()[1][rows]))
        self.opacity = opacity[:, None].to(device)  # (scans, 1, canvas, canvas), digit by digit
        self.counts = counts.to(device)
        self.first = (counts.cumsum(0) - counts).to(device)
        self.colours = torch.tensor(list(PALETTE.values()), device=device) / 255
        self.levels = torch.tensor(list(LEVELS.values()), device=device)
        self.sum_up()

    def sum_up(self) -> None:
        """What `expected` needs of the table, once: a recorded step cannot wait for counts."""
        scan = self.opacity.flatten(1)
        self.sums, self.squares = scan.sum(1), scan.square().sum(1)
        self.prior = -torch.repeat_interleave(self.counts.log(), self.counts)  # of equal digits

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (count, 3, canvas, canvas) in -1..1, with the rounding of 8 bits.

        And how far the grey of each is from its level before it is clamped, (count,) of 0..1.
        """
        u = torch.rand(5, count, generator=generator, device=generator.device)
        digit, colour, ground = (
            (row * number).long().clamp(max=number - 1)
            for row, number in zip(u, (10, len(self.colours), len(self.levels)), strict=False)
        )
        within = torch.minimum((u[3] * self.counts[digit]).long(), self.counts[digit] - 1)
        jitter = LEVEL_JITTER * (2 * u[4] - 1)
        grey = (self.levels[ground] + jitter).clamp(0, 1)[:, None, None, None]
        opacity = self.opacity[self.first[digit] + within]
        mixed = grey * (1 - opacity) + self.colours[colour][:, :, None, None] * opacity
        return (255 * mixed).round() / 127.5 - 1, jitter

    def expected(self, xt: Tensor, alpha: Tensor, jitter: Tensor) -> Tensor:
        """E[x0 | x_t, jitter] (n, 3, canvas, canvas): the mean of all pictures that x_t may be of.

        xt (n, 3, canvas, canvas), cumulative alpha (n,), jitter (n,). Every scan in every colour on
        every level, by its likelihood; not rounded. A picture is grey + (colour - grey) x opacity,
        so products with a scan's opacity, and of it with itself, are all that is computed.
        """
        scan, pixels = self.opacity.flatten(1), self.opacity[0].numel()
        x = xt.flatten(2)  # (n, 3, pixels)
        grey = 2 * (self.levels + jitter[:, None]).clamp(0, 1) - 1  # (n, levels)
        # (n, colours, levels, 3)
        contrast = (2 * self.colours - 1)[:, None] - grey[:, None, :, None]
        product = torch.einsum("ncs,nklc->nskl", x @ scan.T, contrast)
        product += (grey * x.sum(dim=(1, 2))[:, None])[:, None, None]
        square = self.squares[:, None, None] * contrast.square().sum(3)[:, None]
        square += 2 * self.sums[:, None, None] * (grey[:, None] * contrast.sum(3))[:, None]
        square += 3 * pixels * grey.square()[:, None, None]
        a = alpha[:, None, None, None]
        likely = (a.sqrt() * product - a / 2 * square) / (1 - a)  # (n, scans, colours, levels)
        share = (likely + self.prior[:, None, None]).flatten(1).softmax(1).view_as(likely)
        strokes = torch.einsum("nskl,nklc->ncs", share, contrast) @ scan
        ground = (share.sum(dim=(1, 2)) * grey).sum(1)[:, None, None]
        return (strokes + ground).view_as(xt)


class NoiseLoss:
    """`multiscale_error` of the predicted noise, on fresh pictures at every step.

    What is to be predicted is not the noise that was drawn, but its mean over all pictures that
    x_t may be of: the same optimum without the variance between them (Xu et al. 2023, "Stable
    Target Field", here with all of the training set). Only the jitter of the grey is told. All is
    drawn where the network is, from one generator.
    """

    def __init__(self, batch: int, seed: int, device: torch.device | str):
        self.pictures = PlainPictures("train", UNetConfig.canvas, device)
        self.batch, self.first = batch, seed
        self.generator = torch.Generator(device)
        self.alphas = build_scheduler().alphas_cumprod.to(device)

    def seed(self, step: int) -> None:
        """Makes what comes next that of a step."""
        self.generator.manual_seed(step_seed(self.first, step))

    def __call__(self, model: nn.Module, step: int | None) -> Tensor:
        """Of a step; of the one that was seeded last for None."""
        if step is not None:
            self.seed(step)
        x0, jitter = self.pictures.draw(self.batch, self.generator)
        eps = torch.randn(x0.shape, generator=self.generator, device=x0.device)
        t = shaping_timesteps(self.batch, len(self.alphas), self.generator)
        alpha = self.alphas[t]
        xt = add_noise(x0, eps, alpha)
        wanted = self.expected_noise(xt, eps, alpha, jitter)
        xt = xt.contiguous(memory_format=torch.channels_last)
        error = model(xt, timestep=t).sample.float() - wanted
        return multiscale_error(error, alpha / (1 - alpha)).mean()

    @torch.no_grad()
    def expected_noise(self, xt: Tensor, eps: Tensor, alpha: Tensor, jitter: Tensor) -> Tensor:
        """E[eps | x_t, jitter] (n, 3, h, w); `eps` itself where there is hardly any.

        There the picture is in no doubt, and its rounding, which is not in `expected`, counts.
        """
        a = alpha[:, None, None, None]
        mean = (xt - a.sqrt() * self.pictures.expected(xt, alpha, jitter)) / (1 - a).sqrt()
        return torch.where(1 - a < ROUNDED, eps, mean)


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
        # For a better model where a GPU is at hand; it has not run on one yet, and no shipped
        # weights come from it. In TensorFloat-32: with the eight bits of bf16, the noise of the
        # last timesteps is off by more than the signal there.
        "gpu": Preset(
            "cuda",
            "no",
            {
                "unet": Stage(
                    512,
                    LoopSettings(
                        steps=40_000,
                        lr=2e-3,
                        warmup=500,
                        ema_decay=0.9995,
                        log_steps=100,
                        graph=True,
                    ),
                    compile=True,
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
