"""digits-wan: a small WanTransformer3DModel on 1,280 video tokens, with its text encoder.

Trained in six stages: the autoencoder, in three; the transformer and the text encoder on single
pictures of 64 tokens, where strokes, colours and words are learned 20 times cheaper; on the middle
of videos, where the digit is; then on whole videos.

Three things make that work. A latent frame is a picture (see `PictureCodesLoss`), and the world
moves by one cell a latent frame: five frames are one pattern at five places. And the network is
told to find out where its tokens are (see `TextToVideo.places`): its rotary positions are relative,
so that in pure noise nothing but the ends of softmax's sums says which row, column and frame a
token is in. Left to itself it did not learn that in five hours, and with it neither where a digit
is nor where it goes; asked for it, it takes a hundred steps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from accel.loop import LoopSettings, step_generator
from accel.zoo import wan_autoencoder
from accel.zoo.judge import to_tensor
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.wan_autoencoder import (
    WanAutoencoderConfig,
    as_frames,
    frames_of,
    videos_to_tensor,
)
from accel.zoo.wan_text import MAX_LENGTH, TextConfig, build_tokenizer
from accel.zoo.world import VIDEO_CANVAS, VIDEO_FRAMES, DigitWorld

CAPTION_DROPOUT = 0.1
FLOW_SHIFT = 3.0  # WanPipeline's scheduler for small pictures
PLACED = 2  # blocks, after which a token is to know its place
PLACE_WEIGHT = 0.5  # of the squared error of places, in their deviations
SHORT = 16  # tokens; more than any caption has
PICTURES_PER_VIDEO = 8  # in the pools


@dataclass(frozen=True)
class Course:
    """How a stage is taught.

    Noise levels are uniform and then shifted (Esser et al. 2024). Every `long_every` steps the text
    is padded to what the pipeline pads it to: eight times as many tokens as a picture has, and
    three times the work. A picture alone is drowned by less noise than 17 that are alike.
    middle: only a square of this side in the middle of the latents is taught. stills: single frames
    a step, of other videos, beside the batch: without them 40 minutes of videos undid what pictures
    had taught of strokes (from 98 % legible digits to 25 %).
    """

    long_every: int
    shift: float
    middle: int | None = None
    stills: int = 0

    def sigma(self, u: Tensor) -> Tensor:
        """Noise levels from uniform numbers, in the same order."""
        return self.shift * u / (1 + (self.shift - 1) * u)


COURSES = {
    "pictures": Course(16, shift=2.0),
    "middles": Course(8, shift=FLOW_SHIFT, middle=12, stills=24),
    "videos": Course(4, shift=FLOW_SHIFT, stills=12),
}


@dataclass(frozen=True)
class WanConfig:
    """Size of the transformer. A 17x64x64 video is 5x16x16 tokens of patch (1, 1, 1)."""

    layers: int = 6
    heads: int = 2
    head_dim: int = 48
    latent_channels: int = WanAutoencoderConfig.latent_channels
    text_width: int = TextConfig.width

    def build(self) -> WanTransformer3DModel:
        """A fresh transformer; as in DiT, every block starts as the identity."""
        width = self.heads * self.head_dim
        model = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            text_dim=self.text_width,
            freq_dim=64,
            ffn_dim=4 * width,
            num_layers=self.layers,
            rope_max_seq_len=64,
        )
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
        with torch.no_grad():
            for block in model.blocks:
                block.scale_shift_table.zero_()  # (1, 6, width): shift, scale and gate, twice
                nn.init.zeros_(block.attn2.to_out[0].weight)
                nn.init.zeros_(block.attn2.to_out[0].bias)
        return model


def build_scheduler() -> UniPCMultistepScheduler:
    """The solver Wan 2.1 is shipped with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


