"""Gradients of the CPU path against autograd of the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import cpu, cpu_backward, dispatch, reference
from sparse_attn.kernels.reference import Pooled


def gradients(attend, parts, blocks, bias):
    parts = [x.detach().requires_grad_() for x in parts]
    q, k, v, *pooled = parts
    out = attend(q, k, v, blocks, Pooled(*pooled, bias) if pooled else None).out
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64)
    (out.double() * weight.view(out.shape)).sum().backward()
    return [x.grad for x in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_pooled", [False, True])
@pytest.mark.parametrize("sizes", [(150, 170), (64, 64)])
def test_gradients(attention, dtype, with_pooled, sizes):
    """Grouped heads, ragged ends, full and empty rows."""
    q, k, v, blocks = attention.problem(*sizes, dtype=dtype)
    pooled = attention.pooled_of(k, v, blocks)
    parts = [q, k, v, *(pooled[:2] if with_pooled else ())]
    exact = gradients(reference.attend, [x.double() for x in parts], blocks, pooled.bias)
    eager = gradients(reference.attend, parts, blocks, pooled.bias)
    found = gradients(cpu_backward.attend, parts, blocks, pooled.bias)
    for one, other, right in zip(found, eager, exact, strict=True):
        assert one.dtype == dtype
        scale = right.abs().max().item()
        error = (one.double() - right).abs().max().item()
        allowed = 2 * (other.double() - right).abs().max().item()
        if dtype == torch.float32:
            # products of 16 and sums of 170 terms or less, in another order than the reference's
            assert error <= allowed + 16 * torch.finfo(dtype).eps * scale
        else:
            # softmax weights, their gradients and biases are rounded to the type once each, where
            # the reference is in float32 to the end
            assert error <= allowed + 4 * torch.finfo(dtype).eps * scale


def test_rows_that_see_nothing_have_no_gradient(attention):
    q, k, v, blocks = attention.problem()
    pooled = attention.pooled_of(k, v, blocks)
    keep = blocks.keep.clone()
    keep[0, 1] = False
    pooled.bias[0, 1, :2] = -math.inf
    blocks = BlockMap(keep, 32, 16, 150, 170)
    parts = [q, k, v, *pooled[:2]]
    exact = gradients(reference.attend, [x.double() for x in parts], blocks, pooled.bias)
    found = gradients(cpu_backward.attend, parts, blocks, pooled.bias)
    assert not found[0][0, 1, :64].any()
    for one, right in zip(found, exact, strict=True):
        assert torch.isfinite(one).all()
        assert (one.double() - right).abs().max() <= 1e-5 * right.abs().max()


def test_large_scores_at_a_ragged_end(attention):
    """What fills up the last block of queries takes no part, however large its scores would be."""
    q, k, v, blocks = attention.problem()
    q = 100 * q
    exact = gradients(reference.attend, [x.double() for x in (q, k, v)], blocks, None)
    found = gradients(cpu_backward.attend, (q, k, v), blocks, None)
    for one, right in zip(found, exact, strict=True):
        assert (one.double() - right).abs().max() <= 1e-4 * right.abs().max()


def test_gradients_repeat_to_the_bit(attention):
    q, k, v, blocks = attention.problem()
    one, two = (gradients(cpu_backward.attend, (q, k, v), blocks, None) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_keys_that_are_not_kept_get_none(attention):
    q, k, v, blocks = attention.problem()
    keep = blocks.keep.clone()
    keep[:, :, :, 3] = False
    found = gradients(cpu_backward.attend, (q, k, v), BlockMap(keep, 32, 16, 150, 170), None)
    for grad in found[1:]:
        assert not grad[:, :, 48:64].any()
        assert grad[:, :, :48].any()


def test_the_forward_is_the_one_without_gradients(attention):
    q, k, v, blocks = attention.problem()
    plain = cpu.attend(q, k, v, blocks)
    found = dispatch.attend(q.requires_grad_(), k, v, blocks)
    assert torch.equal(found.out, plain.out)
    assert torch.equal(found.lse, plain.lse)
    assert found.out.requires_grad
    assert not found.lse.requires_grad
