"""Gradients of attention to kept blocks on a CPU, for training with what is kept.

Origin: as ``cpu``: the kept keys are gathered, here for torch's own backward pass. Every part of
the forward pass had all keys of its queries, so its log-sum-exps are those of the whole and the
gradients of a key are the sum over the parts that saw it, in float32 and in one order: training
repeats to the bit. Pooled keys are blocks of every list, so theirs come along. What the blocks are
selected by gets no gradient, nor do biases and the log-sum-exp. Layouts and types: as ``cpu``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import cpu
from sparse_attn.kernels.reference import Attention, Pooled


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None,
) -> Attention:  # fmt: skip
    """``cpu.attend`` with gradients to q, k, v and the pooled keys and values."""
    more: tuple[Any, ...] = (None, None, None) if pooled is None else tuple(pooled)
    return Attention(*_Attend.apply(q, k, v, *more, blocks, scale))  # type: ignore[misc]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pk, pv, bias, blocks, scale):
        pooled = None if pk is None else Pooled(pk, pv, bias)
        out, lse = cpu.attend(q, k, v, blocks, pooled, scale=scale)
        ctx.save_for_backward(q, k, v, pk, pv, bias, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        q, k, v, pk, pv, bias, out, lse = ctx.saved_tensors
        pooled = None if pk is None else Pooled(pk, pv, bias)
        sources = cpu.Sources(k, v, ctx.blocks, q.shape[1], pooled)
        dq, dk, dv = _gradients(grads[0], q, out, lse, sources, ctx.blocks, ctx.scale)
        (dk, dpk), (dv, dpv) = (
            sources.apart(x, like, more) for x, like, more in ((dk, k, pk), (dv, v, pv))
        )
        return dq, dk, dv, dpk, dpv, None, None, None


def _gradients(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, sources: cpu.Sources, blocks: BlockMap,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q (b, h, s, d), and of the keys and values of `sources`, in its shape and float32."""
    b, h, s, d = q.shape
    size = blocks.query_block
    grads, outs = (cpu.by_block(x, size) for x in (grad.to(q.dtype), out))
    sums = cpu.by_block(lse[..., None], size, math.inf)[..., 0]  # what fills up has no weight
    dq = torch.zeros_like(grads)
    dk, dv = (torch.zeros(sources.shape, dtype=sums.dtype) for _ in "kv")
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for part in cpu.parts(q, sources, blocks):
        shape = part.q.shape
        of = (grads[part.rows].view(shape), part.q, part.k, part.v, outs[part.rows].view(shape))
        found = backward(
            *of, sums[part.rows].view(shape[:3]), 0.0, False, attn_mask=part.mask, scale=scale
        )
        dq[part.rows] = found[0].view(-1, size, d)
        places = sources.places(part.heads, part.lists)
        for total, one in zip((dk, dv), found[1:], strict=True):
            total.index_add_(0, places, sources.filled(one).to(total.dtype))
    return dq.view(b, h, -1, d)[:, :, :s], dk, dv
