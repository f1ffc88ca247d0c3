"""The small AutoencoderKLWan of digits-wan: 17x64x64 videos <-> 6x5x16x16 latents."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from accel.loop import step_generator
from accel.zoo.autoencoder import EDGE_WEIGHT, encode_decode, sobel
from accel.zoo.judge import to_tensor
from accel.zoo.training import Training
from accel.zoo.world import VIDEO_CANVAS, DigitWorld

KL_WEIGHT = 1e-6  # per latent frame; thirty times as much and the latents are noise
START_LOG_VARIANCE = -4.0
# What the steps of a stage see in turn: pixels and frames of a window, and how many per video of
# the batch. Small windows give many brightnesses a step. First pictures, then whole clips: trained
# on 9 frames, the decoder drifts after the 9th.
STAGES = {
    "autoencoder": ((16, 1, 4), (16, 9, 1), (16, 1, 4), (32, 1, 1)),
    "clips": ((16, 17, 1), (16, 17, 1), (32, 17, 0.25), (16, 1, 4)),
    "codes": ((32, 17, 0.25), (16, 17, 1), (32, 17, 0.25), (16, 1, 4)),
}
CODE_WEIGHT = 0.5  # of the squared distance from a picture's latents, in their deviations


@dataclass(frozen=True)
class WanAutoencoderConfig:
    """Width at full resolution, and latent channels."""

    width: int = 16
    latent_channels: int = 6

    def build(self) -> AutoencoderKLWan:
        """A fresh autoencoder, 4 times smaller in space and in time, with Wan 2.2's shortcuts.

        Without the shortcuts it takes several times as long to tell grey levels apart. Latents
        start with little noise, and convolutions in time with the newest frame alone.
        """
        vae = AutoencoderKLWan(
            base_dim=self.width,
            z_dim=self.latent_channels,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            is_residual=True,
            latents_mean=[0.0] * self.latent_channels,
            latents_std=[1.0] * self.latent_channels,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )
        log_variance = slice(self.latent_channels, None)
        with torch.no_grad():
            for module in vae.modules():
                if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                    module.weight[:, :, :2] = 0
                    module.weight[:, :, 2] *= 3**0.5
            vae.quant_conv.weight[log_variance] = 0
            vae.quant_conv.bias[log_variance] = START_LOG_VARIANCE
        return vae


class WanAutoencoderLoss:
    """Mean absolute error of pixels and of their Sobel edges, and a tiny KL term.

    Windows of pictures and of videos, by turns: the autoencoder is convolutional.
    """

    def __init__(self, stage: str, batch: int, seed: int, device: torch.device):
        self.turns = STAGES[stage]
        self.pictures = DigitWorld("train", seed)
        self.videos = DigitWorld("train", seed, VIDEO_CANVAS)
        self.batch, self.seed, self.device = batch, seed, device

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        x = self.windows(step, generator).to(self.device)
        reconstruction, mean, logvar = encode_decode(model, x, generator)
        return reconstruction_loss(reconstruction, x) + KL_WEIGHT * kl_term(mean, logvar)

    def windows(self, step: int, generator: torch.Generator) -> Tensor:
        """What a step sees, (n, 3, frames, side, side)."""
        side, frames, per_video = self.turns[step % len(self.turns)]
        count = max(1, int(self.batch * per_video))
        indices = np.arange(step * count, (step + 1) * count)
        if frames > 1:
            videos = self.videos.videos(indices)[0]
        else:
            videos = self.pictures.batch(indices)[0][:, None]
        cut = [_window(video, side, frames, generator) for video in videos]
        return videos_to_tensor(np.stack(cut))


class PictureCodesLoss(WanAutoencoderLoss):
    """Teaches an autoencoder that latent frame k is what its picture 4 k has as a picture.

    A latent frame of a trained video autoencoder holds four pictures mixed: of a moving digit it is
    as far from any picture's latents as two pictures are from each other, so a denoiser that was
    taught pictures has to learn strokes anew for every direction. Where every fourth picture is
    encoded as it stands, a video is five pictures, and the decoder draws those between them, which
    it knows from where things were before. `teacher`: the autoencoder as it was, for pictures only.
    """

    def __init__(self, teacher: AutoencoderKLWan, batch: int, seed: int, device: torch.device):
        super().__init__("codes", batch, seed, device)
        self.teacher = teacher.to(device).eval()
        self.deviation = measured_deviation(teacher).to(device)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        x = self.windows(step, generator).to(self.device)
        codes = picture_codes(self.teacher, x)
        posterior = model.encode(x).latent_dist
        apart = ((posterior.mean - codes) / self.deviation).square().mean()
        # Half of the samples are decoded from the codes themselves, so that nothing is hidden in
        # what the encoder is off by.
        own = torch.rand(len(x), generator=generator) < 0.5
        noise = torch.randn(codes.shape, generator=generator).to(self.device)
        z = torch.where(own.to(self.device)[:, None, None, None, None], posterior.mean, codes)
        reconstruction = model.decode(z + posterior.std * noise).sample
        kl = kl_term(posterior.mean, posterior.logvar)
        return reconstruction_loss(reconstruction, x) + KL_WEIGHT * kl + CODE_WEIGHT * apart


@torch.no_grad()
def picture_codes(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Latents (n, c, 1 + f, h, w) of pictures 0, 4, 8 ... of (n, 3, 1 + 4 f, 4 h, 4 w)."""
    codes = vae.encode(frames_of(x[:, :, ::4])[:, :, None]).latent_dist.mean
    return as_frames(codes, len(x))


