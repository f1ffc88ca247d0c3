"""Problems that all kernels are tested with, and the error they may make."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import reference
from sparse_attn.kernels.reference import Pooled


def problem(
    n=150, m=170, d=16, h=4, g=2, blocks=(32, 16), share=0.4, dtype=torch.float32, seed=0
):  # fmt: skip
    """Ragged, with grouped heads, two batch rows, rows of blocks that are full and empty."""
    r = torch.Generator().manual_seed(seed)
    # (b, s, h, d) seen as (b, h, s, d): strides of a pipeline
    q = torch.randn(2, n, h, d, generator=r).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, m, g, d, generator=r).to(dtype).transpose(1, 2) for _ in "kv")
    keep = torch.rand(2, h, -(-n // blocks[0]), -(-m // blocks[1]), generator=r) < share
    keep[0, 0, 0], keep[1, 1, -1], keep[:, -1] = True, False, True
    return q, k, v, BlockMap(keep, *blocks, n, m)


def pooled_of(k, v, blocks, size=10, seed=1):
    r = torch.Generator().manual_seed(seed)
    p = k.shape[2] // size
    pooled = [x[:, :, : p * size].unflatten(2, (p, size)).mean(3) for x in (k, v)]
    hidden = torch.rand(*blocks.keep.shape[:3], p, generator=r) < 0.3
    return Pooled(*pooled, torch.where(hidden, -math.inf, math.log(size)))


def exact(q, k, v, blocks, pooled=None):
    if pooled is not None:
        pooled = Pooled(pooled.k.double(), pooled.v.double(), pooled.bias)
    return reference.attend(q.double(), k.double(), v.double(), blocks, pooled)


def eager(q, k, v, blocks, pooled=None):
    """The framework's own attention in the type of q, with the map as a mask."""
    repeat = q.shape[1] // k.shape[1]
    mask = torch.zeros(blocks.tokens().shape).masked_fill(~blocks.tokens(), -math.inf)
    if pooled is not None:
        bias = pooled.bias.repeat_interleave(blocks.query_block, dim=2)[:, :, : q.shape[2]]
        mask = torch.cat([mask, bias], dim=-1)
        k, v = torch.cat([k, pooled.k], dim=2), torch.cat([v, pooled.v], dim=2)
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (logits + mask.to(q.dtype)).softmax(-1).nan_to_num()
    return weights @ v


def budget(q, k, v, blocks, pooled=None):
    """Twice the error of `eager`, and one rounding of the largest output."""
    right = exact(q, k, v, blocks, pooled).out
    error = (eager(q, k, v, blocks, pooled).double() - right).abs().max().item()
    return 2 * error + torch.finfo(q.dtype).eps * right.abs().max().item()


@pytest.fixture
def attention():
    return SimpleNamespace(
        problem=problem, pooled_of=pooled_of, exact=exact, budget=budget, eager=eager,
        dense=scaled_dot_product_attention,
    )  # fmt: skip
