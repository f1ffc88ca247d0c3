"""The denoiser of digits-dit: a small DiTTransformer2DModel that predicts noise in latents."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from accel.loop import LoopSettings, step_generator
from accel.zoo import autoencoder
from accel.zoo.ddpm import add_noise, min_snr_error, stratified_timesteps
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.world import COLOURS, DIGITS, NULL_CLASS, DigitWorld, class_label

CLASS_DROPOUT = 0.1
CODE_STD = 0.3


@dataclass(frozen=True)
class DiTConfig:
    """Size of the transformer. 8x8 latents in patches of 2 are 16 tokens."""

    layers: int = 6
    heads: int = 2
    head_dim: int = 32
    latent_channels: int = 4
    latent_size: int = 8
    patch: int = 2

    def build(self) -> DiTTransformer2DModel:
        """A fresh transformer, initialised as in the DiT paper: every block is the identity.

        A class starts as the sum of a random code of its digit and one of its colour, and "no
        class" as zero, so that what is learned from one class serves the others from the start.
        """
        model = DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            num_layers=self.layers,
            sample_size=self.latent_size,
            patch_size=self.patch,
            num_embeds_ada_norm=NULL_CLASS,
        )
        for block in model.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            table = block.norm1.emb.class_embedder.embedding_table.weight
            digits, colours = torch.randn(2, 10, table.shape[1]).mul_(CODE_STD)
            codes = (colours[:, None] + digits[None]).flatten(0, 1)  # row: digit + 10 x colour
            nn.init.zeros_(table)
            with torch.no_grad():
                table[: len(codes)] = codes
        for module in (model.proj_out_1, model.proj_out_2):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        # Not .train(): its only effect here is that each block would drop class labels on its own,
        # from the global generator. The loss drops them once for the whole network.
        return model.eval()


def build_scheduler() -> DDIMScheduler:
    """The linear schedule the model is trained and shipped with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
    )


class NoiseLoss:
    """Min-SNR weighted squared error of the predicted noise, over a fixed pool of latents.

    means, stds: (count, c, h, w) scaled latents; classes (count,). The step decides the pictures
    (a new order every pass), the noise, the timesteps and the dropped classes.
    """

    def __init__(self, pool: tuple[Tensor, Tensor, Tensor], batch: int, seed: int, device):
        self.means, self.stds, self.classes = pool
        self.batch, self.seed, self.device = batch, seed, device
        self.alphas = build_scheduler().alphas_cumprod
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def rows(self, step: int) -> Tensor:
        """Rows of the pool used at a step, (batch,)."""
        per_pass = len(self.classes) // self.batch
        epoch, at = divmod(step, per_pass)
        if self._order[0] != epoch:
            generator = step_generator(self.seed + 1, epoch)
            self._order = (epoch, torch.randperm(len(self.classes), generator=generator))
        return self._order[1][at * self.batch : (at + 1) * self.batch]

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        rows, g = self.rows(step), step_generator(self.seed, step)
        shape = (self.batch, *self.means.shape[1:])
        x0 = self.means[rows] + self.stds[rows] * torch.randn(shape, generator=g)
        eps = torch.randn(shape, generator=g)
        t = stratified_timesteps(self.batch, len(self.alphas), g)
        dropped = torch.rand(self.batch, generator=g) < CLASS_DROPOUT
        y = torch.where(dropped, NULL_CLASS, self.classes[rows])
        xt = add_noise(x0, eps, self.alphas[t])
        predicted = model(
            xt.to(self.device), timestep=t.to(self.device), class_labels=y.to(self.device)
        ).sample
        snr = self.alphas[t] / (1 - self.alphas[t])
        error = predicted.float() - eps.to(self.device)
        return min_snr_error(error, snr.to(self.device)).mean()


def train(run: Training) -> None:
    """The autoencoder, then the denoiser on its latents.

    A warm restart keeps the shipped autoencoder, whose latents the denoiser knows.
    """
    run.seed_weights()
    vae = autoencoder.trained(run)
    run.seed_weights()
    if run.shipped:
        transformer = DiTTransformer2DModel.from_pretrained(run.shipped / "transformer").eval()
    else:
        transformer = DiTConfig().build()
    world = DigitWorld("train", run.seed)
    means, stds, classes = autoencoder.encode_pool(vae, world, run.preset.pool)
    scale = vae.config.scaling_factor
    print(f"denoiser: {len(classes)} pictures encoded", flush=True)
    loss = NoiseLoss(
        (means * scale, stds * scale, classes), run.batch("denoiser"), run.seed, run.device
    )
    run.stage("denoiser", transformer, loss)


def write(out: Path, folder: Path) -> None:
    """A stock DiTPipeline folder in half precision."""
    transformer = DiTConfig().build()
    transformer.load_state_dict(trained_weights(out, "denoiser"))
    vae = autoencoder.nameless(out / "vae")
    pipe = DiTPipeline(transformer, vae, build_scheduler())
    labels = {str(i): class_label(i) for i in range(len(DIGITS) * len(COLOURS))}
    pipe.register_to_config(id2label=labels)
    for model in (transformer, vae):
        nn.Module.half(model)  # diffusers' own warns of modules to keep in float32: it has none
    for part in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)


MODEL = Model(
    presets={
        # About an hour on one core of a server CPU: what was shipped.
        "cpu": Preset(
            "cpu",
            "no",
            {
                "autoencoder": Stage(32, LoopSettings(minutes=16, lr=2e-3)),
                "denoiser": Stage(128, LoopSettings(minutes=38, lr=2e-3, warmup=500)),
            },
            pool=65_536,
        ),
        # For a better model where a GPU is at hand. No shipped weights come from it yet.
        "gpu": Preset(
            "cuda",
            "bf16",
            {
                "autoencoder": Stage(256, LoopSettings(steps=30_000, lr=2e-3)),
                "denoiser": Stage(
                    1024, LoopSettings(steps=150_000, lr=1.5e-3, warmup=1000, ema_decay=0.9999)
                ),
            },
            pool=524_288,
        ),
        # Proves the machinery in seconds; the result is noise.
        "smoke": Preset(
            "cpu",
            "no",
            {
                "autoencoder": Stage(4, LoopSettings(steps=2, log_steps=2)),
                "denoiser": Stage(4, LoopSettings(steps=6, checkpoint_steps=2, log_steps=2)),
            },
            pool=32,
        ),
    },
    train=train,
    write=write,
)