class TextToVideo(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text: UMT5EncoderModel):
        super().__init__()
        self.transformer, self.text = transformer, text
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.place = nn.Linear(width, 3)  # for training alone
        block = transformer.blocks[min(PLACED, len(transformer.blocks)) - 1]
        block.register_forward_hook(self._see)
        self._seen: list[Tensor] = []

    def _see(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        self._seen[:] = [output]

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor, length: int) -> Tensor:
        """Velocity (n, c, f, h, w) from latents, timesteps (n,) in 0..1000 and token ids (n, s).

        The text is padded with zeros to `length` states, as WanPipeline does it.
        """
        mask = (tokens != 0).long()
        states = self.text(tokens, mask).last_hidden_state * mask[..., None]
        states = nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
        return self.transformer(x, timestep, states).sample

    def places(self) -> Tensor:
        """Where the tokens of the last call think they are, (n, f h w, 3); see `grid`."""
        seen = self._seen.pop()
        return self.place(nn.functional.layer_norm(seen, seen.shape[-1:]))

    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices."""
        return [p for p in self.transformer.blocks.parameters() if p.ndim == 2]

    def compile(self, *args, **kwargs) -> None:
        """Each block alone: they are alike and compiled once, in a sixth of the time."""
        for block in self.transformer.blocks:
            block.compile(*args, **kwargs)


@dataclass(frozen=True)
class Pool:
    """Encoded samples: means and deviations (count, c, f, h, w) in half precision, token ids."""

    means: Tensor
    deviations: Tensor
    tokens: Tensor  # (count, SHORT)


class VelocityLoss:
    """Squared error of the predicted velocity eps - x0 over a fixed pool (flow matching), and of
    the places that tokens think they are in.

    The noise level is uniform, then shifted as the solver shifts it; one in each of `batch` equal
    parts. Everything follows from the step.
    """

    def __init__(self, pool: Pool, course: Course, batch: int, seed: int, device: torch.device):
        self.pool, self.course = pool, course
        self.batch, self.seed, self.device = batch, seed, device
        self.empty = tokenize([""])[0]
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def rows(self, step: int) -> Tensor:
        """Rows of the pool used at a step, (batch,): a new order every pass."""
        count = len(self.pool.tokens)
        epoch, at = divmod(step, count // self.batch)
        if self._order[0] != epoch:
            generator = step_generator(self.seed + 1, epoch)
            self._order = (epoch, torch.randperm(count, generator=generator))
        return self._order[1][at * self.batch : (at + 1) * self.batch]

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        g = step_generator(self.seed, step)
        x0, tokens = self._drawn(self.rows(step), g)
        loss = self._loss(model, x0, tokens, step, g)
        if self.course.stills:
            rows = torch.randint(len(self.pool.tokens), (self.course.stills,), generator=g)
            x0, tokens = self._drawn(rows, g)
            frames = torch.randint(x0.shape[2], (len(rows),), generator=g)
            x0 = x0[torch.arange(len(rows)), :, frames, None]
            loss = (loss + self._loss(model, x0, tokens, step, g)) / 2
        return loss

    def _drawn(self, rows: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents of rows of the pool, and their tokens, of which some are dropped."""
        mean = self.pool.means[rows].float()
        x0 = mean + self.pool.deviations[rows].float() * torch.randn(mean.shape, generator=g)
        if self.course.middle is not None:
            x0 = middle(x0, self.course.middle)
        dropped = torch.rand(len(rows), generator=g) < CAPTION_DROPOUT
        return x0, torch.where(dropped[:, None], self.empty, self.pool.tokens[rows])

    def _loss(
        self, model: nn.Module, x0: Tensor, tokens: Tensor, step: int, g: torch.Generator
    ) -> Tensor:
        eps, count = torch.randn(x0.shape, generator=g), len(x0)
        sigma = self.course.sigma((torch.arange(count) + torch.rand(count, generator=g)) / count)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * eps
        length = SHORT if step % self.course.long_every else MAX_LENGTH
        tokens, timestep = tokens.to(self.device), 1000 * sigma.to(self.device)
        v = model(x.to(self.device), timestep, tokens, length).float()
        lost = model.places().float() - grid(*x0.shape[2:]).to(self.device)
        wrong = (v - (eps - x0).to(self.device)).square().mean()
        return wrong + PLACE_WEIGHT * lost.square().mean()


