"""Radial: half as wide for every doubling of the distance in time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accel.testing import checks, conform
from sparse_attn.radial import Radial, radial_score
from sparse_attn.token_order import gilbert, places

TINY = Radial(dense=(0.0, 0.0), blocks=(16, 16), guard=False, density=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "ltx"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


def test_widths_halve_with_every_doubling():
    """For a threshold on the score, the widest kept distance at frames 1, 2, 4, 8 apart."""
    origin = torch.tensor([[20.0, 0.0, 0.0]])
    widths = []
    for frames in (1, 2, 4, 8):
        keys = torch.tensor([[20.0 + frames, 0.0, float(x)] for x in range(64)])
        score = radial_score(origin, keys, (64, 1, 64))[0]
        widths.append(int((score >= -32).sum()))
    assert widths == [32, 16, 8, 4]


def kept(grid, density, sink):
    """(nq, nk), and which blocks of keys hold tokens of the first frame."""
    order = gilbert(grid)
    q = torch.zeros(1, 1, len(order.forward), 1)
    place = SimpleNamespace(order=order, grid=grid, blocks=(64, 64))
    policy = Radial(blocks=(64, 64), density=density, sink=sink)
    first = (places(grid, order)[:, 0] == 0).split(64)
    return policy.keep(q, q, place, None)[0, 0], torch.stack([part.any() for part in first])


@pytest.mark.parametrize("density", [0.3, 0.5])
def test_the_first_frame_is_seen_by_all(density):
    grid = (24, 16, 16)  # an eighth of the blocks reach into the first frame, or more
    keep, first = kept(grid, density, True)
    assert first.float().mean() < density / 2
    assert keep[:, first].all()
    assert not kept(grid, density, False)[0][:, first].all()
    assert (keep.sum(-1) == round(density * len(first))).all()
    assert keep.diagonal().all(), "and every block itself"


def test_of_a_first_frame_that_is_too_much_what_is_near_is_seen_and_oneself():
    grid, density = (8, 16, 16), 0.25  # half of the blocks reach into it
    keep, first = kept(grid, density, True)
    assert first.float().mean() > density
    assert keep.diagonal().all()
    assert (keep[:, first].sum(-1) >= round(density * len(first)) - 1).all()
    at = torch.stack([p.double().mean(0) for p in places(grid, gilbert(grid)).split(64)])
    apart = (at[:, None] - at[None])[..., 1:].norm(dim=-1)
    seen = keep & first
    assert apart[seen].mean() < 0.5 * apart[~keep & first].mean()
