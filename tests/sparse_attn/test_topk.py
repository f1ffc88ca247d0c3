"""TopK: as many blocks a row, by means."""

from __future__ import annotations

import pytest
import torch

from accel.method import attached
from accel.testing import checks, conform, tiny
from sparse_attn.topk import TopK

TINY = TopK(dense=(0.0, 0.0), blocks=(16, 16), guard=False, density=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "cogvideox"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


def test_the_largest_logits_of_means_are_kept():
    q, k = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 64, 4)
    q[..., 0] = 1
    k[:, :, 16:32, 0], k[:, :, 48:, 0] = 3, 2
    found = TopK(blocks=(16, 16), density=0.5).keep(q, k, _place(), None)
    assert found[0, 0].tolist() == [[False, True, False, True]] * 2


def _place():
    from types import SimpleNamespace

    return SimpleNamespace(blocks=(16, 16))


def test_a_run_counts_as_many_as_asked():
    host = tiny("wan")
    with attached(TINY, host.pipe) as live:
        host.run()
        density = live.report()["runs"][0]["detail"]["density"]
    assert density == pytest.approx(0.5, abs=0.17)  # one of two blocks, the last is half


def test_bad_settings():
    with pytest.raises(ValueError, match="density"):
        TopK(density=0.0)
