"""The Gilbert order: a permutation, compact, and the one that the published algorithm gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.token_order import gilbert, places, raster

sides = st.integers(1, 14)


@settings(max_examples=60)
@given(grid=st.tuples(sides, sides, sides))
def test_every_token_once_and_back(grid):
    order = gilbert(grid)
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    assert torch.equal(order.forward.sort().values, tokens)
    assert torch.equal(order.forward[order.back], tokens)


@settings(max_examples=40)
@given(grid=st.tuples(*[st.integers(1, 6).map(lambda n: 2 * n)] * 3))
def test_even_sides_give_unit_steps(grid):
    steps = places(grid, gilbert(grid)).diff(dim=0).abs().sum(1)
    assert (steps == 1).all()


@pytest.mark.parametrize(
    ("grid", "jumps"), [((21, 30, 52), 76), ((13, 30, 45), 151), ((21, 45, 80), 360)]
)
def test_steps_longer_than_one_are_as_many_as_published(grid, jumps):
    """Counted with the published code on grids with odd sides."""
    steps = places(grid, gilbert(grid)).diff(dim=0).abs().sum(1)
    assert int((steps != 1).sum()) == jumps


def radius(grid, order, block=128):
    at = places(grid, order).double()
    blocks = at[: len(at) // block * block].view(-1, block, 3)
    return (blocks - blocks.mean(1, keepdim=True)).square().sum(-1).mean().item()


def test_blocks_are_compact():
    grid = (21, 30, 52)
    assert radius(grid, gilbert(grid)) < radius(grid, raster(grid)) / 20


def test_raster_is_the_hosts_order():
    grid = (2, 3, 4)
    assert torch.equal(raster(grid).forward, torch.arange(24))
    assert places(grid)[1 * 12 + 2 * 4 + 3].tolist() == [1, 2, 3]


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(0, 3, 4\)"):
        gilbert((0, 3, 4))
