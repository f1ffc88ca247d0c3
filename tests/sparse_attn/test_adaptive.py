"""Video-BLADE's selection, step by step as published, and the method."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accel.method import attached
from accel.testing import checks, conform, tiny
from sparse_attn import adaptive
from sparse_attn._live import Place
from sparse_attn.adaptive import Adaptive, importance, pooled_windows, select
from sparse_attn.block_map import BlockMap, blocked
from sparse_attn.kernels import reference
from sparse_attn.kernels.reference import Pooled
from sparse_attn.token_order import gilbert

TINY = Adaptive(dense=(0.0, 0.0), blocks=(16, 16), guard=False, high=0.5, window=8)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan", "cogvideox", "hunyuanvideo", "ltx", "flux"])
def test_conformance(check, pipeline):
    conform(check, TINY, pipeline)


@pytest.mark.parametrize("check", ["runs_are_independent", "rng_is_untouched"])
def test_drawn_samples_repeat_and_leave_other_draws_alone(check):
    conform(check, TINY, "wan")


@pytest.mark.parametrize("at_once", [3, adaptive.AT_ONCE])
def test_the_importance_is_the_description_in_loops(at_once, monkeypatch):
    """Sampled rows and columns, largest weight relative to the row's largest, rows to one."""
    monkeypatch.setattr(adaptive, "AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 4, generator=g) for n in (30, 40))
    q, k = blocked(q, 8), blocked(k, 8)  # 4 and 5 blocks; the last query block ragged
    rows, columns = (torch.rand(1, 2, 8, generator=g).argsort(-1)[..., :2] for _ in "qk")
    found = importance(q, k, rows, columns)
    for h in range(2):
        score = torch.zeros(4, 5)
        for i in range(4):
            for r in rows[0, h].tolist():
                logits = torch.stack([
                    (k[0, h, j, columns[0, h]] @ q[0, h, i, r]).max() / math.sqrt(4)
                    for j in range(5)
                ])  # fmt: skip
                score[i] = torch.maximum(score[i], (logits - logits.max()).exp())
        assert torch.allclose(found[0, h], score / score.sum(-1, keepdim=True), atol=1e-6)


def test_the_selection_drops_the_block_that_crosses():
    score = torch.tensor([[[[0.5, 0.3, 0.15, 0.05]]]])
    assert select(score, 0.95, 0.0, 1.0).sum() == 2  # 0.95 is reached by the third: index 2
    assert select(score, 0.96, 0.0, 1.0).sum() == 3
    assert select(score, 0.96, 0.0, 0.5).sum() == 2  # the upper clamp
    assert select(score, 0.10, 0.0, 1.0).sum() == 1  # never none
    assert select(score, 0.10, 0.75, 1.0).sum() == 3
    # 256 blocks as for Wan 2.1 at 480p: 12 to 43 of them
    wide = torch.ones(1, 1, 1, 256)
    assert select(wide, 0.95, 0.05, 0.17).sum() == 43
    sharp = torch.zeros(1, 1, 1, 256).index_fill(-1, torch.tensor([7]), 1.0)
    assert select(sharp, 0.95, 0.05, 0.17).sum() == 12


def test_one_softmax_is_the_merge_of_two_attentions():
    """w = e^lse1 / (e^lse1 + g e^lse2) of the paper, and logits with ln g added, are the same."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 8, generator=g).double() for _ in "qkv")
    keep = torch.rand(1, 2, 4, 4, generator=g) < 0.6
    keep[..., 0] = True
    blocks = BlockMap(keep, 16, 16, 50, 50)
    window = 6
    pk, pv = (pooled_windows(x.float(), window).double() for x in (k, v))
    bias = torch.full((1, 1, 1, 1), math.log(window))
    one = reference.attend(q, k, v, blocks, Pooled(pk, pv, bias))
    sparse = reference.attend(q, k, v, blocks)
    everything = BlockMap(torch.ones(1, 2, 4, 1, dtype=torch.bool), 16, 16, 50, pk.shape[2])
    pooled = reference.attend(q, pk, pv, everything)
    weight = sparse.lse.exp() / (sparse.lse.exp() + window * pooled.lse.exp())
    merged = weight[..., None] * sparse.out + (1 - weight[..., None]) * pooled.out
    assert torch.allclose(one.out, merged, atol=1e-7)  # ln 6 is in float32


def test_windows_repeat_the_last_token():
    x = torch.arange(7.0).view(1, 1, 7, 1)
    assert pooled_windows(x, 3).flatten().tolist() == [1, 4, 6]


def test_a_sample_is_the_same_among_others():
    """Its places are its own, whatever the batch; of queries and keys not the same ones."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 64, 8, generator=g) for _ in "qk")
    place = Place((4, 4, 4), gilbert((4, 4, 4)), 0, (16, 16), "transformer", 0, 1, 0, 1, 0.5, "")
    policy = replace(TINY, mass=0.6, high=1.0)
    both = policy.keep(q, k, place, None)
    for i in range(2):
        assert torch.equal(both[i : i + 1], policy.keep(q[i : i + 1], k[i : i + 1], place, None))
    rows, columns = (adaptive.drawn(2, 128, adaptive._seed(place, of), q.device) for of in "qk")
    assert not torch.equal(rows, columns)
    assert all(len(set(one.tolist())) == adaptive.SAMPLES for one in rows[0])


def test_the_caps_hold_in_a_run():
    host = tiny("wan")
    with attached(TINY, host.pipe) as live:
        host.run()
        run = live.report()["runs"][0]
    # 24 tokens are 2 blocks, of which the caps allow one
    assert run["detail"]["density"] == pytest.approx(0.5, abs=0.17)
    assert run["fallbacks"] == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"low": 0.5}, "low"), ({"mass": 0.0}, "mass"), ({"window": -1}, "window")],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Adaptive(**settings)
