"""The specification: attention to kept blocks, written as one masked softmax. Slow and clear.

Origin: the definition. Layout: q (b, h, s, d), k and v (b, g, s, d), any strides, h a multiple of
g. Pooled keys take part in the same softmax with a logit of their own bias more (ln n for a mean
of n tokens), which is algebraically the merge of two attentions by their log-sum-exps that
Video-BLADE does, with one rounding less. Differentiable; runs on any device and type, in float64
where it is given float64, else in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.block_map import BlockMap


class Pooled(NamedTuple):
    """Keys and values that stand for many tokens each, seen by all queries."""

    k: Tensor  # (b, g, p, d)
    v: Tensor  # (b, g, p, d)
    bias: Tensor  # float32, broadcasts to (b, h, nq, p); added to logits; -inf hides


class Attention(NamedTuple):
    out: Tensor  # (b, h, s, d)
    lse: Tensor  # (b, h, s), natural logarithm, float32 (float64 of float64)


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None,
) -> Attention:  # fmt: skip
    """Attention of every query to the keys of its kept blocks, and to the pooled ones.

    Rows that keep nothing give 0 and a log-sum-exp of -inf.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def heads(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(repeat, dim=1)

    logits = q.to(wide) @ heads(k).transpose(-1, -2) * scale
    logits = logits.masked_fill(~blocks.tokens(), -math.inf)
    values = heads(v)
    if pooled is not None:
        more = q.to(wide) @ heads(pooled.k).transpose(-1, -2) * scale
        b, h, nq, _ = blocks.keep.shape
        bias = pooled.bias.to(wide).expand(b, h, nq, more.shape[-1])
        bias = bias.repeat_interleave(blocks.query_block, dim=2)
        logits = torch.cat([logits, more + bias[:, :, : q.shape[2]]], dim=-1)
        values = torch.cat([values, heads(pooled.v)], dim=2)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)  # not nan, of which the gradients would be nan, too
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(empty, 0)
    return Attention((weights @ values).to(q.dtype), lse.masked_fill(empty[..., 0], -math.inf))
