"""Which blocks of keys each block of queries attends to: the one format that policies produce and
kernels read, and the rules that turn scores into it.

A map is a boolean (b, h, nq, nk) tensor; blocks are cut from the sequence as it stands, and only
the last may be ragged. Kernels read lists of ascending block numbers made from it on the device,
without a synchronisation and without atomics, so they are repeatable.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["row", "head", "layer"]


@dataclass(frozen=True, eq=False)
class BlockMap:
    """`keep[b, h, i, j]`: whether queries of block i attend to keys of block j."""

    keep: Tensor  # bool (b, h, nq, nk)
    query_block: int  # tokens
    key_block: int
    queries: int  # tokens in all; the last blocks may be ragged
    keys: int

    def __post_init__(self) -> None:
        want = (-(-self.queries // self.query_block), -(-self.keys // self.key_block))
        if self.keep.dtype != torch.bool or tuple(self.keep.shape[2:]) != want:
            raise ValueError(
                f"BlockMap: keep is {self.keep.dtype} {tuple(self.keep.shape)}; "
                f"{self.queries} x {self.keys} tokens want bool (b, h, {want[0]}, {want[1]})"
            )

    def density(self) -> Tensor:
        """Share of token pairs that are kept, (b, h), float32 on the device."""
        q = block_sizes(self.queries, self.query_block, self.keep.device)
        k = block_sizes(self.keys, self.key_block, self.keep.device)
        pairs = torch.einsum("bhij,i,j->bh", self.keep.float(), q, k)
        return pairs / (self.queries * self.keys)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Blocks in each list, int32 (b, h, nq)."""
        listed = self._listed_on_gpu
        return self.keep.sum(-1, dtype=torch.int32) if listed is None else listed[1]

    @functools.cached_property
    def _listed_on_gpu(self) -> tuple[Tensor, Tensor] | None:
        """Lists of all blocks and counts from one launch; None where there is no such kernel."""
        from sparse_attn.kernels import dispatch

        if not dispatch.lists(self.keep):
            return None
        from sparse_attn.kernels import triton_select

        return triton_select.listed(self.keep)

    def lists(self, width: int | None = None) -> Tensor:
        """Kept blocks in ascending order, int32 (b, h, nq, width), then others as padding.

        `width` must be at least the largest count; all blocks by default, which asks no device.
        """
        if self._listed_on_gpu is not None:
            return self._listed_on_gpu[0][..., :width].contiguous()
        # a stable sort of the flags puts the kept ones first and leaves them in order
        order = torch.sort(self.keep.logical_not().to(torch.uint8), dim=-1, stable=True).indices
        return order[..., :width].to(torch.int32).contiguous()

    def transposed(self) -> BlockMap:
        """Which queries each block of keys is seen by: what dK and dV are summed over."""
        keep = self.keep.transpose(-1, -2).contiguous()
        return BlockMap(keep, self.key_block, self.query_block, self.keys, self.queries)

    def tokens(self) -> Tensor:
        """The same map token by token, bool (b, h, queries, keys). For references and pictures."""
        rows = self.keep.repeat_interleave(self.query_block, dim=2)[:, :, : self.queries]
        return rows.repeat_interleave(self.key_block, dim=3)[..., : self.keys]


def block_sizes(tokens: int, block: int, device: torch.device | None = None) -> Tensor:
    """Tokens in each block, float32; the last may be ragged."""
    sizes = torch.full((-(-tokens // block),), float(block), device=device)
    sizes[-1] = tokens - (len(sizes) - 1) * block
    return sizes


def blocked(x: Tensor, block: int) -> Tensor:
    """(b, h, s, d) -> (b, h, blocks, block, d), the end filled with copies of the last token."""
    short = -x.shape[2] % block
    if short:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
    return x.unflatten(2, (-1, block))


def block_means(x: Tensor, block: int) -> Tensor:
    """Means of `block` consecutive tokens in float32, (b, h, blocks, d); the last one of what is
    there."""
    from sparse_attn.kernels import dispatch

    if dispatch.selects(x, block):
        from sparse_attn.kernels import triton_select

        return triton_select.block_means(x, block)
    whole = x.shape[2] // block * block
    means = x[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], dim=2)


def block_mean_squares(x: Tensor, block: int) -> Tensor:
    """As ``block_means``, of squares."""
    from sparse_attn.kernels import dispatch

    if dispatch.selects(x, block):
        from sparse_attn.kernels import triton_select

        return triton_select.block_means(x, block, squares=True)
    return block_means(x.float().square(), block)


# -- rules: from scores to maps ---------------------------------------------------------------


def keep_share(scores: Tensor, share: float, scope: Scope = "row") -> Tensor:
    """The best `share` of blocks by score, at least one a row; ties go as torch's topk has them.

    scope: within which the share holds. "row" gives every block of queries as many; "head" and
    "layer" give more to rows (and heads) whose scores are higher, which is the best use of as much
    work where a score is the expected softmax mass: the sum of what is kept is largest.
    """
    nk = scores.shape[-1]
    if share >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    best = _top(scores, max(1, round(share * nk)))
    if scope == "row":
        return best
    flat = scores.flatten(2) if scope == "head" else scores.flatten(1)
    most = _top(flat, max(1, round(share * flat.shape[-1])))
    return most.view_as(scores) | _top(scores, 1)


def leading(order: Tensor, count: Tensor) -> Tensor:
    """bool: the first `count` (..., 1) of each row of blocks in an order (..., nk)."""
    kept = torch.arange(order.shape[-1], device=order.device) < count
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _top(scores: Tensor, count: int) -> Tensor:
    best = scores.topk(count, dim=-1, sorted=False).indices  # a sort would cost more than the rest
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
