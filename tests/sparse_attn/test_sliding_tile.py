"""SlidingTile: the nearest blocks, reaching inwards at borders."""

from __future__ import annotations

import pytest
import torch

from accel.testing import checks, conform
from sparse_attn.block_map import keep_share
from sparse_attn.geometry import block_scores
from sparse_attn.sliding_tile import SlidingTile, window_score
from sparse_attn.token_order import gilbert, places

TINY = SlidingTile(dense=(0.0, 0.0), blocks=(16, 16), guard=False, density=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "hunyuanvideo"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


def centres(grid, block):
    at = places(grid, gilbert(grid)).double()
    return torch.stack([part.mean(0) for part in at.split(block)])


def test_kept_blocks_are_nearer_than_dropped_ones():
    grid, block = (8, 16, 16), 64
    scores = block_scores(window_score(1.0, 1.0, 1.0), grid, "gilbert", (0, 0), (block, block))
    assert scores.shape == (32, 32)
    keep = keep_share(scores[None, None], 0.25)[0, 0]
    assert (keep.sum(-1) == 8).all()  # at borders as many
    assert keep.diagonal().all()
    at = centres(grid, block) / torch.tensor(grid)
    apart = (at[:, None] - at[None]).abs().amax(-1)
    assert apart[keep].mean() < 0.5 * apart[~keep].mean()


def test_proportions_of_the_window():
    """Long in time: whole columns of frames; flat: whole frames."""
    grid = (8, 16, 16)
    at = centres(grid, 64)
    apart = (at[:, None] - at[None]).abs()
    reach = {}
    for name, window in {"long": (8.0, 1.0, 1.0), "flat": (1.0, 8.0, 8.0)}.items():
        scores = block_scores(window_score(*window), grid, "gilbert", (0, 0), (64, 64))
        keep = keep_share(scores[None, None], 0.25)[0, 0]
        reach[name] = apart[keep].mean(0)
    assert reach["long"][0] > reach["flat"][0]
    assert reach["long"][1] < reach["flat"][1]


def test_text_is_kept():
    scores = block_scores(window_score(1.0, 1.0, 1.0), (2, 4, 4), "gilbert", (5, 3), (16, 16))
    assert scores.shape == (3, 3)
    assert torch.isinf(scores[2]).all()
    assert torch.isinf(scores[:, 2]).all()


def test_a_map_is_made_once_a_grid():
    from types import SimpleNamespace

    grid = (2, 4, 4)
    q = torch.zeros(2, 3, 37, 8)  # 32 of the video, 5 of the text
    place = SimpleNamespace(order=gilbert(grid), grid=grid, blocks=(16, 16))
    one, two = (TINY.keep(q, q, place, None) for _ in "12")
    assert one.shape == (2, 3, 3, 3)
    assert one.data_ptr() == two.data_ptr()
    assert TINY.keep(q[:, :, :32], q, place, None).shape == (2, 3, 2, 3)


def test_bad_settings():
    with pytest.raises(ValueError, match="window"):
        SlidingTile(window=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="density"):
        SlidingTile(density=2.0)
