"""How far apart blocks of video tokens lie: what static patterns are made of.

A static pattern is a score for every pair of blocks that depends on places alone; the best share of
it is kept. So all patterns are compared at equal density, on any grid, and work for any number of
text tokens. Scores are computed from the places of sub-blocks of tokens; maps are kept by grid
(not as inference tensors, wherever they are made first: then no run could have gradients).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn._live import ORDERS, LiveSparse, Place, SparseAttention
from sparse_attn.block_map import block_means, keep_share
from sparse_attn.token_order import Grid, places

# (queries (m, 3), keys (n, 3)) -> score (m, n); places are (frame, row, column) in tokens
Score = Callable[[Tensor, Tensor, Grid], Tensor]
TEXT_SCORE = float("inf")  # text is always kept
PARTS = 4  # of a block, whose pairs are scored and averaged


def block_scores(
    score: Score, grid: Grid, order: str, text: tuple[int, int], blocks: tuple[int, int]
) -> Tensor:
    """(nq, nk): mean score of the pairs of parts of two blocks. text: tokens that follow the
    video's, in queries and in keys; pairs with them score highest."""
    at = places(grid, ORDERS[order](grid)).double()
    parts = [max(1, size // PARTS) for size in blocks]
    q, k = (block_means(at[None, None], size)[0, 0] for size in parts)
    pairs = score(q, k, grid)  # (parts of queries, parts of keys)
    for axis, (size, part) in enumerate(zip(blocks, parts, strict=True)):
        pairs = _mean(pairs, axis, size // part)  # of the parts of a block
    rows, columns = (-(-(len(at) + more) // size) for more, size in zip(text, blocks, strict=True))
    out = torch.full((rows, columns), TEXT_SCORE, dtype=pairs.dtype)
    out[: pairs.shape[0], : pairs.shape[1]] = pairs
    return out.float()


def with_sink(scores: Tensor, sinks: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Scores (nq, nk) in which blocks of keys that are `sinks` (nk,) are above all others, but for
    those that hold the queries' own tokens: the first frame of a video reaches into a fifth of the
    blocks of 81 frames, and in fewer frames may leave nothing else."""
    begins = [torch.arange(n) * size for n, size in zip(scores.shape, blocks, strict=True)]
    ends = [begin + size for begin, size in zip(begins, blocks, strict=True)]
    own = (begins[0][:, None] < ends[1]) & (begins[1] < ends[0][:, None])
    finite = scores[scores.isfinite()]
    span = 1 + finite.amax() - finite.amin()
    return scores + span * sinks + 2 * span * own


def in_first_frame(grid: Grid, order: str, block: int) -> Tensor:
    """(blocks,): whether a block of the video's tokens holds one of the first frame."""
    first = places(grid, ORDERS[order](grid))[:, 0] == 0
    return torch.stack([part.any() for part in first.split(block)])


def pattern(
    score: Score, density: float, order: str, q: Tensor, k: Tensor, place: Place, sink: bool = False
) -> Tensor:
    """The `density` of blocks with the best scores, bool (1, 1, nq, nk); made once a grid. sink:
    blocks that hold tokens of the first frame come before others, see `with_sink`."""
    video = place.order.forward.shape[0]
    text = (q.shape[2] - video, k.shape[2] - video)
    return _pattern(score, density, sink, place.grid, order, text, place.blocks, q.device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _pattern(
    score: Score, density: float, sink: bool, grid: Grid, order: str, text: tuple[int, int],
    blocks: tuple[int, int], device: torch.device,
) -> Tensor:  # fmt: skip
    scores = block_scores(score, grid, order, text, blocks)
    if sink:
        sinks = torch.zeros(scores.shape[1], dtype=torch.bool)
        first = in_first_frame(grid, order, blocks[1])
        sinks[: len(first)] = first
        scores = with_sink(scores, sinks, blocks)
    return keep_share(scores[None, None], density).to(device)


def _mean(x: Tensor, axis: int, parts: int) -> Tensor:
    """Mean over every `parts` of an axis; the last may be fewer."""
    owner = torch.arange(x.shape[axis]) // parts
    shape = list(x.shape)
    shape[axis] = int(owner[-1]) + 1
    total = x.new_zeros(shape).index_add(axis, owner, x)
    count = torch.bincount(owner).to(x.dtype)
    return total / (count[:, None] if axis == 0 else count)


@dataclass(frozen=True)
class StaticPattern(SparseAttention):
    """A policy whose map depends on places only: the `density` of blocks with the best score."""

    density: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            name = type(self).__name__
            raise ValueError(f"{name}.density = {self.density}: above 0, at most 1")

    @abstractmethod
    def score(self) -> Score:
        """Must be the same object for equal settings: maps are kept by it."""

    def has_sink(self) -> bool:
        """Whether the first frame comes before what is near, see `with_sink`."""
        return False

    def nominal(self) -> float:
        return self.density

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        kept = pattern(self.score(), self.density, self.ORDER, q, k, place, self.has_sink())
        return kept.expand(*q.shape[:2], -1, -1)
