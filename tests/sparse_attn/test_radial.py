"""Radial: half as wide for every doubling of the distance in time."""

from __future__ import annotations

import pytest
import torch

from accel.testing import checks, conform
from sparse_attn.radial import Radial, radial_score

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
        score = radial_score(False)(origin, keys, (64, 1, 64))[0]
        widths.append(int((score >= -32).sum()))
    assert widths == [32, 16, 8, 4]


def test_the_first_frame_is_seen_by_all():
    keys = torch.tensor([[0.0, 9.0, 9.0], [1.0, 9.0, 9.0]])
    far = torch.tensor([[30.0, 0.0, 0.0]])
    with_sink, without = (radial_score(s)(far, keys, (40, 10, 10))[0] for s in (True, False))
    assert with_sink[0] == 0 > with_sink[1]
    assert without[0] < 0
