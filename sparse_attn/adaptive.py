"""Video-BLADE's adaptive block-sparse attention, exactly, with its pooled global branch.

arXiv 2508.10774. Written from a description and formulas, not from its code. A block of keys scores
the largest softmax weight that sampled queries of a block of queries give sampled keys of it,
relative to their row's largest: a maximum, not a mass. The best are kept until 95 % of the scores'
sum; the block that crosses is dropped, which with the upper clamp makes it a top-k that sometimes
stops early. All keys, the kept ones too, take part once more as means of 30 tokens. Deviations:
samples are drawn from a generator of our own, seeded by run position and alike in a batch, so that
a video can be made again, alone or among others; the merge is one softmax in float32, not two
rounded to the type. Its caps were chosen for a student trained under them; without training loosen
them. Costs 1 / 16 of dense logits for the samples, and no synchronisation.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import blocked, leading
from sparse_attn.kernels.reference import Pooled

SAMPLES = 32  # of each block of 128, as released; a quarter of other sizes
AT_ONCE = 1024  # sampled queries whose logits are held: of a long video's, all would fill a GPU


def importance(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(b, h, nq, nk), rows sum to one. q, k (b, h, blocks, block, d); the sampled places in every
    block of a head, rows and columns (b or 1, h, samples)."""
    nq, nk, scale = q.shape[2], k.shape[2], 1 / math.sqrt(q.shape[-1])
    queries = _sampled(q, rows).flatten(2, 3).float()
    keys = _sampled(k, columns).flatten(2, 3).float().transpose(-1, -2)
    parts = (part @ keys * scale for part in queries.split(AT_ONCE, dim=2))
    best = [logits.unflatten(-1, (nk, -1)).amax(-1) for logits in parts]
    best = torch.cat(best, dim=2)  # (b, h, nq * samples, nk)
    weight = (best - best.amax(-1, keepdim=True)).exp()
    score = weight.unflatten(2, (nq, -1)).amax(3)
    return score / score.sum(-1, keepdim=True)


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    b, _, n, _, d = x.shape
    index = places[:, :, None, :, None].expand(b, -1, n, -1, d)
    return x.gather(3, index)


def drawn(heads: int, block: int, seed: int, device: torch.device) -> Tensor:
    """(1, h, samples): places in a block, without repetition; on a GPU, without waiting for it."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.rand(1, heads, block, generator=draw).argsort(-1)[..., : _samples(block)]
    if device.type != "cuda":
        return places.to(device)
    return places.pin_memory().to(device, non_blocking=True)


def select(score: Tensor, mass: float, low: float, high: float) -> Tensor:
    """Blocks up to, without, the one that crosses `mass`; clamped to shares of all blocks."""
    nk = score.shape[-1]
    ranked, order = score.sort(dim=-1, descending=True, stable=True)
    total = ranked.cumsum(-1)
    crossing = (total < mass * total[..., -1:]).sum(-1, keepdim=True)  # its index, from zero
    return leading(order, crossing.clamp(max(1, int(low * nk)), max(1, int(high * nk))))


def pooled_windows(x: Tensor, size: int) -> Tensor:
    """Means of windows of `size` consecutive tokens, the end filled with the last token."""
    return blocked(x, size).mean(3, dtype=torch.float32).to(x.dtype)


@dataclass(frozen=True)
class Adaptive(SparseAttention, Method):
    """Keep blocks of keys by sampled importance; all keys take part once more as means.

    mass: of the scores that is kept. low, high: shares of all blocks that are kept at least and at
    most. window: tokens of a mean in the global branch; 0 is without it.
    """

    PAPER = "Video-BLADE, arXiv 2508.10774"

    blocks: tuple[int, int] = (128, 128)
    mass: float = 0.95
    low: float = 0.05
    high: float = 0.17
    window: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"Adaptive.low, high = {self.low}, {self.high}: 0 <= low <= high <= 1")
        if not 0 < self.mass <= 1:
            raise ValueError(f"Adaptive.mass = {self.mass}: above 0, at most 1")
        if self.window < 0:
            raise ValueError(f"Adaptive.window = {self.window}: at least 0")

    def neutral(self) -> None:
        """None: at density 1 the global branch counts every key twice."""
        return

    def nominal(self) -> float:
        return self.high + (1 / self.window if self.window else 0) + 1 / 32

    def attends_densely(self) -> bool:
        return False

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        rows, columns = (
            drawn(q.shape[1], size, _seed(place, of), q.device)
            for size, of in zip(place.blocks, "qk", strict=True)
        )
        queries, keys = (blocked(x, size) for x, size in zip((q, k), place.blocks, strict=True))
        score = importance(queries, keys, rows, columns)
        return select(score, self.mass, self.low, self.high)

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        if not self.window:
            return None
        bias = torch.full((1, 1, 1, 1), math.log(self.window), device=k.device)
        return Pooled(pooled_windows(k, self.window), pooled_windows(v, self.window), bias)


def _samples(block: int) -> int:
    return max(1, block * SAMPLES // 128)


def _seed(place: Place, of: str) -> int:
    where = (place.denoiser, place.layer, place.step, place.branch, of)
    return zlib.crc32(repr(where).encode())
