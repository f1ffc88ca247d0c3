"""HeadClasses: each head gets the pattern that errs less."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accel.testing import checks, conform
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.geometry import block_scores, in_first_frame
from sparse_attn.head_classes import HeadClasses, spatial_score, squared_errors, temporal_score
from sparse_attn.kernels import reference
from sparse_attn.token_order import gilbert, places

TINY = HeadClasses(dense=(0.0, 0.0), blocks=(16, 16), guard=False, density=0.5, queries=8)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "flux"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


def test_errors_are_those_of_the_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=g) for _ in "qkv")
    keep = torch.rand(1, 1, 3, 3, generator=g) < 0.6
    keep[..., 0] = True
    rows = torch.arange(40)
    (found,) = squared_errors(q, k, v, rows, [keep], (16, 16))
    sparse = reference.attend(q, k, v, BlockMap(keep.expand(1, 2, 3, 3), 16, 16, 40, 40)).out
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(found, (sparse - dense).square().mean((-1, -2)), atol=1e-6)


def test_a_head_of_each_kind_is_told():
    """Keys that name their frame, and keys that name their place: attention follows them."""
    grid, sizes = (8, 8, 8), (32, 32)
    at = places(grid, gilbert(grid))
    frame, place = at[:, 0], at[:, 1] * 8 + at[:, 2]
    by_frame = torch.nn.functional.one_hot(frame, 64).float() * 12
    by_place = torch.nn.functional.one_hot(place, 64).float() * 12
    q = torch.stack([by_frame, by_place])[None]
    v = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(0))
    keeps = [
        keep_share(block_scores(s, grid, "gilbert", (0, 0), sizes)[None, None], 0.4)
        for s in (spatial_score, temporal_score)
    ]
    errors = squared_errors(q, q, v, torch.arange(0, 512, 8), keeps, sizes)
    assert errors.argmin(0).tolist() == [[0, 1]]


def test_heads_in_space_see_the_first_frame():
    """Queries and keys that name their frame: every head attends in space."""
    grid, sizes = (24, 8, 8), (32, 32)
    order = gilbert(grid)
    at = places(grid, order)
    q = torch.nn.functional.one_hot(at[:, 0], 64).float()[None, None] * 12
    v = torch.randn(1, 1, len(at), 64, generator=torch.Generator().manual_seed(0))
    place = SimpleNamespace(order=order, grid=grid, blocks=sizes)
    policy = HeadClasses(blocks=sizes, density=0.5)
    keep = policy.keep(q, q, place, SimpleNamespace(values=v))[0, 0]
    first = in_first_frame(grid, "gilbert", 32)
    assert first.float().mean() < 0.25
    assert keep[:, first].all()


def test_bad_settings():
    with pytest.raises(ValueError, match="queries"):
        HeadClasses(queries=0)
