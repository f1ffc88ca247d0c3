"""digits-judge: says which digit, colour, background and motion it sees, and what is no digit.

An objective verifier, because DigitWorld knows the truth: trained on the `train` scans, its
accuracy is measured on the `heldout` ones. Its confidence means something, too: a quarter of its
training pictures are noise or blends of digits, for which no digit is the right answer. The referee
in `judge_b.py` has the same interface, another architecture and other scans.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accel import zoo
from accel.loop import LoopSettings
from accel.zoo.judge_data import FRAMES, HEADS, JudgeLoss
from accel.zoo.training import Model, Preset, Stage, Training, trained_weights
from accel.zoo.world import DIRECTIONS, DigitWorld

FEATURES = 64
# A digit travels at least 18 of 64 pixels, 1.1 of the 32 between the outermost windows: at 6, the
# probability of its motion is above 0.99, and of each motion 0.25 where it stands.
MOTION_GAIN = 6.0
# Weight of places beside features, so that the Frechet distance of videos sees wrong motion about
# as clearly as wrong colours (tests/accel/metrics/test_video_controls.py).
PLACE_GAIN = 9.0
DIGIT_CONFIDENCE = 0.9  # above this a picture counts as a digit


class AttributeJudge(nn.Module):
    """What both judges share: everything but how a picture becomes 64 features and a position."""

    config: Any
    defaults: type  # the class of `config`

    def add_heads(self) -> None:
        """One linear head per attribute."""
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, n) for k, n in HEADS.items()})

    @abstractmethod
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, h, w) in -1..1 -> features (n, 64) and where the digit is, (n, 2) in -1..1."""

    def features(self, x: Tensor) -> Tensor:
        """Pictures (n, 3, h, w) in -1..1, 32 or 64 pixels square -> (n, 64)."""
        return self.look(x)[0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (n, 3, h, w) in -1..1 -> logits (n, classes) per attribute."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    def video_features(self, x: Tensor) -> Tensor:
        """Videos (n, 3, f, 64, 64) in -1..1 -> (n, 74), from 5 evenly spaced frames.

        The mean of the frames' 64 features, and where the digit is in each frame, as x, y in units
        of `PLACE_GAIN`: what a video shows, and how it moves. Raises ValueError for fewer frames.
        """
        features, where = self.look_at_frames(x)
        return torch.cat([features.mean(1), PLACE_GAIN * where.flatten(1)], 1)

    def video_logits(self, x: Tensor) -> dict[str, Tensor]:
        """Videos (n, 3, f, 64, 64) -> logits (n, classes) per attribute and of the motion.

        An attribute's are the mean log probabilities of the frames; the motion's say how far, from
        end to end, the digit went each way. Nothing here is learnt but what a frame shows.
        """
        features, where = self.look_at_frames(x)
        logits = {name: head(features).log_softmax(-1).mean(1) for name, head in self.heads.items()}
        ways = torch.tensor(list(DIRECTIONS.values()), dtype=where.dtype, device=where.device)
        return logits | {"motion": MOTION_GAIN * travel(where) @ ways.T}

    def look_at_frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`look` at 5 evenly spaced frames of videos (n, 3, f, 64, 64): (n, 5, 64), (n, 5, 2)."""
        seen = self.look(five_frames(x).transpose(1, 2).flatten(0, 1))
        features, where = (part.unflatten(0, (-1, FRAMES)) for part in seen)
        return features, where

    def answers(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """(n, h, w, 3) uint8 -> index (n,) of the answer per attribute."""
        return {k: p.argmax(1) for k, p in self.probabilities(images).items()}

    def confidences(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """(n, h, w, 3) uint8 -> probability (n,) of the answer per attribute."""
        return {k: p.max(1) for k, p in self.probabilities(images).items()}

    def digit_like(self, images: np.ndarray) -> np.ndarray:
        """(n, h, w, 3) uint8 -> (n,) bool: is this a digit at all?"""
        return self.confidences(images)["digit"] > DIGIT_CONFIDENCE

    def video_answers(self, videos: np.ndarray) -> dict[str, np.ndarray]:
        """(n, f, h, w, 3) uint8 -> index (n,) of the answer per attribute, and of the motion."""
        return {k: p.argmax(1) for k, p in self.probabilities(videos).items()}

    def video_confidences(self, videos: np.ndarray) -> dict[str, np.ndarray]:
        """(n, f, h, w, 3) uint8 -> probability (n,) of the answer per attribute and motion."""
        return {k: p.max(1) for k, p in self.probabilities(videos).items()}

    @torch.inference_mode()
    def probabilities(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures (n, h, w, 3) or videos (n, f, h, w, 3), uint8 -> (n, classes) per attribute."""
        logits = [self.video_logits(x) if x.ndim == 5 else self(x) for x in tensors_of(samples)]
        return {k: torch.cat([p[k] for p in logits]).softmax(1).numpy() for k in logits[0]}

    @torch.inference_mode()
    def features_of(self, samples: np.ndarray) -> np.ndarray:
        """Pictures (n, h, w, 3) -> (n, 64), or videos (n, f, h, w, 3) -> (n, 74); uint8."""
        parts = [
            self.video_features(x) if x.ndim == 5 else self.features(x) for x in tensors_of(samples)
        ]
        return torch.cat(parts).numpy()

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors (half precision)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote; float32, in evaluation mode."""
        config = json.loads((folder / "config.json").read_text())
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        judge = cls(cls.defaults(**config))
        weights = load_file(folder / "model.safetensors")
        judge.load_state_dict({k: v.float() for k, v in weights.items()})
        return judge.eval()


@dataclass(frozen=True)
class JudgeConfig:
    """Widths of the three convolution stages, which end at 2, 4 and 8 pixels a cell."""

    widths: tuple[int, int, int] = (24, 48, 96)


class Judge(AttributeJudge):
    """Convolutions down to 8 pixels a cell, then 64 features from every window of 4x4 cells.

    A picture of 32 pixels is one window; a frame of 64 is 25, of which learned attention takes the
    one with the digit, and so knows where that is.
    """

    defaults = JudgeConfig

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for width in config.widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.window = nn.Conv2d(channels, FEATURES, 4)
        self.attention = nn.Conv2d(FEATURES, 1, 1)
        self.add_heads()
        self.to(memory_format=torch.channels_last)  # a quarter less time on a CPU

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        windows = F.silu(self.window(self.trunk(x)))  # (n, 64, rows, columns)
        return attend(windows, self.attention(windows))


def attend(cells: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over a map: cells (n, c, h, w), logits (n, 1, h, w).

    Returns the mean cell (n, c) and the mean position (n, 2) as x, y in -1..1.
    """
    weights = logits.flatten(1).softmax(1).view_as(logits)
    across, down = weights.sum((1, 2)), weights.sum((1, 3))  # (n, w), (n, h)
    where = torch.stack([across @ _axis(across), down @ _axis(down)], 1)
    return (cells * weights).sum((2, 3)), where


def travel(where: Tensor) -> Tensor:
    """Positions (n, 5, 2) -> (n, 2): from end to end of the straight line through them."""
    time = torch.arange(FRAMES, dtype=where.dtype, device=where.device) - (FRAMES - 1) / 2
    return (FRAMES - 1) * (where * time[:, None]).sum(1) / time.square().sum()


def _axis(line: Tensor) -> Tensor:
    """Positions -1..1 of the cells of (n, m); a single cell is in the middle."""
    count = line.shape[1]
    return torch.linspace(-1, 1, count, device=line.device) if count > 1 else line.new_zeros(1)


def five_frames(x: Tensor) -> Tensor:
    """(n, c, f, h, w) -> (n, c, 5, h, w): evenly spaced, from the first to the last.

    Raises ValueError for fewer than 5 frames.
    """
    count = x.shape[2]
    if count < FRAMES:
        raise ValueError(f"judge: a video of {count} frames; it needs at least {FRAMES}")
    return x if count == FRAMES else x[:, :, np.linspace(0, count - 1, FRAMES).round()]


def to_tensor(images: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def video_tensor(videos: np.ndarray) -> Tensor:
    """(n, f, h, w, 3) uint8 -> (n, 3, f, h, w) float32 in -1..1."""
    flat = to_tensor(videos.reshape(-1, *videos.shape[2:]))
    return flat.unflatten(0, videos.shape[:2]).transpose(1, 2)


def tensors_of(samples: np.ndarray) -> Iterator[Tensor]:
    """Pictures or videos, uint8, as the tensors that a judge takes, some at a time."""
    tensor, size = (video_tensor, 32) if samples.ndim == 5 else (to_tensor, 250)
    for start in range(0, len(samples), size):
        yield tensor(samples[start : start + size])


def accuracy(
    judge: AttributeJudge, world: DigitWorld, count: int, *, videos: bool = False
) -> dict[str, float]:
    """Share of `count` real samples of `world` judged right, per attribute and for "all".

    Pictures, or videos, of which only the 5 frames that a judge looks at are drawn; of those, the
    motion counts, too.
    """
    right: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, 100):
        indices = np.arange(start, min(start + 100, count))
        samples, what = world.videos(indices, frames=FRAMES) if videos else world.batch(indices)
        for name, answer in judge.probabilities(samples).items():
            right.setdefault(name, []).append(answer.argmax(1) == getattr(what, name))
    joined = {name: np.concatenate(parts) for name, parts in right.items()}
    joined["all"] = np.logical_and.reduce(list(joined.values()))
    return {name: float(ok.mean()) for name, ok in joined.items()}


@cache
def judge(name: str) -> AttributeJudge:
    """A shipped judge by name, "digits-judge" or "digits-judge-b"; loaded once.

    Raises ValueError for any other name.
    """
    from accel.zoo.judge_b import Referee  # it is built from this module

    kinds = {"digits-judge": Judge, "digits-judge-b": Referee}
    if name not in kinds:
        raise ValueError(f"zoo: no judge {name!r}; known: {', '.join(kinds)}")
    return kinds[name].load(zoo.path(name))


def train(run: Training) -> None:
    """One stage."""
    run.seed_weights()
    judge = Judge.load(run.shipped).train() if run.shipped else Judge()
    loss = JudgeLoss(run.batch("judge"), run.seed, run.device)
    run.stage("judge", judge, loss)


def write(out: Path, folder: Path) -> None:
    """The judge's EMA weights as `save` keeps them."""
    judge = Judge()
    judge.load_state_dict(trained_weights(out, "judge"))
    judge.save(folder)


def presets(minutes: float, steps: int, lr: float) -> dict[str, Preset]:
    """One stage, "judge": so many minutes on a CPU core, so many steps on a GPU."""
    brief = LoopSettings(steps=6, checkpoint_steps=2, log_steps=2)
    return {
        "cpu": Preset(
            "cpu",
            "no",
            {"judge": Stage(64, LoopSettings(minutes=minutes, lr=lr, warmup=50, ema_decay=0.99))},
        ),
        "gpu": Preset("cuda", "bf16", {"judge": Stage(256, LoopSettings(steps=steps, lr=lr))}),
        "smoke": Preset("cpu", "no", {"judge": Stage(16, brief)}),
    }


MODEL = Model(presets=presets(minutes=12, steps=20_000, lr=2e-3), train=train, write=write)
