"""The CPU path against the reference, and the reference against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import cpu, reference


def brute(q, k, v, blocks, pooled=None):
    """Query by query, in float64, from the definition."""
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g = h // (q.shape[1] // k.shape[1])
        row = blocks.keep[b, h, i // blocks.query_block]
        js = [j for j in range(k.shape[2]) if row[j // blocks.key_block]]
        logits = (k[b, g, js] @ q[b, h, i]) / math.sqrt(q.shape[-1])
        values = v[b, g, js]
        if pooled is not None:
            bias = pooled.bias[b, h, i // blocks.query_block].double()
            more = pooled.k[b, g].double() @ q[b, h, i] / math.sqrt(q.shape[-1]) + bias
            logits = torch.cat([logits, more])
            values = torch.cat([values, pooled.v[b, g].double()])
        if len(logits) and logits.max() > -math.inf:
            lse[b, h, i] = logits.logsumexp(0)
            out[b, h, i] = logits.softmax(0) @ values
    return out, lse


@pytest.mark.parametrize("with_pooled", [False, True])
def test_the_reference_is_the_definition(attention, with_pooled):
    q, k, v, blocks = attention.problem(n=50, m=60, h=4)
    pooled = attention.pooled_of(k, v, blocks) if with_pooled else None
    out, lse = brute(q, k, v, blocks, pooled)
    found = attention.exact(q, k, v, blocks, pooled)
    # float32 pooled means enter both alike; sums of 60 terms in float64
    assert torch.allclose(found.out, out, atol=1e-12)
    assert torch.allclose(found.lse, lse, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_pooled", [False, True])
@pytest.mark.parametrize("sizes", [(150, 170), (64, 64), (33, 16)])
def test_error_to_float64_is_within_the_budget(attention, dtype, with_pooled, sizes):
    q, k, v, blocks = attention.problem(*sizes, dtype=dtype)
    pooled = attention.pooled_of(k, v, blocks) if with_pooled else None
    exact = attention.exact(q, k, v, blocks, pooled)
    found = cpu.attend(q, k, v, blocks, pooled)
    assert found.out.dtype == dtype
    error = (found.out.double() - exact.out).abs().max().item()
    assert error <= attention.budget(q, k, v, blocks, pooled)
    empty = exact.lse == -math.inf
    assert torch.equal(found.lse == -math.inf, empty)
    error = (found.lse.double() - exact.lse)[~empty].abs().max().item()
    # float32: sums of 170 terms. For narrow types torch has a faster exponential; biases of
    # pooled keys, ln 10, are rounded to the type once.
    allowed = 1e-5 if dtype == torch.float32 else 1e-4
    if with_pooled and dtype != torch.float32:
        allowed += 2 * torch.finfo(dtype).eps
    assert error <= allowed


def test_everything_kept_is_dense_attention(attention):
    q, k, v, blocks = attention.problem()
    blocks = BlockMap(torch.ones_like(blocks.keep), 32, 16, 150, 170)
    dense = attention.dense(q, k, v, enable_gqa=True)
    found = cpu.attend(q, k, v, blocks)
    assert (found.out - dense).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_what_is_not_kept_is_not_read(attention):
    """Keys of dropped blocks may be anything, even nan."""
    q, k, v, blocks = attention.problem()
    keep = blocks.keep.clone()
    keep[:, :, :, 3] = False
    blocks = BlockMap(keep, 32, 16, 150, 170)
    clean = cpu.attend(q, k, v, blocks)
    for x in (k, v):
        x[:, :, 48:64] = math.nan
    assert torch.equal(cpu.attend(q, k, v, blocks).out, clean.out)


def test_repeatable_and_inputs_are_left_alone(attention):
    q, k, v, blocks = attention.problem()
    before = [x.clone() for x in (q, k, v)]
    one, two = cpu.attend(q, k, v, blocks), cpu.attend(q, k, v, blocks)
    assert torch.equal(one.out, two.out)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def laid_out(x, how):
    """The same numbers (b, h, s, d) in another layout."""
    d = x.shape[-1]
    if how == "by token":  # as pipelines have them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "fused":  # beside two others, in one projection
        three = torch.stack([x, x + 1, x + 2]).permute(1, 3, 0, 2, 4).contiguous()
        return three[:, :, 0].transpose(1, 2)
    if how == "no rows":  # tokens begin at odd places
        return torch.nn.functional.pad(x, (0, 1))[..., :d]
    assert how == "narrow"  # numbers of a token are apart
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("how", ["by token", "fused", "no rows", "narrow"])
@pytest.mark.parametrize("with_pooled", [False, True])
def test_layouts_are_one(attention, how, with_pooled):
    """Ragged ends, grouped heads, full rows, rows that see nothing."""
    q, k, v, blocks = attention.problem()
    keep = blocks.keep.clone()
    keep[0, 0] = True
    blocks = BlockMap(keep, 32, 16, 150, 170)
    pooled = attention.pooled_of(k, v, blocks) if with_pooled else None
    one = cpu.attend(*(x.contiguous() for x in (q, k, v)), blocks, pooled)
    two = cpu.attend(*(laid_out(x, how) for x in (q, k, v)), blocks, pooled)
    # whole rows read keys where they lie: the same sums, in the order of another layout
    assert torch.allclose(one.out, two.out, rtol=0, atol=4 * torch.finfo(q.dtype).eps)
    assert torch.allclose(one.lse, two.lse, rtol=1e-6)


def test_heads_that_are_one_tensor(attention):
    """Expanded over heads and batch, stride 0."""
    q, k, v, blocks = attention.problem()
    alike = [x[:1, :1].expand(x.shape) for x in (q, k, v)]
    one = cpu.attend(*alike, blocks)
    two = cpu.attend(*(x.contiguous() for x in alike), blocks)
    assert torch.allclose(one.out, two.out, rtol=0, atol=4 * torch.finfo(q.dtype).eps)


def test_the_output_lies_token_by_token(attention):
    """As torch's own attention leaves it: heads are joined without a copy."""
    q, k, v, blocks = attention.problem(64, 64)
    out = cpu.attend(q, k, v, blocks).out
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_pooled_keys_that_are_all_hidden(attention):
    q, k, v, blocks = attention.problem()
    pooled = attention.pooled_of(k, v, blocks)
    pooled.bias[:, 0] = -math.inf
    exact, found = attention.exact(q, k, v, blocks, pooled), cpu.attend(q, k, v, blocks, pooled)
    error = (found.out.double() - exact.out).abs().max().item()
    assert error <= attention.budget(q, k, v, blocks, pooled)
    hidden = pooled._replace(bias=torch.full_like(pooled.bias, -math.inf))
    assert torch.equal(cpu.attend(q, k, v, blocks, hidden).out, cpu.attend(q, k, v, blocks).out)


def test_gradients_of_the_reference(attention):
    q, k, v, blocks = attention.problem(n=20, m=24, d=4, blocks=(8, 8))
    pooled = attention.pooled_of(k, v, blocks, size=6)
    bias = pooled.bias
    parts = [x.double().detach().requires_grad_() for x in (q, k, v, pooled.k, pooled.v)]

    def out(q, k, v, pk, pv):
        return reference.attend(q, k, v, blocks, reference.Pooled(pk, pv, bias)).out

    assert torch.autograd.gradcheck(out, parts)
