"""Each block of queries attends to a window of blocks around it in space and time.

Sliding Tile Attention, arXiv 2502.04507. There, tokens lie in boxes of one size that must divide
the video; here blocks of the space-filling order stand for the boxes, on any grid, and the window
is the `density` of blocks that are nearest, which at a border reaches farther into the video, as
the paper's clamped windows do. No search of a window for each head: that is `subblock_lse`'s part.
Costs nothing at run time: a map is made once a grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.method import Method
from sparse_attn.geometry import Score, StaticPattern
from sparse_attn.token_order import Grid


@functools.lru_cache(maxsize=16)
def window_score(frames: float, height: float, width: float) -> Score:
    """Minus how large a window of these proportions must be to hold the other place, 0 to 1."""
    shape = torch.tensor([frames, height, width], dtype=torch.float64)

    def score(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        sides = torch.tensor(grid, dtype=torch.float64) * shape
        return -((q[:, None] - k[None]).abs() / sides).amax(-1)

    return score


@dataclass(frozen=True)
class SlidingTile(StaticPattern, Method):
    """Attend to the nearest blocks. window: its proportions of frames, height and width."""

    PAPER = "Sliding Tile Attention, arXiv 2502.04507"

    window: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.window) <= 0:
            raise ValueError(f"SlidingTile.window = {self.window}: three numbers above 0")

    def neutral(self) -> SlidingTile:
        return replace(self, density=1.0)

    def score(self) -> Score:
        return window_score(*self.window)
