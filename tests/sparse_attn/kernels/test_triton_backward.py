"""Gradients of the Triton kernels against autograd of the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import reference, triton_backward
from sparse_attn.kernels.launch import Config
from sparse_attn.kernels.reference import Pooled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter


def gradients(attend, parts, blocks, bias):
    parts = [x.detach().requires_grad_() for x in parts]
    q, k, v, *pooled = parts
    out = attend(q, k, v, blocks, Pooled(*pooled, bias) if pooled else None).out
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    (out.double() * weight.view(out.shape)).sum().backward()
    return [x.grad for x in parts]


@pytest.mark.parametrize("with_pooled", [False, True])
def test_gradients(attention, with_pooled):
    q, k, v, blocks = attention.problem(n=60, m=70, d=16, h=2, g=1, blocks=(32, 32))
    pooled = attention.pooled_of(k, v, blocks)
    parts = [x.to(DEVICE) for x in (q, k, v, *(pooled[:2] if with_pooled else ()))]
    blocks = BlockMap(blocks.keep.to(DEVICE), 32, 32, 60, 70)
    bias = pooled.bias.to(DEVICE)

    def kernel(*args):
        return triton_backward.attend(*args, config=Config(32, 32, 4, 1))

    exact = gradients(reference.attend, [x.double() for x in parts], blocks, bias)
    for found, right in zip(gradients(kernel, parts, blocks, bias), exact, strict=True):
        # float32 products of 16 and sums of 60 to 130 terms, at magnitudes of up to 10
        scale = max(1.0, right.abs().max().item())
        assert (found.double() - right).abs().max().item() <= 2e-5 * scale


def test_gradients_repeat_to_the_bit(attention):
    q, k, v, blocks = attention.problem(n=40, m=40, d=16, h=2, g=2, blocks=(32, 32))
    blocks = BlockMap(blocks.keep.to(DEVICE), 32, 32, 40, 40)
    parts = [x.to(DEVICE) for x in (q, k, v)]
    one, two = (gradients(triton_backward.attend, parts, blocks, None) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
