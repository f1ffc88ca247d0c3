"""Nearest neighbours against brute force; copies are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.metrics import memorised
from accel.metrics.memorised import copied, nearest, nearness


def _normal(seed, n, d=6):
    return np.random.default_rng(seed).normal(size=(n, d))


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.0, 1e6]))
def test_nearest_is_brute_force(seed, k, offset):
    a, b = _normal(seed, 17) + offset, _normal(seed + 1, 23) + offset
    table = np.linalg.norm(a[:, None] - b[None], axis=2)
    found = nearest(a, b, k)
    assert (found.index == np.argsort(table, axis=1)[:, :k]).all()
    assert (found.distance == np.sort(table, axis=1)[:, :k]).all()


def test_blocks_and_tensors(monkeypatch):
    a, b = _normal(0, 20), _normal(1, 30)
    whole = nearest(a, b, 3)
    monkeypatch.setattr(memorised, "BLOCK", 7)
    parts = nearest(torch.from_numpy(a), torch.from_numpy(b), 3)
    assert (parts.index == whole.index).all()
    assert (parts.distance == whole.distance).all()


def test_a_copy_is_at_zero():
    b = 1000 + _normal(0, 200, 64)
    found = nearest(b[::-1], b)
    assert (found.distance == 0).all()
    assert (found.index[:, 0] == np.arange(200)[::-1]).all()


def test_copies_are_found_and_held_out_data_pass_half():
    """For one dimension and many points nearest spacings are exponential, so that a new point's
    beats the fellow's with a probability of 1/2 up to a constant; here it is only bounded."""
    train, heldout = _normal(0, 800), _normal(1, 800)
    assert copied(train + 1e-9, train).all()
    assert 0.3 < copied(heldout, train).mean() < 0.6
    assert not copied(heldout + 100, train).any()
    mixed = np.concatenate([train[:100], 100 + heldout[:300]])
    assert copied(mixed, train).mean() == 0.25


def test_nearness():
    """Two draws of one distribution are equally near: medians of 800 within 10 %."""
    train, heldout, samples = (_normal(i, 800) for i in range(3))
    assert nearness(samples, heldout, train) == pytest.approx(1, abs=0.1)
    assert nearness(heldout[::-1], heldout, train) == 1
    assert nearness(train, heldout, train) == 0
    assert nearness(samples * 3, heldout, train) > 2
    scaled = nearness(5 * samples + 1, 5 * heldout + 1, 5 * train + 1)
    assert scaled == pytest.approx(nearness(samples, heldout, train), rel=1e-9)
    with pytest.raises(ValueError, match="held-out data"):
        nearness(samples, train, train)


def test_refusals():
    a = _normal(0, 5)
    for arguments in [(a, a, 0), (a, a, 6), (a, a[:, :3], 1)]:
        with pytest.raises(ValueError, match="nearest"):
            nearest(*arguments)
    with pytest.raises(ValueError, match="nearest"):
        copied(a, a[:1])
