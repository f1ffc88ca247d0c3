"""digits-wan: a small WanTransformer3DModel on 1,280 video tokens, with its text encoder.

Trained in eight stages: the autoencoder, in three; the transformer and the text encoder on single
pictures of 64 tokens, where strokes, colours and words are learned 20 times cheaper; on the 5 x 8 x
8 tokens of a video that move with its digit, where the frames learn to look at each other; on bands
of it along the digit's way, where they learn the motion words; on the middle of videos, where there
is one digit, somewhere; then on whole videos. Rotary positions are relative, and a digit has the
same size in all.

What makes that work is that a latent frame is a picture (see `PictureCodesLoss`) and that the world
moves by one cell a latent frame: five frames are one pattern at five places. Before, hours of whole
videos, of windows and of pairs of frames taught colours and movement, and no legible digit.
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
PLACING = (1.5, 0.9)  # between 0.6 and 0.96: where a digit is found, of which strokes are left
SHORT = 16  # tokens; more than any caption has
PICTURES_PER_VIDEO = 8  # in the pools


@dataclass(frozen=True)
class Course:
    """How a stage is taught.

    Noise levels are uniform and then shifted (Esser et al. 2024), or normal in their logit, with
    this mean and deviation. Every `long_every` steps the text is padded to what the pipeline pads
    it to: eight times as many tokens as a picture has, and three times the work. A picture alone is
    drowned by less noise than 17 that are alike.

    continued: in half of the samples the first one to four latent frames have a fifth of the noise.
    Then there is a past to look at, and motion words say where; among frames that are all alike,
    looking ahead and looking back cancel out, and the words were not learned in an hour.

    What of the latents is taught: `track`, a square of each frame that moves with the digit;
    `band`: rows, or columns, through a digit that moves along them; `middle`: a square that stands.
    """

    long_every: int
    shift: float | None = None
    level: tuple[float, float] | None = None
    continued: bool = False
    track: int | None = None
    band: int | None = None
    middle: int | None = None

    def sigma(self, u: Tensor) -> Tensor:
        """Noise levels from uniform numbers, in the same order."""
        if self.level is not None:
            logit, deviation = self.level
            return torch.sigmoid(logit + deviation * torch.special.ndtri(u))
        assert self.shift is not None
        return self.shift * u / (1 + (self.shift - 1) * u)


COURSES = {
    "pictures": Course(16, shift=2.0),
    "tracks": Course(16, shift=FLOW_SHIFT, track=8),
    "bands": Course(16, level=PLACING, continued=True, band=3),
    "middles": Course(8, level=PLACING, continued=True, middle=12),
    "videos": Course(4, level=PLACING),
}


@dataclass(frozen=True)
class WanConfig:
    """Size of the transformer. A 17x64x64 video is 5x16x16 tokens of patch (1, 1, 1)."""

    layers: int = 6
    heads: int = 3
    head_dim: int = 32
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
        self.rope = PlacedRope(transformer.rope)

    def forward(
        self, x: Tensor, timestep: Tensor, tokens: Tensor, length: int, places: Tensor | None = None
    ) -> Tensor:
        """Velocity (n, c, f, h, w) from latents, timesteps in 0..1000 and token ids (n, s).

        Timesteps are (n,), or (n, f h w) where cells differ.

        The text is padded with zeros to `length` states, as WanPipeline does it. `places`
        (n, f h w, 3): frame, row and column of each latent cell; default: where it is in x.
        """
        mask = (tokens != 0).long()
        states = self.text(tokens, mask).last_hidden_state * mask[..., None]
        states = nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
        own, self.rope.places = self.transformer.rope, places
        self.transformer.rope = self.rope
        try:
            return self.transformer(x, timestep, states).sample
        finally:
            self.transformer.rope = own

    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices."""
        return [p for p in self.transformer.blocks.parameters() if p.ndim == 2]

    def compile(self, *args, **kwargs) -> None:
        """Each block alone: they are alike and compiled once, in a sixth of the time."""
        for block in self.transformer.blocks:
            block.compile(*args, **kwargs)


