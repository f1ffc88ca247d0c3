"""Flicker and motion against closed forms, and on real DigitWorld videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.metrics.video import (
    FROZEN,
    LEVEL,
    flicker,
    frozen,
    motion,
    still_border,
    still_where,
)
from accel.zoo.world import DigitWorld


@pytest.fixture(scope="module")
def real():
    """(48, 17, 3, 64, 64) in [0, 1]."""
    videos, _ = DigitWorld("heldout", canvas=64).videos(np.arange(48))
    return torch.from_numpy(videos).permute(0, 1, 4, 2, 3).float() / 255


def _noise(shape, deviation, seed=0):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _square(frames=9, speed=2):
    """A white square of 6 x 6 on black that moves to the right: (1, f, 1, 32, 32)."""
    video = torch.zeros(1, frames, 1, 32, 32)
    for t in range(frames):
        video[:, t, :, 10:16, 2 + speed * t : 8 + speed * t] = 1
    return video


def test_flicker_of_known_changes():
    base = torch.full((2, 4, 3, 8, 8), 0.5)
    assert flicker(base).tolist() == [0.0, 0.0]
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1, 1)
    step = base + torch.tensor([0.01, 0.02]).view(2, 1, 1, 1, 1) * sign
    everywhere = torch.ones(8, 8, dtype=torch.bool)
    for still in (None, everywhere, still_border(8, 8, 1)):
        assert flicker(step, still).tolist() == pytest.approx([0.02, 0.04], abs=1e-6)


def test_flicker_looks_only_where_it_should():
    video = _square()
    still = still_where(video)
    # each step covers two columns of six and uncovers two
    assert (~still).flatten(2).sum(2).tolist() == [[24] * 8]
    assert flicker(video, still).item() == 0
    assert flicker(video).item() == 0
    moving = torch.ones(32, 32, dtype=torch.bool)
    assert flicker(video, moving).item() == pytest.approx(24 / 32**2)


def test_still_where_forgives_one_level():
    levels = torch.tensor([100, 101, 103], dtype=torch.float32).view(1, 3, 1, 1, 1) / 255
    assert still_where(levels).flatten().tolist() == [True, False]
    assert LEVEL == 1 / 255


def test_real_videos_do_not_flicker_and_noisy_ones_do(real):
    """Normal noise of deviation s changes by 2 s / sqrt(pi) from frame to frame on average; the
    median is 0.954 s. Both are means of over 1e5 values a video: within 1 %."""
    border = still_border(64, 64, 3)
    assert flicker(real, border).max() == 0
    assert flicker(real).max() == 0
    noisy = real[:3] + _noise(real[:3].shape, 0.02)
    for still in (border, still_where(real[:3])):
        expected = pytest.approx([0.04 / np.pi**0.5] * 3, rel=0.01)
        assert flicker(noisy, still).tolist() == expected
    # motion adds a little to the median
    assert flicker(noisy).tolist() == pytest.approx([0.954 * 0.02] * 3, rel=0.15)


def test_motion_of_a_square():
    """Over half of 9 frames it moves 8 pixels, more than its side: 72 of 1024 pixels change, and
    36 are off the median."""
    assert motion(_square()).item() == pytest.approx(2)
    assert motion(_square(speed=1)).item() == pytest.approx(2 * 4 / 6)
    assert motion(_square(speed=0)).item() == 0
    assert motion(0.3 + 0.1 * _square()).item() == pytest.approx(2, abs=1e-5)
    assert motion(torch.full((1, 5, 3, 8, 8), 0.5)).item() == 0


def test_frozen_finds_still_videos_and_no_real_one(real):
    assert motion(real).min() > 2 * FROZEN
    assert not frozen(real).any()
    still = real[:, :1].expand_as(real)
    assert frozen(still).all()
    shivering = still[:16] + _noise(still[:16].shape, 0.02)
    assert frozen(shivering).all()
    assert not frozen(real[:16] + _noise(still[:16].shape, 0.02)).any()


def test_order_of_videos_does_not_matter(real):
    for metric in (flicker, motion):
        noisy = real[:4] + _noise(real[:4].shape, 0.01)
        torch.testing.assert_close(metric(noisy).flip(0), metric(noisy.flip(0)))


def test_refusals(real):
    for metric in (flicker, motion, frozen, still_where):
        with pytest.raises(ValueError, match="f >= 2"):
            metric(real[:2, :1])
        with pytest.raises(ValueError, match="wants"):
            metric(real[0])
    with pytest.raises(ValueError, match="nothing stands still in video 1"):
        flicker(real[:2], torch.tensor([True, False]).view(2, 1, 1, 1))
    with pytest.raises(ValueError, match="still is"):
        flicker(real[:2], torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="margin"):
        still_border(8, 8, 4)
