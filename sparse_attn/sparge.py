"""Keeps blocks by the softmax of block means, and all of what means cannot stand for.

SpargeAttn's first stage, arXiv 2502.18137. A block whose tokens are not alike (mean cosine of
pairs below `alike`) is badly described by its mean: such queries attend to everything, such keys
are attended to by everyone and left out of the softmax. Of the others the best are kept up to
`mass` of the softmax, without the block that crosses it, and one at least. Keys lose their mean
over the sequence first, which shifts all logits of a query alike. Not here: the second stage,
inside their kernel, and their 8-bit arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import block_means, blocked, leading


def likeness(x: Tensor, block: int) -> Tensor:
    """(b, h, blocks): mean cosine of all pairs of tokens of a block, from the sum of directions."""
    directions = torch.nn.functional.normalize(blocked(x, block).float(), dim=-1)
    return directions.mean(3).square().sum(-1)


def predicted(q: Tensor, k: Tensor, blocks: tuple[int, int], mass: float, alike: float) -> Tensor:
    """Blocks to keep, (b, h, nq, nk)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    k = k - k.mean(2, keepdim=True)
    unlike_q, unlike_k = (likeness(x, n) < alike for x, n in zip((q, k), blocks, strict=True))
    means = (block_means(x, n) for x, n in zip((q, k), blocks, strict=True))
    queries, keys = means
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(unlike_k[:, :, None], -math.inf)
    weights = logits.softmax(-1).nan_to_num()  # no key of a head is alike: all are kept anyway
    return keep_within(weights, mass) | unlike_q[..., None] | unlike_k[:, :, None]


def keep_within(weights: Tensor, mass: float) -> Tensor:
    """The best blocks of each row whose sum does not exceed `mass` of the row's; at least one."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    total = ranked.cumsum(-1)
    return leading(order, (total <= mass * total[..., -1:]).sum(-1, keepdim=True).clamp(min=1))


@dataclass(frozen=True)
class SpargePrediction(SparseAttention, Method):
    """Keep `mass` of the softmax of means; all of blocks less `alike` than this."""

    PAPER = "SpargeAttn, arXiv 2502.18137"

    blocks: tuple[int, int] = (128, 64)
    mass: float = 0.9
    alike: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise ValueError(f"SpargePrediction.mass = {self.mass}: above 0, at most 1")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"SpargePrediction.alike = {self.alike}: a cosine, -1 to 1")

    def neutral(self) -> SpargePrediction:
        return replace(self, mass=1.0)

    def attends_densely(self) -> bool:
        return self.mass == 1

    def nominal(self) -> float:
        """Unknown before; what is kept is in the report. Assumed to be half."""
        return 0.5

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        return predicted(q, k, place.blocks, self.mass, self.alike)
