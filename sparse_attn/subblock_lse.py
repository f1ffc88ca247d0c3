"""Keeps the blocks that hold most softmax mass by an estimate from means of sub-blocks.

The default policy: deterministic, no random state, under one per cent of the work of dense
attention. The estimate is that of SGLang's sub-block selection (a log-sum-exp over the means of
4x4 sub-blocks of a pair of blocks), normalised per part of the queries, so that it is a mass and
can be compared between rows, heads and layers: `allocate` spends a layer's budget where it retains
most. `pooled` adds what was dropped back as one mean key and value a block, weighted by its tokens,
in the same softmax (Video-BLADE's global branch, without counting what is kept twice): at density
1 it is dense attention. Costs no memory beyond the maps; no synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from accel.artifact import ArtifactRef
from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import block_means, block_sizes, keep_share, keep_shares_of_heads
from sparse_attn.budgets import Budgets
from sparse_attn.estimators import subblock_mass
from sparse_attn.kernels.reference import Pooled


def complement(k: Tensor, v: Tensor, keep: Tensor, key_block: int) -> Pooled:
    """A mean key and value for each block, which stands for its tokens where it is not kept."""
    sizes = block_sizes(k.shape[2], key_block, k.device)
    bias = sizes.log().masked_fill(keep, -math.inf)
    pooled = (block_means(x, key_block).to(x.dtype) for x in (k, v))
    return Pooled(*pooled, bias)


@dataclass(frozen=True)
class SubblockLSE(SparseAttention, Method):
    """Attend to the blocks of keys with the largest estimated softmax mass.

    density: share of blocks kept; 1 is dense attention. allocate: within what the share holds, a
    "row" of blocks, a "head" or a "layer". pooled: what is dropped takes part as means. artifact:
    of `accel calibrate sparse`; then `density` is the mean over layers, heads and noise levels,
    spent where it errs least.
    """

    PAPER = "SGLang sub-block selection; pooled branch after Video-BLADE, arXiv 2508.10774"

    density: float = 0.3
    allocate: Literal["row", "head", "layer"] = "layer"
    pooled: bool = True
    artifact: ArtifactRef | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"SubblockLSE.density = {self.density}: above 0, at most 1")

    def neutral(self) -> SubblockLSE:
        return replace(self, density=1.0, artifact=None)

    def nominal(self) -> float:
        return self.density

    def prepare(self, pipe: Any, live: LiveSparse) -> None:
        if self.artifact is not None and self.density < 1:
            live.tables = Budgets.load(self.artifact, pipe).at_density(self.density)

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        mass = subblock_mass(q, k, place.blocks)
        if live.tables is None:
            return keep_share(mass, self.density, self.allocate)
        shares = live.tables.shares(place.denoiser, place.layer, place.sigma)
        return keep_shares_of_heads(mass, torch.as_tensor(shares))

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        return complement(k, v, keep, place.blocks[1]) if self.pooled else None
