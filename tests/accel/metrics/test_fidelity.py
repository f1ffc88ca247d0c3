"""Paired fidelity against closed forms and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch

from accel.metrics.fidelity import (
    feature_distance,
    frame_psnr,
    psnr,
    ssim,
    temporal_error,
    worst_frame,
)


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


def test_agrees_with_torchmetrics():
    """Its SSIM pads by reflection; its map inside a border of 5 is the valid region that ours is.

    Its constants are float32, good to 2^-23 = 1e-7 relative.
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    a = _images().double()
    b = (a + 0.3 * (_images(seed=1) - 0.5)).clamp(0, 1)
    decibels = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b), decibels, rtol=1e-6, atol=0)
    _, whole = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    inside = whole[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(ssim(a, b), inside, rtol=1e-6, atol=0)


def _videos(n=2, f=4, seed=0):
    return torch.rand(n, f, 3, 8, 6, generator=torch.Generator().manual_seed(seed)).double()


def test_feature_distance_of_copies_and_of_strangers():
    """Unrelated rows of one distribution are at 1 in root mean square; n d = 2e5 values."""
    generator = torch.Generator().manual_seed(0)
    a, b = (5 + 2 * torch.randn(4000, 50, generator=generator).double() for _ in range(2))
    assert feature_distance(b, b).tolist() == [0.0] * 4000
    distances = feature_distance(a, b)
    assert distances.shape == (4000,)
    assert distances.square().mean().sqrt().item() == pytest.approx(1, abs=5 * 50**-0.5 / 4000**0.5)
    shift = torch.zeros(50).double()
    shift[3] = 7.0
    expected = 7.0 / (2 * b.var(dim=0).sum()).sqrt()
    torch.testing.assert_close(feature_distance(b + shift, b), expected.expand(4000))
    torch.testing.assert_close(feature_distance(3 * a - 4, 3 * b - 4), distances)


def test_frame_curve_and_worst_frame():
    a = torch.full((2, 3, 3, 4, 4), 0.5).double()
    error = torch.tensor([[0.1, 0.01, 0.001], [0.001, 0.001, 0.1]]).double()
    b = a + error[:, :, None, None, None]
    torch.testing.assert_close(frame_psnr(a, b), -20 * error.log10())
    values, frames = worst_frame(a, b)
    torch.testing.assert_close(values, torch.tensor([20.0, 20.0]).double())
    assert frames.tolist() == [0, 2]
    assert (frame_psnr(a, a) == math.inf).all()


def test_temporal_error_sees_change_and_not_constant_error():
    a = _videos()
    assert temporal_error(a, a).tolist() == [0.0, 0.0]
    still = 0.2 * _videos(seed=1)[:, :1]
    assert temporal_error(a + still, a).max() < 1e-15
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).double().view(1, 4, 1, 1, 1)
    torch.testing.assert_close(temporal_error(a + 0.1 * sign, a), torch.full((2,), 0.2).double())


def test_bad_videos_and_features():
    a = _videos()
    for metric in (frame_psnr, worst_frame, temporal_error):
        with pytest.raises(ValueError, match="wants videos"):
            metric(a[0], a[0])
        with pytest.raises(ValueError, match="differ in shape"):
            metric(a, a[:1])
    with pytest.raises(ValueError, match="f >= 2"):
        temporal_error(a[:, :1], a[:, :1])
    with pytest.raises(ValueError, match="n >= 2"):
        feature_distance(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="all equal"):
        feature_distance(torch.rand(4, 3), torch.ones(4, 3))
