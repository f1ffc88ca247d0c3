"""Selection on a GPU in few launches: means, softmax mass of blocks, lists of what is kept.

Each is what ``estimators`` and ``block_map`` compute in plain operations, which are the
specification and run where these do not. In plain operations a selection is some forty launches and
writes a logit for every pair of sub-blocks several times over; here the mass kernel goes over the
keys twice, once for the softmax's denominator and once for the mass, and writes one number for each
pair of blocks. Products in TF32 where the part has it: means of 16 tokens only rank blocks.
Layout: q and k by strides, last stride 1; means, mass and lists in one piece.
Hardware: compiled for sm80, 86, 89, 90, 100 and 120 and run in the interpreter; not yet on a GPU.
Limits: ``dispatch.selects``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.device import on_device
from sparse_attn.kernels.launch import OPTIONS, last_stride_one, padded

LOG2E = tl.constexpr(math.log2(math.e))
ROWS = 64  # tokens of a program that takes means
QUERIES, KEYS = 16, 16  # blocks on each side of a tile of mass


@triton.jit(do_not_specialize=["heads", "tokens", "count"])
def means(
    X, Mean, x_b, x_h, x_s, heads, tokens, count,
    PART: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SQUARES: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of PARTS parts, h, b). Mean (b, h, count, d): of PART tokens or squares."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * PART * PARTS + tl.arange(0, PART * PARTS)
    there = (rows < tokens)[:, None] & (d < HEAD_DIM)[None, :]
    at = X + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + rows[:, None].to(tl.int64) * x_s
    x = tl.load(at + d[None, :], mask=there, other=0.0).to(tl.float32)
    if SQUARES:
        x = x * x
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    size = tl.minimum(tokens - part * PART, PART).to(tl.float32)
    mean = tl.sum(x.reshape(PARTS, PART, BLOCK_D), 1) / tl.maximum(size, 1.0)[:, None]
    line = (b * heads + h).to(tl.int64)
    out = Mean + (line * count + part[:, None]) * HEAD_DIM + d[None, :]
    tl.store(out, mean, mask=(part < count)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _logits(q, K, at, count, tokens, scale2, d, PART: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Of means, in base 2; each part of keys weighs its tokens, those beyond the last none."""
    there = at < count
    k_at = K + at[:, None] * HEAD_DIM + d[None, :]
    k = tl.load(k_at, mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    size = tl.minimum(tokens - at * PART, PART)
    weight = tl.log2(tl.maximum(size, 1).to(tl.float32))
    return tl.where(there[None, :], tl.dot(q, k.T) * scale2 + weight[None, :], -float("inf"))


@triton.jit(do_not_specialize=["heads", "groups", "q_count", "k_count", "keys", "nq", "nk"])
def mass(
    Q, K, Mass, heads, groups, q_count, k_count, keys, nq, nk, scale,
    REPEAT: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of query blocks, h, b). Q (b, h, q_count, d), K (b, g, k_count, d): means."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    line = (b * heads + h).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * QUERIES * PARTS + tl.arange(0, QUERIES * PARTS)
    rows = tl.minimum(rows, q_count - 1)  # a short block has its last part several times
    q_at = Q + (line * q_count + rows[:, None]) * HEAD_DIM + d[None, :]
    q = tl.load(q_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    K += (b * groups + h // REPEAT).to(tl.int64) * k_count * HEAD_DIM
    columns = tl.arange(0, KEYS * PARTS)
    scale2 = scale * LOG2E
    m = tl.full((QUERIES * PARTS,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES * PARTS,), tl.float32)
    for start in range(0, nk * PARTS, KEYS * PARTS):
        x = _logits(q, K, start + columns, k_count, keys, scale2, d, PART, HEAD_DIM)
        m_new = tl.maximum(m, tl.max(x, 1))
        total = total * tl.exp2(m - m_new) + tl.sum(tl.exp2(x - m_new[:, None]), 1)
        m = m_new
    lse = m + tl.log2(total)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    for start in range(0, nk * PARTS, KEYS * PARTS):
        x = _logits(q, K, start + columns, k_count, keys, scale2, d, PART, HEAD_DIM)
        p = tl.exp2(x - lse[:, None])
        p = tl.sum(p.reshape(QUERIES * PARTS, KEYS, PARTS), 2)
        p = tl.sum(p.reshape(QUERIES, PARTS, KEYS), 1) / PARTS
        j = start // PARTS + tl.arange(0, KEYS)
        out = Mass + (line * nq + i[:, None]) * nk + j[None, :]
        tl.store(out, p, mask=(i < nq)[:, None] & (j < nk)[None, :])


@triton.jit(do_not_specialize=["nk"])
def lists(Keep, List, Count, nk, BLOCK: tl.constexpr):
    """Grid: (rows,). Kept blocks in ascending order, then the others."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    kept = tl.load(Keep + row * nk + j, mask=j < nk, other=0).to(tl.int32)
    before = tl.cumsum(kept, 0) - kept
    count = tl.sum(kept, 0)
    place = tl.where(kept > 0, before, count + j - before)
    tl.store(List + row * nk + place, j, mask=j < nk)
    tl.store(Count + row, count)


def block_means(x: Tensor, block: int, *, squares: bool = False) -> Tensor:
    """``block_map.block_means`` or, of squares, ``block_mean_squares``; block a power of two."""
    x = last_stride_one(x)
    b, h, s, d = x.shape
    count = -(-s // block)
    mean = torch.empty(b, h, count, d, dtype=torch.float32, device=x.device)
    parts = max(1, ROWS // block)
    kernel: Any = means[(-(-count // parts), h, b)]
    with on_device(x.device):
        kernel(
            x, mean, *x.stride()[:3], h, s, count,
            PART=block, PARTS=parts, HEAD_DIM=d, BLOCK_D=padded(d),
            SQUARES=squares, **OPTIONS, num_warps=4 if block <= ROWS else 8,
        )  # fmt: skip
    return mean


def subblock_mass(q: Tensor, k: Tensor, blocks: tuple[int, int], parts: int) -> Tensor:
    """``estimators.subblock_mass``; blocks are powers of two that `parts` divides."""
    part_q, part_k = (size // parts for size in blocks)
    b, h, s, d = q.shape
    keys, g = k.shape[2], k.shape[1]
    q, k = block_means(q, part_q), block_means(k, part_k)
    nq, nk = -(-s // blocks[0]), -(-keys // blocks[1])
    out = torch.empty(b, h, nq, nk, dtype=torch.float32, device=q.device)
    kernel: Any = mass[(-(-nq // QUERIES), h, b)]
    with on_device(q.device):
        kernel(
            q, k, out, h, g, q.shape[2], k.shape[2], keys, nq, nk, 1 / math.sqrt(d),
            REPEAT=h // g, PARTS=parts, PART=part_k, HEAD_DIM=d, BLOCK_D=padded(d),
            QUERIES=QUERIES, KEYS=KEYS, **OPTIONS, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """keep bool (b, h, nq, nk) -> lists of ``BlockMap.lists`` and its counts, int32."""
    keep = keep.contiguous()
    nk = keep.shape[-1]
    out = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    counts = torch.empty(keep.shape[:-1], dtype=torch.int32, device=keep.device)
    kernel: Any = lists[(counts.numel(),)]
    block = triton.next_power_of_2(nk)
    with on_device(keep.device):
        kernel(keep, out, counts, nk, BLOCK=block, **OPTIONS, num_warps=4 if block < 4096 else 8)
    return out, counts