def grid(*sizes: int) -> Tensor:
    """Frame, row and column of every token of a video, each of mean 0 and deviation 1: (f h w, 3).

    Of one frame alone, the frame is 0.
    """
    lines = [torch.arange(n) - (n - 1) / 2 for n in sizes]
    lines = [line / line.std(correction=0) if len(line) > 1 else line for line in lines]
    return torch.cartesian_prod(*lines)


def middle(x: Tensor, side: int) -> Tensor:
    """The part (n, c, f, side, side) of latents that is in the middle; positions are relative."""
    top, left = (x.shape[3] - side) // 2, (x.shape[4] - side) // 2
    return x[..., top : top + side, left : left + side]


def tokenize(captions: list[str]) -> Tensor:
    """Token ids (n, SHORT)."""
    tokenizer = build_tokenizer()
    return tokenizer(
        captions, padding="max_length", max_length=SHORT, truncation=True, return_tensors="pt"
    ).input_ids


def encode_pictures(vae: AutoencoderKLWan, world: DigitWorld, count: int) -> Pool:
    """The first `count` pictures of 32x32 as videos of one frame."""

    def encoded(rows: np.ndarray) -> tuple[Tensor, Tensor, list[str]]:
        images, what = world.batch(rows)
        return *wan_autoencoder.encode(vae, to_tensor(images)[:, :, None]), what.captions()

    return _pool(encoded, count, 128)


def encode_videos(vae: AutoencoderKLWan, world: DigitWorld, count: int) -> Pool:
    """The first `count` videos: every fourth picture of each as it stands.

    The autoencoder was taught to make the same of all 17, at three times the cost.
    """

    def encoded(rows: np.ndarray) -> tuple[Tensor, Tensor, list[str]]:
        videos, what = world.videos(rows, frames=1 + (VIDEO_FRAMES - 1) // 4)
        pictures = frames_of(videos_to_tensor(videos))[:, :, None]
        mean, deviation = wan_autoencoder.encode(vae, pictures, batch=16)
        return as_frames(mean, len(rows)), as_frames(deviation, len(rows)), what.captions()

    return _pool(encoded, count, 16)


def _pool(encoded, count: int, batch: int) -> Pool:
    means, deviations, captions = [], [], []
    for start in range(0, count, batch):
        mean, deviation, words = encoded(np.arange(start, min(start + batch, count)))
        means.append(mean.half())
        deviations.append(deviation.half())
        captions += words
    return Pool(torch.cat(means), torch.cat(deviations), tokenize(captions))


def train(run: Training) -> None:
    """Autoencoder, clips, codes, pictures, middles, videos."""
    run.seed_weights()
    vae = wan_autoencoder.trained(run)
    run.seed_weights()
    model = TextToVideo(WanConfig().build(), TextConfig().build())
    if run.shipped and (run.shipped / "transformer").is_dir():
        model = shipped(run.shipped)
    if run.keeps("pictures"):
        run.keep_record("pictures")
    else:
        world = DigitWorld("train", run.seed)
        pool = kept_pool(run, "pictures", lambda: encode_pictures(vae, world, run.preset.pool))
        model.load_state_dict(teach(run, "pictures", model, pool))
    count = run.preset.pool // PICTURES_PER_VIDEO
    videos = DigitWorld("train", run.seed, VIDEO_CANVAS)
    pool = kept_pool(run, "videos", lambda: encode_videos(vae, videos, count))
    if run.keeps("middles"):
        run.keep_record("middles")
    else:
        model.load_state_dict(teach(run, "middles", model, pool))
    teach(run, "videos", model, pool)


def teach(run: Training, stage: str, model: nn.Module, pool: Pool) -> dict[str, Tensor]:
    """Runs one stage of the transformer and the text encoder."""
    loss = VelocityLoss(pool, COURSES[stage], run.batch(stage), run.seed, run.device)
    return run.stage(stage, model, loss)


def kept_pool(run: Training, stage: str, encode: Callable[[], Pool]) -> Pool:
    """The encoded samples of a stage. A resumed run reads them: encoding takes minutes."""
    file = run.out / f"{stage}.pool.pt"
    if run.resume and file.is_file():
        return Pool(**torch.load(file, weights_only=True))
    pool = encode()
    print(f"{stage}: {len(pool.tokens)} encoded", flush=True)
    partial = file.with_suffix(".tmp")
    torch.save(vars(pool), partial)
    os.replace(partial, file)  # whole or not at all
    return pool


def shipped(folder: Path) -> TextToVideo:
    """The trained pair of a shipped folder, in float32."""
    return TextToVideo(
        WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    )


def write(out: Path, folder: Path) -> None:
    """A stock WanPipeline folder in half precision; before the last stages, only its parts."""
    model = TextToVideo(WanConfig().build(), TextConfig().build())
    done = [stage for stage in ("videos", "middles", "pictures") if (out / stage).is_dir()]
    if done:
        model.load_state_dict(trained_weights(out, done[0]))
    trained = AutoencoderKLWan.from_pretrained(out / "vae")
    vae = WanAutoencoderConfig().build()  # whose configuration names no folder of ours
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(
        latents_mean=trained.config.latents_mean, latents_std=trained.config.latents_std
    )
    for part in (model, vae):
        nn.Module.half(part)
    if not done:
        vae.save_pretrained(folder / "vae", safe_serialization=True)
        return
    pipe = WanPipeline(
        build_tokenizer(), model.text, vae, build_scheduler(), transformer=model.transformer
    )
    for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)


