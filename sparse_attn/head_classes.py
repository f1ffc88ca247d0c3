"""Each head attends in space or in time, whichever errs less on a few of its queries.

Sparse VideoGen, arXiv 2502.01776. At every call a few queries are attended densely and with both
patterns, and each head takes the pattern with the smaller squared error. "Spatial" keeps the
nearest frames and, before them, the first; "temporal" the same places in all frames.
The paper moves tokens by head so that both are bands; blocks of the space-filling order need no
moving.
Costs `queries` / tokens of dense attention, and no synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.geometry import pattern
from sparse_attn.token_order import Grid

TIE = 1e-3  # of a distance in the other direction, so that there is an order among equals


def spatial_score(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Frames that are near."""
    apart = (q[:, None] - k[None]).abs()
    return -(apart[..., 0] + TIE * apart[..., 1:].square().sum(-1).sqrt())


def temporal_score(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """Places in the picture that are near, in all frames."""
    apart = (q[:, None] - k[None]).abs()
    return -(apart[..., 1:].square().sum(-1).sqrt() + TIE * apart[..., 0])


def squared_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keeps: list[Tensor], blocks: tuple[int, int]
) -> Tensor:
    """(patterns, b, h): of attention by each map against dense attention, on some queries."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(repeat, dim=1) for x in (k, v))
    logits = q[:, :, rows].float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    right, errors = logits.softmax(-1) @ v, []
    for keep in keeps:  # (1, 1, nq, nk)
        mask = keep[:, :, rows // blocks[0]].repeat_interleave(blocks[1], dim=-1)
        hidden = logits.masked_fill(~mask[..., : k.shape[2]], -math.inf)
        errors.append((hidden.softmax(-1) @ v - right).square().mean((-1, -2)))
    return torch.stack(errors)


@dataclass(frozen=True)
class HeadClasses(SparseAttention, Method):
    """Keep near frames, or near places, by head. queries: how many decide."""

    PAPER = "Sparse VideoGen, arXiv 2502.01776"

    density: float = 0.3
    queries: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"HeadClasses.density = {self.density}: above 0, at most 1")
        if self.queries < 1:
            raise ValueError(f"HeadClasses.queries = {self.queries}: at least 1")

    def neutral(self) -> HeadClasses:
        return replace(self, density=1.0)

    def nominal(self) -> float:
        return self.density

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        keeps = [
            pattern(score, self.density, self.ORDER, q, k, place, score is spatial_score)
            for score in (spatial_score, temporal_score)
        ]
        count = min(self.queries, q.shape[2])
        rows = torch.linspace(0, q.shape[2] - 1, count, device=q.device).long()
        best = squared_errors(q, k, live.values, rows, keeps, place.blocks).argmin(0)  # (b, h)
        return torch.where(best[..., None, None] == 0, *keeps)
