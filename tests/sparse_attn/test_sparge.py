"""SpargePrediction: means, and everything that means cannot stand for."""

from __future__ import annotations

import pytest
import torch

from accel.testing import checks, conform
from sparse_attn.sparge import SpargePrediction, keep_within, likeness, predicted

TINY = SpargePrediction(dense=(0.0, 0.0), blocks=(16, 16), guard=False, mass=0.6, alike=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "cogvideox"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


def test_likeness_is_the_mean_cosine_of_pairs():
    x = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    found = likeness(x, 8)
    unit = torch.nn.functional.normalize(x[0, 0], dim=-1)
    assert found.item() == pytest.approx((unit @ unit.T).mean().item(), abs=1e-6)
    same = torch.ones(1, 1, 8, 4)
    assert likeness(same, 8).item() == pytest.approx(1)


def test_blocks_that_are_not_alike_are_kept_whole():
    g = torch.Generator().manual_seed(0)
    q = torch.ones(1, 1, 48, 8)
    k = torch.ones(1, 1, 48, 8)
    k[:, :, :16] = -1
    k[:, :, 16:32] = torch.randn(1, 1, 16, 8, generator=g)
    q[:, :, 32:] = torch.randn(1, 1, 16, 8, generator=g)
    keep = predicted(q, k, (16, 16), mass=0.5, alike=0.5)[0, 0]
    assert keep[:, 1].all()  # keys that differ are seen by all
    assert keep[2].all()  # queries that differ see all
    assert not keep[0, 0]
    assert keep[0, 2]  # the largest logits


def test_the_block_that_crosses_is_dropped():
    """As `searchsorted` from the right in the running sum, and never none."""
    weights = torch.tensor([0.2, 0.5, 0.3])
    running = weights.sort(descending=True).values.cumsum(0)
    for mass in (0.1, 0.45, 0.5, 0.7, 0.85, 0.99):
        expected = max(1, int(torch.searchsorted(running, torch.tensor(mass), right=True)))
        keep = keep_within(weights.view(1, 1, 1, 3), mass)
        assert keep.sum() == expected
        assert keep[0, 0, 0, 1], "the largest first"


def test_keys_lose_their_mean_which_changes_no_softmax():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 64, 8, generator=g) for _ in "qk")
    shifted = predicted(q, k + 5, (16, 16), 0.5, -1.0)
    assert torch.equal(shifted, predicted(q, k, (16, 16), 0.5, -1.0))


def test_bad_settings():
    for settings in ({"mass": 0.0}, {"alike": 1.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SpargePrediction(**settings)
