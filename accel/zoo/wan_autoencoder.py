"""The small AutoencoderKLWan of digits-wan: 17x64x64 videos <-> 6x5x16x16 latents."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from accel.zoo.autoencoder import EDGE_WEIGHT, encode_decode, sobel
from accel.zoo.judge import to_tensor
from accel.zoo.loop import step_generator
from accel.zoo.training import Training
from accel.zoo.world import VIDEO_CANVAS, VIDEO_FRAMES, DigitWorld

KL_WEIGHT = 3e-5
PICTURES_PER_VIDEO = 4  # in a batch: one frame costs a ninth of a clip
CROP, CLIP = 32, 9  # pixels and frames of a training clip: three latent frames, all code paths


@dataclass(frozen=True)
class WanAutoencoderConfig:
    """Widths of the encoder and the decoder at full resolution, and latent channels."""

    encoder_width: int = 8
    decoder_width: int = 16
    latent_channels: int = 6

    def build(self) -> AutoencoderKLWan:
        """A fresh autoencoder, 4 times smaller in space and in time."""
        return AutoencoderKLWan(
            base_dim=self.encoder_width,
            decoder_base_dim=self.decoder_width,
            z_dim=self.latent_channels,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * self.latent_channels,
            latents_std=[1.0] * self.latent_channels,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )


class WanAutoencoderLoss:
    """Mean absolute error of pixels and of their Sobel edges, and a tiny KL term.

    Even steps see pictures, odd steps clips of 9 frames; both 32x32 windows, because the
    autoencoder is convolutional and digits are no larger.
    """

    def __init__(self, batch: int, seed: int, device: torch.device):
        self.pictures = DigitWorld("train", seed)
        self.videos = DigitWorld("train", seed, VIDEO_CANVAS)
        self.batch, self.seed, self.device = batch, seed, device

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        x = (self._clips if step % 2 else self._stills)(step, generator).to(self.device)
        reconstruction, mean, logvar = encode_decode(model, x, generator)
        pixels = (reconstruction - x).abs().mean()
        edges = (sobel(frames_of(reconstruction)) - sobel(frames_of(x))).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 3, 4)).mean()
        return pixels + EDGE_WEIGHT * edges + KL_WEIGHT * kl

    def _stills(self, step: int, _generator: torch.Generator) -> Tensor:
        count = self.batch * PICTURES_PER_VIDEO
        indices = np.arange(step * count, (step + 1) * count)
        return to_tensor(self.pictures.batch(indices)[0])[:, :, None]

    def _clips(self, step: int, generator: torch.Generator) -> Tensor:
        indices = np.arange(step * self.batch, (step + 1) * self.batch)
        frames = self.videos.videos(indices)[0]
        clips = []
        for video in frames:
            room = VIDEO_CANVAS - CROP
            # Around the middle, where the digit passes, more often than at the edges.
            x, y = (torch.rand(2, 2, generator=generator).mean(0) * room).long().tolist()
            first = int(torch.randint(VIDEO_FRAMES - CLIP + 1, (), generator=generator))
            clips.append(video[first : first + CLIP, y : y + CROP, x : x + CROP])
        return videos_to_tensor(np.stack(clips))


def frames_of(x: Tensor) -> Tensor:
    """(n, c, f, h, w) -> (n f, c, h, w)."""
    return x.transpose(1, 2).flatten(0, 1)


def videos_to_tensor(videos: np.ndarray) -> Tensor:
    """(n, f, h, w, 3) uint8 -> (n, 3, f, h, w) float32 in -1..1."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).contiguous().float() / 127.5 - 1


@torch.inference_mode()
def encode(vae: AutoencoderKLWan, x: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Normalised latents of (n, 3, f, h, w): means and deviations, both (n, c, f', h/4, w/4)."""
    device = next(vae.parameters()).device
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    means, deviations = [], []
    for part in x.split(batch):
        posterior = vae.encode(part.to(device)).latent_dist
        means.append((posterior.mean.cpu() - shift) / scale)
        deviations.append(posterior.std.cpu() / scale)
    return torch.cat(means), torch.cat(deviations)


def measure_latents(vae: AutoencoderKLWan, world: DigitWorld, count: int = 96) -> dict:
    """Mean and deviation of each channel over `count` videos, as the configuration wants them."""
    x = videos_to_tensor(world.videos(np.arange(count))[0])
    mean, deviation = encode(vae, x)  # not normalised yet: its configuration is the identity
    axes = (0, 2, 3, 4)
    centre = mean.mean(axes)
    spread = (mean.var(axes) + deviation.square().mean(axes)).sqrt()
    return {"latents_mean": centre.tolist(), "latents_std": spread.tolist()}


def trained(run: Training) -> AutoencoderKLWan:
    """The finished autoencoder of a run: read if there is one below `out`, else trained."""
    folder = run.out / "vae"
    if run.shipped:
        AutoencoderKLWan.from_pretrained(run.shipped / "vae").save_pretrained(folder)
        run.keep_record("autoencoder")
    if run.shipped or (run.resume and (folder / "config.json").is_file()):
        return AutoencoderKLWan.from_pretrained(folder).to(run.device).eval()
    vae = WanAutoencoderConfig().build()
    loss = WanAutoencoderLoss(run.batch("autoencoder"), run.seed, run.device)
    vae.load_state_dict(run.stage("autoencoder", vae, loss))
    vae.eval()
    vae.register_to_config(**measure_latents(vae, DigitWorld("train", run.seed, VIDEO_CANVAS)))
    partial = folder.with_suffix(".tmp")
    vae.save_pretrained(partial)
    os.replace(partial, folder)  # whole or not at all
    return vae
