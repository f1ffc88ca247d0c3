"""Gradients of attention to kept blocks: two Triton kernels, for training with what is kept.

Origin: FlashAttention-2's backward pass (arXiv 2307.08691) over lists. dQ walks the forward's
lists; dK and dV walk the transposed ones, made by a sort, so sums have one order and training
repeats to the bit: no atomics. Pooled keys share the one softmax: dQ sees them in a second loop,
and their own gradients come from the same kernel with every query listed and their bias. What the
lists are selected by gets no gradient, nor does the log-sum-exp. Layouts, types and limits: as
``triton_forward``. Run in the interpreter and compiled; not yet timed on a GPU.
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
from sparse_attn.kernels import launch, triton_forward
from sparse_attn.kernels.launch import (
    OPTIONS,
    Config,
    capability,
    last_stride_one,
    pooled_arguments,
    strides,
)
from sparse_attn.kernels.reference import Attention, Pooled

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _weights(logits, lse):
    """Softmax weights from logits in base 2 and natural log-sum-exps; 0 in rows that kept none."""
    safe = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    return tl.exp2(logits - safe)


@triton.jit
def backward_q(
    Q, K, V, Grad, Dq, Lse, Delta, Index, Count, PooledK, PooledV, Bias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    pk_b, pk_h, pk_s, pv_b, pv_h, pv_s, bias_b, bias_h, bias_q, bias_p,
    heads, queries, keys, pooled, nq, width, scale,
    REPEAT: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, h, b)."""
    first = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2)
    line = (b * heads + h).to(tl.int64)
    i = first // QUERY_BLOCK
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    real = d < HEAD_DIM
    inside = rows < queries
    b64 = b.to(tl.int64)
    g64 = (h // REPEAT).to(tl.int64)
    h64 = h.to(tl.int64)
    rows64 = rows[:, None].to(tl.int64)
    mask = inside[:, None] & real[None, :]
    q = tl.load(Q + b64 * q_b + h64 * q_h + rows64 * q_s + d[None, :], mask=mask, other=0.0)
    grad = tl.load(
        Grad + b64 * do_b + h64 * do_h + rows64 * do_s + d[None, :], mask=mask, other=0.0
    )
    lse = tl.load(Lse + line * queries + rows, mask=inside, other=-float("inf"))
    delta = tl.load(Delta + line * queries + rows, mask=inside, other=0.0)
    k_at = K + b64 * k_b + g64 * k_h
    v_at = V + b64 * v_b + g64 * v_h
    index = Index + (line * nq + i) * width
    count = tl.load(Count + line * nq + i)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, count * KEY_BLOCK, BLOCK_N):
        place = start + columns
        listed = place < count * KEY_BLOCK
        block = tl.load(index + tl.where(listed, place // KEY_BLOCK, 0))
        keys_at = block * KEY_BLOCK + place % KEY_BLOCK
        there = listed & (keys_at < keys)
        keys64 = keys_at.to(tl.int64)
        both = there[:, None] & real[None, :]
        k = tl.load(k_at + keys64[:, None] * k_s + d[None, :], mask=both, other=0.0)
        v = tl.load(v_at + keys64[:, None] * v_s + d[None, :], mask=both, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(there[None, :], _weights(logits, lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if POOLED:
        k_at = PooledK + b64 * pk_b + g64 * pk_h
        v_at = PooledV + b64 * pv_b + g64 * pv_h
        bias_at = Bias + b64 * bias_b + h64 * bias_h + i.to(tl.int64) * bias_q
        for start in range(0, pooled, BLOCK_N):
            place = start + columns
            there = place < pooled
            both = there[:, None] & real[None, :]
            k = tl.load(k_at + place[:, None] * pk_s + d[None, :], mask=both, other=0.0)
            v = tl.load(v_at + place[:, None] * pv_s + d[None, :], mask=both, other=0.0)
            bias = tl.load(bias_at + place * bias_p, mask=there, other=-float("inf"))
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            p = _weights(logits + (bias * LOG2E)[None, :], lse[:, None])
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    at = Dq + b64 * dq_b + h64 * dq_h + rows64 * dq_s + d[None, :]
    tl.store(at, (dq * scale).to(Dq.dtype.element_ty), mask=mask)


@triton.jit
def backward_kv(
    Q, K, V, Grad, Dk, Dv, Lse, Delta, Index, Count, Bias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, bias_b, bias_h, bias_q, bias_p,
    heads, queries, keys, nk, width, scale,
    REPEAT: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, g, b). Lists are the transposed ones: queries that see a key block."""
    first = tl.program_id(0) * BLOCK_N
    g = tl.program_id(1)
    b = tl.program_id(2)
    j = first // KEY_BLOCK
    rows = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_M)
    real = d < HEAD_DIM
    inside = rows < keys
    b64 = b.to(tl.int64)
    g64 = g.to(tl.int64)
    rows64 = rows[:, None].to(tl.int64)
    mask = inside[:, None] & real[None, :]
    k = tl.load(K + b64 * k_b + g64 * k_h + rows64 * k_s + d[None, :], mask=mask, other=0.0)
    v = tl.load(V + b64 * v_b + g64 * v_h + rows64 * v_s + d[None, :], mask=mask, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for r in range(REPEAT):
        h = g * REPEAT + r
        h64 = h.to(tl.int64)
        line = (b * heads + h).to(tl.int64)
        index = Index + (line * nk + j) * width
        count = tl.load(Count + line * nk + j)
        q_at = Q + b64 * q_b + h64 * q_h
        do_at = Grad + b64 * do_b + h64 * do_h
        for start in range(0, count * QUERY_BLOCK, BLOCK_M):
            place = start + columns
            listed = place < count * QUERY_BLOCK
            block = tl.load(index + tl.where(listed, place // QUERY_BLOCK, 0))
            at = block * QUERY_BLOCK + place % QUERY_BLOCK
            there = listed & (at < queries)
            at64 = at.to(tl.int64)
            both = there[:, None] & real[None, :]
            q = tl.load(q_at + at64[:, None] * q_s + d[None, :], mask=both, other=0.0)
            grad = tl.load(do_at + at64[:, None] * do_s + d[None, :], mask=both, other=0.0)
            lse = tl.load(Lse + line * queries + at, mask=there, other=-float("inf"))
            delta = tl.load(Delta + line * queries + at, mask=there, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            if POOLED:
                bias_at = Bias + b64 * bias_b + h64 * bias_h + block.to(tl.int64)[None, :] * bias_q
                bias = tl.load(
                    bias_at + rows[:, None] * bias_p,
                    mask=inside[:, None] & there[None, :], other=-float("inf"),
                )  # fmt: skip
                logits = logits + bias * LOG2E
            p = _weights(logits, lse[None, :])  # (keys, queries)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    k_out = Dk + b64 * dk_b + g64 * dk_h + rows64 * dk_s + d[None, :]
    v_out = Dv + b64 * dv_b + g64 * dv_h + rows64 * dv_s + d[None, :]
    tl.store(k_out, (dk * scale).to(Dk.dtype.element_ty), mask=mask)
    tl.store(v_out, dv.to(Dv.dtype.element_ty), mask=mask)


def config_for(capability: tuple[int, int], width: int, dtype: torch.dtype) -> Config:
    """Two accumulators and five operands: tiles of 64 x 64, smaller where they do not fit. Loads
    are ahead of their use (three stages, see `triton_forward.CONFIGS`) where nothing spills then.
    """
    if dtype == torch.float32 or width > 128 or capability == (0, 0):
        return Config(32, 32, 4, 1)
    part = triton_forward.SAME_AS.get(capability, capability)
    if part == (9, 0) and 64 < width < 128:  # filled up to 128: masks take registers, too
        return Config(64, 32, 8, 1)
    ahead = part in ((8, 0), (10, 0)) or (part == (9, 0) and width <= 64)
    return Config(64, 64, 8, 3 if ahead else 1)


def constants(
    blocks: BlockMap, width: int, repeat: int, config: Config, dtype: torch.dtype, pooled: bool
) -> dict[str, Any]:
    """What the kernels are compiled for; tiles lie within blocks on both sides."""
    found = launch.constants(blocks, width, repeat, config, dtype, pooled)
    return {**found, "BLOCK_N": min(config.block_n, blocks.key_block)}


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pk, pv, bias, blocks, scale, config):
        pooled = None if pk is None else Pooled(pk, pv, bias)
        out, lse = triton_forward.attend(q, k, v, blocks, pooled, scale=scale, config=config)
        ctx.save_for_backward(q, k, v, pk, pv, bias, out, lse)
        ctx.blocks, ctx.scale, ctx.config = blocks, scale, config
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0]
        q, k, v, pk, pv, bias, out, lse = ctx.saved_tensors
        pooled = None if pk is None else Pooled(pk, pv, bias)
        run = _Backward(q, k, v, out, lse, grad, ctx.blocks, pooled, ctx.scale, ctx.config)
        dq = run.queries()
        dk, dv = run.keys(k, v, ctx.blocks.transposed(), None)
        if pk is None:
            return dq, dk, dv, None, None, None, None, None, None
        dpk, dpv = run.keys(pk, pv, *run.everything())
        return dq, dk, dv, dpk, dpv, None, None, None, None


class _Backward:
    """Launches of one backward pass."""

    def __init__(self, q, k, v, out, lse, grad, blocks, pooled, scale, config) -> None:
        self.q, self.k, self.v = (last_stride_one(x) for x in (q, k, v))
        self.grad = last_stride_one(grad)
        self.lse = lse.contiguous()
        self.delta = (grad.float() * out.float()).sum(-1).contiguous()
        self.blocks, self.pooled = blocks, pooled
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.config = config or config_for(capability(q.device), q.shape[-1], q.dtype)

    def queries(self) -> Tensor:
        b, h, s, width = self.q.shape
        dq = torch.empty_like(self.q)
        meta = constants(
            self.blocks, width, h // self.k.shape[1], self.config, self.q.dtype,
            self.pooled is not None,
        )  # fmt: skip
        lists, counts = self.blocks.lists(), self.blocks.counts
        more = pooled_arguments(self.q, self.k, self.pooled, self.blocks)
        kernel: Any = backward_q[(-(-s // meta["BLOCK_M"]), h, b)]
        with on_device(self.q.device):
            kernel(
                self.q, self.k, self.v, self.grad, dq, self.lse, self.delta, lists, counts,
                *more[:3], *strides(self.q, self.k, self.v, self.grad, dq), *more[3:],
                h, s, self.blocks.keys, 0 if self.pooled is None else self.pooled.k.shape[2],
                counts.shape[-1], lists.shape[-1], self.scale, **meta, **OPTIONS,
                num_warps=self.config.num_warps, num_stages=self.config.num_stages,
            )  # fmt: skip
        return dq

    def keys(
        self, k: Tensor, v: Tensor, seen_by: BlockMap, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of keys whose blocks are seen by listed blocks of queries, with their bias if any."""
        b, h, s, width = self.q.shape
        k, v = (last_stride_one(x) for x in (k, v))
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        here = BlockMap(
            seen_by.keep.transpose(-1, -2), seen_by.key_block, seen_by.query_block,
            seen_by.keys, seen_by.queries,
        )  # fmt: skip
        meta = constants(here, width, h // k.shape[1], self.config, k.dtype, bias is not None)
        lists, counts = seen_by.lists(), seen_by.counts
        table = self.q if bias is None else bias
        kernel: Any = backward_kv[(-(-k.shape[2] // meta["BLOCK_N"]), k.shape[1], b)]
        with on_device(self.q.device):
            kernel(
                self.q, k, v, self.grad, dk, dv, self.lse, self.delta, lists, counts, table,
                *strides(self.q, k, v, self.grad, dk, dv),
                *((0,) * 4 if bias is None else bias.stride()),
                h, s, k.shape[2], counts.shape[-1], lists.shape[-1], self.scale, **meta, **OPTIONS,
                num_warps=self.config.num_warps, num_stages=self.config.num_stages,
            )  # fmt: skip
        return dk, dv

    def everything(self) -> tuple[BlockMap, Tensor]:
        """For pooled keys: every query sees all of them, with a bias by its block."""
        assert self.pooled is not None
        b, h, nq, _ = self.blocks.keep.shape
        count = self.pooled.k.shape[2]
        size = max(16, self.config.block_n)
        keep = torch.ones(b, h, -(-count // size), nq, dtype=torch.bool, device=self.q.device)
        seen_by = BlockMap(keep, size, self.blocks.query_block, count, self.blocks.queries)
        return seen_by, self.pooled.bias.float().expand(b, h, nq, count)


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None, config: Config | None = None,
) -> Attention:  # fmt: skip
    """The same as ``triton_forward.attend``, with gradients of q, k, v and pooled k and v."""
    more = (None, None, None) if pooled is None else tuple(pooled)
    return Attention(*_Attend.apply(q, k, v, *more, blocks, scale, config))
