"""PSNR and SSIM against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from accel.metrics.fidelity import psnr, ssim


def _images(n=3, seed=0):
    return torch.rand(n, 3, 32, 24, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error():
    a = torch.full((2, 3, 4, 4), 0.5)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert psnr(a, a).tolist() == [math.inf] * 2


def test_ssim_of_equal_and_of_constant_images():
    """Constant images have no variance, only the luminance term (2ab + C1) / (a^2 + b^2 + C1)."""
    images = _images()
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    a, b = 0.25, 0.75
    expected = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    flat = torch.ones(1, 1, 16, 16)
    assert ssim(flat * a, flat * b).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_symmetric_falls_with_noise_and_sees_inversion():
    images, noise = _images(), _images(seed=1) - 0.5
    little, much = (images + 0.1 * noise).clamp(0, 1), (images + 0.8 * noise).clamp(0, 1)
    torch.testing.assert_close(ssim(images, little), ssim(little, images))
    assert (ssim(images, little) > ssim(images, much)).all()
    assert (ssim(images, 1 - images) < 0).all()


def test_samples_are_independent():
    images, other = _images(), _images(seed=1)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(images, other)[1:2], metric(images[1:2], other[1:2]))


def test_bad_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(_images(), _images(2))
    with pytest.raises(ValueError, match="h and w >= 11"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