def as_frames(codes: Tensor, count: int) -> Tensor:
    """(n f, c, 1, h, w), latents of pictures, -> (n, c, f, h, w), those of videos."""
    return codes[:, :, 0].unflatten(0, (count, -1)).transpose(1, 2)


def measured_deviation(vae: AutoencoderKLWan) -> Tensor:
    """Deviation of each latent channel over pictures, (1, c, 1, 1, 1)."""
    x = to_tensor(DigitWorld("train", 0).batch(np.arange(256))[0])[:, :, None]
    device = next(vae.parameters()).device
    with torch.no_grad():
        mean = vae.encode(x.to(device)).latent_dist.mean.cpu()
    return mean.std((0, 2, 3, 4)).view(1, -1, 1, 1, 1)


def reconstruction_loss(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their Sobel edges."""
    edges = (sobel(frames_of(reconstruction)) - sobel(frames_of(x))).abs().mean()
    return (reconstruction - x).abs().mean() + EDGE_WEIGHT * edges


def kl_term(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence from a standard normal, per latent frame."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 3, 4)).mean()


def _window(video: np.ndarray, side: int, frames: int, generator: torch.Generator) -> np.ndarray:
    """A part of a video; oftener around the middle, where the digit passes, than at the edges."""
    room = torch.tensor([video.shape[1] - side, video.shape[2] - side]) + 1
    y, x = (torch.rand(2, 2, generator=generator).mean(0) * room).long().tolist()
    first = int(torch.randint(len(video) - frames + 1, (), generator=generator))
    return video[first : first + frames, y : y + side, x : x + side]


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


def _loss(run: Training, stage: str, vae: AutoencoderKLWan) -> WanAutoencoderLoss:
    batch = run.batch(stage)
    if stage == "codes":  # also where it is resumed: the weights are still those it began with
        return PictureCodesLoss(copy.deepcopy(vae), batch, run.seed, run.device)
    return WanAutoencoderLoss(stage, batch, run.seed, run.device)


def trained(run: Training) -> AutoencoderKLWan:
    """The finished autoencoder of a run: read if there is one below `out`, else trained."""
    folder = run.out / "vae"
    if run.resume and (folder / "config.json").is_file():
        return AutoencoderKLWan.from_pretrained(folder).to(run.device).eval()
    vae, before = WanAutoencoderConfig().build(), None
    if run.shipped:
        before = AutoencoderKLWan.from_pretrained(run.shipped / "vae", dtype=torch.float32)
        vae.load_state_dict(before.state_dict())
    for stage in STAGES:
        if run.keeps(stage):
            run.keep_record(stage)
            continue
        vae.load_state_dict(run.stage(stage, vae, _loss(run, stage, vae)))
    vae.to("cpu").eval()
    if before is not None and run.keeps("clips"):  # what follows knows the latents by this scale
        scale = {name: before.config[name] for name in ("latents_mean", "latents_std")}
    else:
        scale = measure_latents(vae, DigitWorld("train", run.seed, VIDEO_CANVAS))
    vae.register_to_config(**scale)
    partial = folder.with_suffix(".tmp")
    vae.save_pretrained(partial)
    os.replace(partial, folder)  # whole or not at all
    return vae.to(run.device)
