"""digits-judge-b, the referee: a second opinion that shares nothing with digits-judge.

Another architecture (ConvNeXt, Liu et al. 2022, arXiv:2201.03545, in small) and other handwriting:
the 420 `referee` scans. Nothing is trained, calibrated, searched or tuned against it; it is for
final reports only. So few scans are made to last by deforming them further.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.zoo.judge import FEATURES, AttributeJudge, attend, presets
from accel.zoo.judge_data import JudgeLoss
from accel.zoo.training import Model, Training, trained_weights

SPLIT = "referee"
BEND = 1.2  # of `judge_data.roughen`, for scans that are few


@dataclass(frozen=True)
class RefereeConfig:
    """Widths and numbers of blocks at 4 and 8 pixels a cell."""

    widths: tuple[int, int] = (32, 64)
    depths: tuple[int, int] = (1, 2)
    expansion: int = 3  # of the hidden layer in a block


class Block(nn.Module):
    """Depthwise 5x5 convolution, LayerNorm, and a GELU network per cell, beside the identity."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.spread = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w), like the result."""
        y = self.norm(self.spread(x).movedim(1, -1))
        return x + self.narrow(F.gelu(self.widen(y))).movedim(-1, 1)


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of (n, c, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Referee(AttributeJudge):
    """ConvNeXt blocks on the colours and the contrast, down to 8 pixels a cell.

    Windows of 4x4 cells and attention, as in `Judge`.
    """

    defaults = RefereeConfig

    def __init__(self, config: RefereeConfig = RefereeConfig()):
        super().__init__()
        self.config = config
        a, b = config.widths
        self.trunk = nn.Sequential(
            nn.Conv2d(4, a // 2, 3, stride=2, padding=1),
            Norm(a // 2),
            nn.GELU(),
            nn.Conv2d(a // 2, a, 3, stride=2, padding=1),
            Norm(a),
            *(Block(a, config.expansion) for _ in range(config.depths[0])),
            Norm(a),
            nn.Conv2d(a, b, 2, stride=2),
            *(Block(b, config.expansion) for _ in range(config.depths[1])),
            Norm(b),
        )
        self.window = nn.Conv2d(b, FEATURES, 4)
        self.attention = nn.Conv2d(FEATURES, 1, 1)
        self.add_heads()
        self.to(memory_format=torch.channels_last)  # LayerNorm wants the channels last, too

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([x, contrast(x)], 1).contiguous(memory_format=torch.channels_last)
        cells = self.trunk(x)
        windows = F.gelu(self.window(cells))  # (n, 64, rows, columns)
        return attend(windows, self.attention(windows))


def contrast(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w): how far pixels are from their picture's middle colour, 0..1.

    Most of a picture is background, so this is the ink, whatever its colour; the shapes of so few
    scans need not be learned once per colour.
    """
    middle = x.flatten(2).median(2).values[..., None, None]
    distance = (x - middle).square().sum(1, keepdim=True).add(1e-6).sqrt()
    return distance / distance.amax((2, 3), keepdim=True)


def train(run: Training) -> None:
    """One stage."""
    run.seed_weights()
    referee = Referee.load(run.shipped).train() if run.shipped else Referee()
    loss = JudgeLoss(run.batch("judge"), run.seed, run.device, split=SPLIT, bend=BEND)
    run.stage("judge", referee, loss)


def write(out: Path, folder: Path) -> None:
    """The referee's EMA weights as `save` keeps them."""
    referee = Referee()
    referee.load_state_dict(trained_weights(out, "judge"))
    referee.save(folder)


MODEL = Model(presets=presets(minutes=12, steps=20_000, lr=2e-3), train=train, write=write)
