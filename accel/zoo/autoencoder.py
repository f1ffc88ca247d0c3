"""The small AutoencoderKL whose convolutions draw the strokes: 32x32 pixels <-> 4x8x8 latents."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from accel.loop import step_generator
from accel.zoo.judge import to_tensor
from accel.zoo.training import Training
from accel.zoo.world import DigitWorld

KL_WEIGHT = 1e-5  # keeps latents bounded and smooth; the scale is fixed by `measure_scaling`
EDGE_WEIGHT = 0.5


@dataclass(frozen=True)
class AutoencoderConfig:
    """Channel widths per resolution (32, 16 and 8 pixels) and latent channels."""

    widths: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 4
    canvas: int = 32

    def build(self) -> AutoencoderKL:
        """A randomly initialised autoencoder; attention-free, one residual block per resolution."""
        levels = len(self.widths)
        return AutoencoderKL(
            block_out_channels=self.widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=self.latent_channels,
            sample_size=self.canvas,
            mid_block_add_attention=False,
        )


class AutoencoderLoss:
    """Mean absolute error of pixels and of their Sobel edges, and a tiny KL term."""

    def __init__(self, batch: int, seed: int, device: torch.device):
        self.world = DigitWorld("train", seed)
        self.batch, self.seed, self.device = batch, seed, device

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        indices = np.arange(step * self.batch, (step + 1) * self.batch)
        x = to_tensor(self.world.batch(indices)[0]).to(self.device)
        generator = step_generator(self.seed, step)
        reconstruction, mean, logvar = encode_decode(model, x, generator)
        pixels = (reconstruction - x).abs().mean()
        edges = (sobel(reconstruction) - sobel(x)).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return pixels + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def encode_decode(model: nn.Module, x: Tensor, generator: torch.Generator):
    """Reconstruction, like x, from a sampled latent, and the latent's mean and log variance."""
    posterior = model.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    z = posterior.mean + posterior.std * noise
    return model.decode(z).sample, posterior.mean, posterior.logvar


def sobel(x: Tensor) -> Tensor:
    """Horizontal and vertical derivatives (n, 2c, h - 2, w - 2), per unit of two pixels."""
    kernel = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    kernels = torch.stack([kernel, kernel.T])[:, None]  # (2, 1, 3, 3)
    n, c, h, w = x.shape
    return F.conv2d(x.reshape(n * c, 1, h, w), kernels).reshape(n, 2 * c, h - 2, w - 2)


@torch.inference_mode()
def encode_pool(vae: AutoencoderKL, world: DigitWorld, count: int, batch: int = 128):
    """Latents of the first `count` samples: means, deviations (both count, c, h, w), classes.

    Not scaled. Encoded once, because the denoiser sees every picture several times.
    """
    means, stds, classes = [], [], []
    device = next(vae.parameters()).device
    for start in range(0, count, batch):
        images, what = world.batch(np.arange(start, min(start + batch, count)))
        posterior = vae.encode(to_tensor(images).to(device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
        classes.append(torch.from_numpy(what.class_id))
    return torch.cat(means).clone(), torch.cat(stds).clone(), torch.cat(classes)


def measure_scaling(vae: AutoencoderKL, world: DigitWorld, count: int = 2048) -> float:
    """Factor that gives the latents of `count` samples unit variance (about zero mean)."""
    mean, std, _ = encode_pool(vae, world, count)
    return 1.0 / (mean.square() + std.square()).mean().sqrt().item()


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) uint8 -> the same through the latent mean."""
    device = next(vae.parameters()).device
    out = vae.decode(vae.encode(to_tensor(images).to(device)).latent_dist.mean).sample
    return to_uint8(out)


def to_uint8(x: Tensor) -> np.ndarray:
    """(n, 3, h, w) in -1..1 -> (n, h, w, 3) uint8."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def trained(run: Training) -> AutoencoderKL:
    """The finished autoencoder of a run: read if there is one below `out`, else trained."""
    folder = run.out / "vae"
    if run.keeps("autoencoder"):
        AutoencoderKL.from_pretrained(run.shipped / "vae").save_pretrained(folder)
        run.keep_record("autoencoder")
    if run.keeps("autoencoder") or (run.resume and (folder / "config.json").is_file()):
        return AutoencoderKL.from_pretrained(folder).to(run.device).eval()
    vae = AutoencoderConfig().build()
    if run.shipped:
        before = AutoencoderKL.from_pretrained(run.shipped / "vae", dtype=torch.float32)
        vae.load_state_dict(before.state_dict())
    loss = AutoencoderLoss(run.batch("autoencoder"), run.seed, run.device)
    vae.load_state_dict(run.stage("autoencoder", vae, loss))
    vae.to("cpu").eval()
    scale = measure_scaling(vae, DigitWorld("train", run.seed))
    vae.register_to_config(scaling_factor=scale)
    partial = folder.with_suffix(".tmp")
    vae.save_pretrained(partial)
    os.replace(partial, folder)  # whole or not at all
    return vae.to(run.device)


def nameless(folder: Path) -> AutoencoderKL:
    """A trained autoencoder whose configuration does not name the folder it was read from."""
    trained = AutoencoderKL.from_pretrained(folder)
    vae = AutoencoderConfig().build()
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(scaling_factor=trained.config.scaling_factor)
    return vae
