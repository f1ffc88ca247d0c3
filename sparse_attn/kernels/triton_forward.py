"""Attention to kept blocks on a GPU: one Triton kernel that walks lists of blocks.

Origin: written from the formulas of FlashAttention-2 (arXiv 2307.08691) and sparse_attn's design.
Layout: q (b, h, s, d), k and v (b, g, s, d) by strides, last stride 1; nothing is copied, and the
output has the strides of q. A program computes one tile of queries. Its list of kept blocks is seen
as one run of keys, cut into tiles of any width, so blocks of 64 keys run as tiles of 128 where
these are faster; only the last tile is masked (a ragged last block is the last of an ascending
list). Pooled keys follow in a second, short loop with their bias. Softmax in base 2 and float32.
Programs of a head follow one another, longest list first: keys of few heads fit the cache.
Hardware: compiled for sm80, 86, 89, 90, 100 and 120 and run in the interpreter; not yet timed on a
GPU. No block pointers or inline assembly, and descriptors only where a configuration asks for them,
so ROCm's compiler takes it as well. Triton 3.6 to 3.9 do not specialise warps in a loop that reads
a list: they ignore the wish or fail.
Limits: types float16, bfloat16, float32; head sizes up to 256 (others are filled up to a power of
two); float32 in full precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.device import on_device
from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import launch
from sparse_attn.kernels.launch import (
    OPTIONS,
    Config,
    capability,
    last_stride_one,
    padded,
    pooled_arguments,
    strides,
)
from sparse_attn.kernels.reference import Attention, Pooled

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
WHOLE, MASKED = tl.constexpr(False), tl.constexpr(True)  # tiles of keys


@triton.jit
def _update(acc, m, total, logits, v, scale2, PRECISION: tl.constexpr):
    """One tile of the online softmax. logits (m, n): times scale2 in base 2; they may be -inf."""
    m_new = tl.maximum(m, tl.max(logits, 1) * scale2)
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(logits * scale2 - m_safe[:, None])  # one multiply-add for each
    alpha = tl.exp2(m - m_safe)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def _key(index_ptr, place, KEY_BLOCK: tl.constexpr):
    """Which key stands at a place, or at some, of a list's run of keys."""
    return tl.load(index_ptr + place // KEY_BLOCK) * KEY_BLOCK + place % KEY_BLOCK


@triton.jit
def _rows_of(at, rows, stride, columns, there, HEAD_DIM: tl.constexpr, SOME: tl.constexpr):
    """Rows of a matrix, (n, BLOCK_D); zeros in columns that fill a head size up, and where a row is
    not `there`."""
    found = at + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if SOME:
        return tl.load(found, mask=there[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if columns.shape[0] != HEAD_DIM:
        return tl.load(found, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(found)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "pooled", "nq", "width"])
def forward(
    Q, K, V, Out, Lse, Index, Count, Order, PooledK, PooledV, Bias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    pk_b, pk_h, pk_s, pv_b, pv_h, pv_s, bias_b, bias_h, bias_q, bias_p,
    heads, queries, keys, pooled, nq, width, scale,
    REPEAT: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, h, b). DESCRIBED: K and V are tensor descriptors."""
    tiles: tl.constexpr = QUERY_BLOCK // BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2)
    line = (b * heads + h).to(tl.int64) * nq
    i = tl.load(Order + line + tl.program_id(0) // tiles)  # this program's block of queries
    first = i * QUERY_BLOCK + (tl.program_id(0) % tiles) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    b64 = b.to(tl.int64)
    g = h // REPEAT
    g64 = g.to(tl.int64)
    h64 = h.to(tl.int64)
    inside = rows < queries

    q = _rows_of(Q + b64 * q_b + h64 * q_h, rows, q_s, d, inside, HEAD_DIM, MASKED)
    index = Index + (line + i) * width
    count = tl.load(Count + line + i)
    scale2 = scale * LOG2E

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    # Keys in the list: all of its blocks, less what the last one lacks if it is listed.
    last = tl.load(index + tl.maximum(count - 1, 0))
    listed = count * KEY_BLOCK - tl.where(
        count > 0, tl.maximum((last + 1) * KEY_BLOCK - keys, 0), 0
    )
    whole = listed // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        if DESCRIBED:
            at = _key(index, start, KEY_BLOCK)
            k = K.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
            logits = tl.dot(q, k.T, input_precision=PRECISION)
            v = V.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
        elif KEY_BLOCK % BLOCK_N == 0:
            at = _key(index, start, KEY_BLOCK)
            k_at = K + b64 * k_b + g64 * k_h + at.to(tl.int64) * k_s
            v_at = V + b64 * v_b + g64 * v_h + at.to(tl.int64) * v_s
            k = _rows_of(k_at, columns, k_s, d, columns, HEAD_DIM, WHOLE)
            logits = tl.dot(q, k.T, input_precision=PRECISION)
            v = _rows_of(v_at, columns, v_s, d, columns, HEAD_DIM, WHOLE)
        else:
            at = _key(index, start + columns, KEY_BLOCK)
            k = _rows_of(K + b64 * k_b + g64 * k_h, at, k_s, d, at, HEAD_DIM, WHOLE)
            logits = tl.dot(q, k.T, input_precision=PRECISION)
            v = _rows_of(V + b64 * v_b + g64 * v_h, at, v_s, d, at, HEAD_DIM, WHOLE)
        acc, m, total = _update(acc, m, total, logits, v, scale2, PRECISION)
    if whole < listed:
        place = whole + columns
        there = place < listed
        if DESCRIBED:
            at = _key(index, whole, KEY_BLOCK)
            k = K.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
            v = V.load([b, g, at, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            at = _key(index, tl.where(there, place, 0), KEY_BLOCK)
            k = _rows_of(K + b64 * k_b + g64 * k_h, at, k_s, d, there, HEAD_DIM, MASKED)
            v = _rows_of(V + b64 * v_b + g64 * v_h, at, v_s, d, there, HEAD_DIM, MASKED)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        logits = tl.where(there[None, :], logits, -float("inf"))
        acc, m, total = _update(acc, m, total, logits, v, scale2, PRECISION)

    if POOLED:
        pk_at = PooledK + b64 * pk_b + g64 * pk_h
        pv_at = PooledV + b64 * pv_b + g64 * pv_h
        bias_at = Bias + b64 * bias_b + h64 * bias_h + i.to(tl.int64) * bias_q
        for start in range(0, pooled, BLOCK_N):
            p = start + columns
            there = p < pooled
            k = _rows_of(pk_at, p, pk_s, d, there, HEAD_DIM, MASKED)
            bias = tl.load(bias_at + p * bias_p, mask=there, other=-float("inf"))
            logits = tl.dot(q, k.T, input_precision=PRECISION) + (bias / scale)[None, :]
            v = _rows_of(pv_at, p, pv_s, d, there, HEAD_DIM, MASKED)
            acc, m, total = _update(acc, m, total, logits, v, scale2, PRECISION)

    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    out = acc / safe[:, None]
    o_at = Out + b64 * o_b + h64 * o_h + rows[:, None].to(tl.int64) * o_s + d[None, :]
    tl.store(o_at, out.to(Out.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])
    lse = tl.where(empty, -float("inf"), (m + tl.log2(safe)) * LN2)
    tl.store(Lse + (b * heads + h).to(tl.int64) * queries + rows, lse, mask=inside)


# By compute capability of the part, then padded head size; from compiling (registers, spills,
# shared memory), not from timing. (0, 0): any other part, ROCm's among them, and float32. Keys come
# through a list: with two stages Triton 3.9 waits for the list in every turn, with three it is
# fetched ahead, for some bytes of shared memory.
CONFIGS: dict[tuple[int, int], dict[int, Config]] = {
    (8, 0): {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    (8, 6): {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    (9, 0): {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 3)},
    (10, 0): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    (12, 0): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
    (0, 0): {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 4, 2)},
}
FILLED_120 = Config(64, 32, 8, 3)  # of heads filled up to 128 there: masks take registers, too
SAME_AS = {(8, 7): (8, 0), (8, 9): (8, 6), (12, 1): (12, 0), (10, 3): (10, 0)}


def config_for(capability: tuple[int, int], width: int, dtype: torch.dtype) -> Config:
    """The table's entry for a part, a head size and a type."""
    key = SAME_AS.get(capability, capability)
    if dtype == torch.float32 or key not in CONFIGS:
        key = (0, 0)
    if key == (12, 0) and 64 < width < 128:
        return FILLED_120
    return CONFIGS[key][max(64, padded(width))]


def constants(
    blocks: BlockMap, width: int, repeat: int, config: Config, dtype: torch.dtype, pooled: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    found = launch.constants(blocks, width, repeat, config, dtype, pooled)
    # a tile that one descriptor reads is of one block
    return {**found, "DESCRIBED": config.described and blocks.key_block % config.block_n == 0}


def _described(x: Tensor, meta: dict[str, Any]) -> Any:
    """x (b, g, s, d) as a kernel reads tiles of it; of rows beyond the last one, zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = [1, 1, meta["BLOCK_N"], meta["BLOCK_D"]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


def describable(x: Tensor) -> bool:
    """Whether descriptors take these strides: multiples of 16 bytes, as the address is."""
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3])


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None, config: Config | None = None,
) -> Attention:  # fmt: skip
    """The same as ``reference.attend``, without gradients. config: instead of the table's."""
    b, h, s, width = q.shape
    q, k, v = (last_stride_one(x) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    chosen = config or config_for(capability(q.device), width, q.dtype)
    if chosen.described and not (describable(k) and describable(v)):
        chosen = chosen._replace(described=False)
    counts = blocks.counts
    order = counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    lists = blocks.lists()
    more = pooled_arguments(q, k, pooled, blocks)
    meta = constants(blocks, width, h // k.shape[1], chosen, q.dtype, pooled is not None)
    nq = counts.shape[-1]
    grid = (nq * (blocks.query_block // meta["BLOCK_M"]), h, b)
    read = (_described(k, meta), _described(v, meta)) if meta["DESCRIBED"] else (k, v)
    kernel: Any = forward[grid]
    with on_device(q.device):
        kernel(
            q, *read, out, lse, lists, counts, order, *more[:3],
            *strides(q, k, v, out), *more[3:],
            h, s, blocks.keys, 0 if pooled is None else pooled.k.shape[2], nq, lists.shape[-1],
            1 / math.sqrt(width) if scale is None else scale,
            **meta, **OPTIONS, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return Attention(out, lse)
