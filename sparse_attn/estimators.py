"""How much softmax mass a block of keys holds for a block of queries, without computing it, and
what stands for the blocks that are dropped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.block_map import block_mean_squares, block_means, block_sizes
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.reference import Pooled


def subblock_mass(q: Tensor, k: Tensor, blocks: tuple[int, int], parts: int = 4) -> Tensor:
    """Expected mass, float32 (b, h, nq, nk), rows sum to one.

    Blocks are cut into `parts` of consecutive tokens, each stood for by its mean. A part of the
    queries gives every block the sum of its softmax over parts of keys (a log-sum-exp, normalised)
    and a block of queries is the mean of its parts. q (b, h, s, d), k (b, g, s, d). Work:
    parts^2 / (block of queries * block of keys) of dense logits.
    """
    if dispatch.selects(q, blocks[0], parts) and dispatch.selects(k, blocks[1], parts):
        from sparse_attn.kernels import triton_select

        return triton_select.subblock_mass(q, k, blocks, parts)
    nq, nk = (-(-x.shape[2] // size) for x, size in zip((q, k), blocks, strict=True))
    sizes = [max(1, size // parts) for size in blocks]
    queries = block_means(q, sizes[0])  # (b, h, nq * parts, d)
    keys = block_means(k, sizes[1]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits + block_sizes(k.shape[2], sizes[1], k.device).log()  # a part weighs its tokens
    mass = logits.softmax(-1)
    mass = _cut(mass, -1, nk, blocks[1] // sizes[1]).sum(-1)
    return _cut(mass, 2, nq, blocks[0] // sizes[0], repeat=True).mean(3)


def complement(k: Tensor, v: Tensor, keep: Tensor, key_block: int) -> Pooled:
    """A mean key and value for each block, which stands for its tokens where it is not kept."""
    sizes = block_sizes(k.shape[2], key_block, k.device)
    bias = sizes.log().masked_fill(keep, -math.inf)
    return Pooled(
        block_means(k, key_block).to(k.dtype), block_means(v, key_block).to(v.dtype), bias
    )


def block_scores(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[int, int], pooled: bool) -> Tensor:
    """What is lost, about, where a block is not kept: its mass, or what its mean misses of it."""
    mass = subblock_mass(q, k, blocks)
    return mass * loss_by_means(q, k, v, blocks) if pooled else mass


def weighed(scores: Tensor, gains: Tensor) -> Tensor:
    """Scores (b, h, nq, nk) that compare between heads; gains (h,)."""
    return scores * gains.to(scores)[:, None, None]


def loss_by_means(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[int, int]) -> Tensor:
    """How far off a mean key and value are for a block, per mass: float32 (b, h, nq, nk).

    To first order a block of keys adds mass * (mean value + covariance of logits and values); its
    mean leaves out the covariance, which is at most the product of both standard deviations. That
    of the logits is taken over independent channels, for the mean square query of the block.
    """
    repeat = q.shape[1] // k.shape[1]
    spread_k, spread_v = (_variances(x, blocks[1]) for x in (k, v))
    squares = block_mean_squares(q, blocks[0]) / q.shape[-1]
    logits = squares @ spread_k.repeat_interleave(repeat, dim=1).transpose(-1, -2)
    values = spread_v.sum(-1).repeat_interleave(repeat, dim=1)
    return (logits * values[:, :, None]).sqrt()


def _variances(x: Tensor, block: int) -> Tensor:
    """Of each channel in each block, (b, h, blocks, d)."""
    return (block_mean_squares(x, block) - block_means(x, block).square()).clamp(min=0)


def exact_mass(q: Tensor, k: Tensor, rows: Tensor, key_block: int) -> Tensor:
    """True mass of single queries, float32 (b, h, rows, nk): what estimates are held against."""
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q[:, :, rows].float() @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return _cut(logits.softmax(-1), -1, -(-k.shape[2] // key_block), key_block).sum(-1)


def _cut(x: Tensor, dim: int, blocks: int, size: int, repeat: bool = False) -> Tensor:
    """Axis `dim` into (blocks, size); the end is filled with zeros, or with its last entry."""
    short = blocks * size - x.shape[dim]
    if short and repeat:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, *[last] * short], dim=dim)
    elif short:
        x = F.pad(x.transpose(dim, -1), (0, short)).transpose(dim, -1)
    return x.unflatten(dim, (blocks, size))