class PlacedRope(nn.Module):
    """Rotary positions of cells that are parts of a larger video: `places` (n, cells, 3)."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self._rope = [rope]  # not a part of this module
        self.places: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (n, cells, 1, head_dim)."""
        rope, places = self._rope[0], self.places
        if places is None:
            return rope(x)
        widths = [rope.t_dim, rope.h_dim, rope.w_dim]

        def looked_up(table: Tensor) -> Tensor:
            parts = table.split(widths, dim=1)
            rows = [part[places[..., axis]] for axis, part in enumerate(parts)]
            return torch.cat(rows, dim=-1)[:, :, None]

        return looked_up(rope.freqs_cos), looked_up(rope.freqs_sin)


@dataclass(frozen=True)
class Pool:
    """Encoded samples: means and deviations (count, c, f, h, w) in half precision, token ids."""

    means: Tensor
    deviations: Tensor
    tokens: Tensor  # (count, SHORT)


class VelocityLoss:
    """Squared error of the predicted velocity eps - x0 over a fixed pool (flow matching).

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
        rows, g = self.rows(step), step_generator(self.seed, step)
        mean = self.pool.means[rows].float()
        x0 = mean + self.pool.deviations[rows].float() * torch.randn(mean.shape, generator=g)
        places = None
        if self.course.track is not None:
            x0, places = tracked(x0, self.course.track)
            places = places.to(self.device)
        if self.course.band is not None:
            x0, places = banded(x0, self.course.band)
            places = places.to(self.device)
        if self.course.middle is not None:
            x0 = middle(x0, self.course.middle)
        eps = torch.randn(x0.shape, generator=g)
        u = (torch.arange(self.batch) + torch.rand(self.batch, generator=g)) / self.batch
        sigma = self.course.sigma(u)[:, None].repeat(1, x0.shape[2])  # (n, f)
        if self.course.continued:
            known = torch.randint(1, x0.shape[2], (self.batch, 1), generator=g)
            known[::2] = 0
            sigma[torch.arange(x0.shape[2]) < known] *= 0.2
        dropped = torch.rand(self.batch, generator=g) < CAPTION_DROPOUT
        tokens = torch.where(dropped[:, None], self.empty, self.pool.tokens[rows])
        s = sigma[:, None, :, None, None]
        x = (1 - s) * x0 + s * eps
        length = SHORT if step % self.course.long_every else MAX_LENGTH
        cells = x0.shape[3] * x0.shape[4]
        level = sigma.repeat_interleave(cells, dim=1) if self.course.continued else sigma[:, 0]
        tokens, timestep = tokens.to(self.device), 1000 * level.to(self.device)
        v = model(x.to(self.device), timestep, tokens, length, places).float()
        return (v - (eps - x0).to(self.device)).square().mean()


def paths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the digit is in latents (n, c, f, h, w), and how far it moves a frame: row and column,
    (n, 2, f) and (n, 2).

    It is what differs from the rest, and it moves on a straight line.
    """
    rest = x.flatten(2).median(dim=2).values[:, :, None, None, None]
    busy = (x - rest).square().sum(dim=1).square()  # (n, f, h, w)
    time = torch.arange(x.shape[2]) - (x.shape[2] - 1) / 2
    found, paces = [], []
    for axis in (3, 2):
        line = busy.sum(dim=axis)
        at = (line * torch.arange(line.shape[2])).sum(2) / line.sum(2)  # (n, f)
        pace = (at * time).sum(1) / max(float(time.square().sum()), 1.0)
        found.append(at.mean(1)[:, None] + pace[:, None] * time)
        paces.append(pace)
    return torch.stack(found, dim=1), torch.stack(paces, dim=1)


