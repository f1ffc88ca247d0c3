"""Keeps the same number of blocks for every block of queries: the plain top-k over block means.

What VSA (arXiv 2505.13389) and MoBA-like methods select with, without their trained branches: the
logit between the mean query and the mean key of a pair of blocks. The yardstick of the estimators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import keep_share
from sparse_attn.estimators import subblock_mass


@dataclass(frozen=True)
class TopK(SparseAttention, Method):
    """Keep the `density` best blocks of keys of every block of queries, by their means."""

    PAPER = "VSA's selection, arXiv 2505.13389"

    density: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"TopK.density = {self.density}: above 0, at most 1")

    def neutral(self) -> TopK:
        return replace(self, density=1.0)

    def nominal(self) -> float:
        return self.density

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        return keep_share(subblock_mass(q, k, place.blocks, parts=1), self.density)
