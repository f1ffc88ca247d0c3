"""Appearance features of pictures whose detail is known."""

from __future__ import annotations

import math

import pytest
import torch

from accel.metrics.appearance import FLOOR, appearance


def _log_rms(energy):
    return 0.5 * math.log(energy + FLOOR)


def test_plain_and_striped_pictures():
    """Stripes of b pixels have all their detail, of size 0.1, at blocks of 2 b."""
    plain = torch.full((1, 2, 16, 16), 0.25)
    none = [_log_rms(0.0)] * 2
    assert appearance(plain).tolist()[0] == pytest.approx([0.25] * 2 + none * 3)
    for level, b in enumerate((1, 2, 4)):
        sign = 1 - 2.0 * ((torch.arange(16) // b) % 2)
        striped = plain + 0.1 * sign
        expected = [0.25] * 2 + [_log_rms(0.01 if i // 2 == level else 0.0) for i in range(6)]
        # the log of a detail of 0 is good to the rounding of 0.25 in single precision
        assert appearance(striped).tolist()[0] == pytest.approx(expected, abs=1e-4)


def test_details_add_up_to_the_variance():
    """Haar details of all scales are orthogonal: energies sum to the variance of the whole."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    found = appearance(images, levels=4)
    energies = ((2 * found[:, 3:]).exp() - FLOOR).unflatten(1, (4, 3)).sum(1)
    torch.testing.assert_close(energies, images.var((2, 3), correction=0))
    torch.testing.assert_close(found[:, :3], images.mean((2, 3)))


def test_contrast_is_a_shift():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    shift = (appearance(images) - appearance(images / 2))[:, 3:]
    # the floor takes less than FLOOR / energy of it; the details here are above 1e-4
    torch.testing.assert_close(
        shift, torch.full_like(shift, math.log(2)), rtol=0, atol=4 * FLOOR / 1e-4
    )


def test_refusals():
    for shape in ((3, 16, 16), (1, 3, 12, 16), (1, 3, 16, 20)):
        with pytest.raises(ValueError, match="divisible by 8"):
            appearance(torch.zeros(shape))
