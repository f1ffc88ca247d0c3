"""Maps, lists and the rules that make them, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.block_map import (
    BlockMap,
    block_means,
    blocked,
    keep_share,
)


def random_map(seed, n=50, m=70):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 3, -(-n // 16), -(-m // 32), generator=g) < 0.5
    return BlockMap(keep, 16, 32, n, m)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(1, 90), m=st.integers(1, 90))
def test_density_and_lists_count_what_is_kept(seed, n, m):
    blocks = random_map(seed, n, m)
    tokens = blocks.tokens()
    assert tokens.shape == (2, 3, n, m)
    assert torch.allclose(blocks.density(), tokens.float().mean((-1, -2)), atol=1e-6)
    lists, counts = blocks.lists(), blocks.counts
    for b, h, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        listed = lists[b, h, i, : counts[b, h, i]].tolist()
        assert listed == blocks.keep[b, h, i].nonzero()[:, 0].tolist()  # ascending


def test_transposed_twice_is_the_map():
    blocks = random_map(0)
    assert torch.equal(blocks.transposed().tokens().transpose(-1, -2), blocks.tokens())


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="want bool"):
        BlockMap(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 50, 32)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0.01, 1))
def test_shares(seed, share):
    scores = torch.rand(2, 3, 5, 20, generator=torch.Generator().manual_seed(seed))
    rows = keep_share(scores, share, "row").sum(-1)
    assert (rows == max(1, round(share * 20))).all() or share >= 1
    for scope, axes in (("head", (-1, -2)), ("layer", (-1, -2, -3))):
        keep = keep_share(scores, share, scope)
        assert keep.any(-1).all()  # every row has one
        asked = max(1, round(share * keep[0].numel() / (1 if scope == "layer" else 3)))
        kept = keep.sum(axes)
        assert (kept >= asked).all() or share >= 1
        assert (kept <= asked + 5 * (3 if scope == "layer" else 1)).all()  # one more a row


def test_the_best_are_kept():
    scores = torch.tensor([[[[0.1, 0.6, 0.3], [0.5, 0.4, 0.1]]]])
    assert keep_share(scores, 1 / 3).tolist() == [[[[False, True, False], [True, False, False]]]]
    layer = keep_share(scores, 1 / 2, "layer")
    assert layer.tolist() == [[[[False, True, False], [True, True, False]]]]


def test_means_of_a_ragged_end_are_of_what_is_there():
    x = torch.arange(10.0).view(1, 1, 10, 1)
    assert block_means(x, 4).flatten().tolist() == [1.5, 5.5, 8.5]
    assert blocked(x, 4)[0, 0, 2].flatten().tolist() == [8, 9, 9, 9]