# A few thousand steps, so that a shorter average than the ordinary one.
MUON = partial(LoopSettings, lr=2e-3, warmup=50, muon=True, ema_decay=0.997)

MODEL = Model(
    presets={
        # On a server CPU, one core up to the pictures, then two. Middles of the shipped ones came
        # in five runs, the first 40 minutes without stills, the last 110 after their videos.
        "cpu": Preset(
            "cpu",
            "no",
            {
                "autoencoder": Stage(8, LoopSettings(minutes=20, lr=3e-3)),
                "clips": Stage(8, LoopSettings(minutes=25, lr=2e-3)),
                "codes": Stage(8, LoopSettings(minutes=13, lr=2e-3, warmup=50)),
                "pictures": Stage(32, MUON(minutes=40), compile=True),
                "middles": Stage(6, MUON(minutes=230), compile=True),
                "videos": Stage(4, MUON(minutes=25), compile=True),
            },
            pool=32_768,
        ),
        # For a better model where a GPU is at hand. No shipped weights come from it yet.
        "gpu": Preset(
            "cuda",
            "bf16",
            {
                "autoencoder": Stage(64, LoopSettings(steps=20_000, lr=3e-3)),
                "clips": Stage(64, LoopSettings(steps=20_000, lr=2e-3)),
                "codes": Stage(64, LoopSettings(steps=20_000, lr=2e-3)),
                "pictures": Stage(1024, LoopSettings(steps=60_000, lr=2e-3, warmup=1000)),
                "middles": Stage(128, LoopSettings(steps=20_000, lr=2e-3, warmup=1000)),
                "videos": Stage(64, LoopSettings(steps=40_000, lr=1e-3, warmup=1000)),
            },
            pool=262_144,
        ),
        # Proves the machinery in seconds; the result is noise.
        "smoke": Preset(
            "cpu",
            "no",
            {
                "autoencoder": Stage(1, LoopSettings(steps=2, log_steps=2)),
                "clips": Stage(1, LoopSettings(steps=2, log_steps=2)),
                "codes": Stage(4, LoopSettings(steps=2, log_steps=2)),
                "pictures": Stage(4, LoopSettings(steps=2, log_steps=2)),
                "middles": Stage(1, LoopSettings(steps=2, log_steps=2)),
                "videos": Stage(1, LoopSettings(steps=2, log_steps=2)),
            },
            pool=32,
        ),
    },
    train=train,
    write=write,
)