def parts(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of latents (n, c, f, h, w) at rows and columns, both (n, f, a, b): (n, c, f, a, b), and
    frame, row and column of every cell of them, (n, f a b, 3).
    """
    f, h, w = x.shape[2:]
    frames = torch.arange(f)[None, :, None, None].expand_as(rows)
    at = ((frames * h + rows) * w + columns).flatten(1)
    cells = x.flatten(2).gather(2, at[:, None].expand(-1, x.shape[1], -1))
    places = torch.stack((frames, rows, columns), dim=-1).flatten(1, 3)
    return cells.unflatten(2, rows.shape[1:]), places


def tracked(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Parts (n, c, f, side, side) that move with the digit, and their places."""
    n, _, f, h, w = x.shape
    at, _ = paths(x)
    last = torch.tensor([h, w])[:, None] - side
    corner = (at - (side - 1) / 2).round().long().clamp(min=torch.zeros(2, 1).long(), max=last)
    cells = corner[..., None] + torch.arange(side)  # (n, 2, f, side)
    rows = cells[:, 0, :, :, None].expand(n, f, side, side)
    columns = cells[:, 1, :, None, :].expand(n, f, side, side)
    return parts(x, rows, columns)


def banded(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Bands (n, c, f, width, side) of square latents, through the digit and along its way, and
    their places.
    """
    n, _, f, side, _ = x.shape
    at, pace = paths(x)
    first = (at.mean(2) - (width - 1) / 2).round().long().clamp(0, side - width)  # (n, 2)
    across = first[:, :, None, None, None] + torch.arange(width)[:, None]
    across = across.expand(n, 2, f, width, side)
    along = torch.arange(side).expand(n, f, width, side)
    upright = (pace[:, 0].abs() > pace[:, 1].abs())[:, None, None, None]
    rows = torch.where(upright, along, across[:, 0])
    columns = torch.where(upright, across[:, 1], along)
    return parts(x, rows, columns)


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
    """Autoencoder, clips, codes, pictures, tracks, middles, videos."""
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
    for stage in ("tracks", "bands", "middles"):
        if run.keeps(stage):
            run.keep_record(stage)
        else:
            model.load_state_dict(teach(run, stage, model, pool))
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
    done = [
        stage
        for stage in ("videos", "middles", "bands", "tracks", "pictures")
        if (out / stage).is_dir()
    ]
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


# After pictures: a few thousand steps, so that a shorter average than the ordinary one.
MUON = partial(LoopSettings, lr=2.5e-3, warmup=50, muon=True, ema_decay=0.997)

MODEL = Model(
    presets={
        # Five hours on one core of a server CPU, and not yet enough: see `unfinished`.
        "cpu": Preset(
            "cpu",
            "no",
            {
                "autoencoder": Stage(8, LoopSettings(minutes=20, lr=3e-3)),
                "clips": Stage(8, LoopSettings(minutes=25, lr=2e-3)),
                "codes": Stage(8, LoopSettings(minutes=13, lr=2e-3, warmup=50)),
                "pictures": Stage(32, LoopSettings(minutes=85, lr=2e-3, warmup=300)),
                "tracks": Stage(16, MUON(minutes=22.5), compile=True),
                "bands": Stage(24, MUON(minutes=24), compile=True),
                "middles": Stage(8, MUON(minutes=100), compile=True),
                "videos": Stage(4, MUON(minutes=15), compile=True),
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
                "tracks": Stage(512, LoopSettings(steps=40_000, lr=2e-3, warmup=1000)),
                "bands": Stage(512, LoopSettings(steps=20_000, lr=2e-3, warmup=1000)),
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
                "tracks": Stage(2, LoopSettings(steps=2, log_steps=2)),
                "bands": Stage(2, LoopSettings(steps=2, log_steps=2)),
                "middles": Stage(1, LoopSettings(steps=2, log_steps=2)),
                "videos": Stage(1, LoopSettings(steps=2, log_steps=2)),
            },
            pool=32,
        ),
    },
    train=train,
    write=write,
)
