"""Attention that thins out with distance in time: half as wide for every doubling of it.

Radial Attention, arXiv 2506.19852. The paper allows, between frames at distance d, places whose
distance is below a width that halves whenever d doubles, and keeps the first frame in view. Here
the width is what makes the `density` hold, distances are measured in the picture, not along its
rows, and blocks follow the space-filling order: the first frame reaches into many, which come right
after a query's own blocks. Costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from accel.method import Method
from sparse_attn.geometry import Score, StaticPattern
from sparse_attn.token_order import Grid


def radial_score(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Minus the distance in the picture, twice as much for every doubling of that in time."""
    apart = (q[:, None] - k[None]).abs()  # (m, n, 3)
    octaves = apart[..., 0].clamp(min=1).log2().ceil()
    return -(apart[..., 1:].square().sum(-1).sqrt() + 1) * 2**octaves


@dataclass(frozen=True)
class Radial(StaticPattern, Method):
    """Attend near, and less far the farther in time. sink: the first frame is seen by all; where
    the density does not hold it, what of it is nearest."""

    PAPER = "Radial Attention, arXiv 2506.19852"

    sink: bool = True

    def neutral(self) -> Radial:
        return replace(self, density=1.0)

    def score(self) -> Score:
        return radial_score

    def has_sink(self) -> bool:
        return self.sink
