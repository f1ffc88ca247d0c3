"""Paired fidelity: how far an accelerated output is from the unaccelerated one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample, in dB; ``inf`` for equal samples.

    Args:
        a, b: values in [0, 1], (batch, ...) of equal shape.

    Returns:
        (batch,) float64.
    """
    _check_shapes(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each sample: Gaussian window, valid region, mean over channels.

    Args:
        a, b: values in [0, 1], (batch, channels, height, width) of equal shape, both sides at
            least 11.

    Returns:
        (batch,) float64 in [-1, 1].
    """
    import torch

    _check_shapes(a, b)
    if a.ndim != 4 or min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: wants (b, c, h, w), h and w >= {SSIM_WINDOW}; got {a.shape}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=a.device) - SSIM_WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :])[None, None]  # (1, 1, k, k)

    def blur(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])  # (b c, 1, h, w)
        return torch.nn.functional.conv2d(flat, window)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (top / bottom).reshape(len(a), -1).mean(1)


def feature_distance(a: Tensor, reference: Tensor) -> Tensor:
    """Distance of each pair of features, in units of the distance of unrelated references.

    |a_i - r_i| / (mean over i, j of |r_i - r_j|^2)^(1/2): 0 is the same content, 1 is as far as
    another sample. Chosen over 1 - cosine and |a - r| / |r| because both depend on the mean of the
    features, which is large and says nothing (features behind a ReLU all point the same way).

    Args:
        a, reference: (n, d) of equal shape, n at least 2.

    Returns:
        (n,) float64.

    Raises:
        ValueError: other shapes, or references that are all equal.
    """
    _check_shapes(a, reference)
    if a.ndim != 2 or len(a) < 2:
        raise ValueError(f"feature_distance: wants (n, d) with n >= 2; got {tuple(a.shape)}")
    unrelated = (2 * reference.double().var(dim=0).sum()).sqrt()
    if unrelated == 0:
        raise ValueError("feature_distance: the references are all equal, there is no unit")
    return (a.double() - reference.double()).norm(dim=1) / unrelated


def frame_psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame, in dB; ``inf`` for equal frames.

    Args:
        a, b: values in [0, 1], (n, f, c, h, w) of equal shape.

    Returns:
        (n, f) float64: a curve for each video.
    """
    _check_videos(a, b, frames=1)
    return psnr(a.flatten(0, 1), b.flatten(0, 1)).reshape(a.shape[:2])


def worst_frame(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The frame of each video with the lowest PSNR: ((n,) dB, (n,) index). Shapes of frame_psnr."""
    worst = frame_psnr(a, b).min(dim=1)
    return worst.values, worst.indices


def temporal_error(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square error of frame-to-frame differences, in units of the full range.

    Blind to what is wrong alike in all frames, so it is what flicker and wrong motion add.

    Args:
        a, b: values in [0, 1], (n, f, c, h, w) of equal shape, f at least 2.

    Returns:
        (n,) float64.
    """
    _check_videos(a, b, frames=2)
    error = (a.double() - b.double()).diff(dim=1)
    return error.square().flatten(1).mean(1).sqrt()


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"paired samples differ in shape: {tuple(a.shape)}, {tuple(b.shape)}")


def _check_videos(a: Tensor, b: Tensor, frames: int) -> None:
    _check_shapes(a, b)
    if a.ndim != 5 or a.shape[1] < frames:
        raise ValueError(f"wants videos (n, f, c, h, w), f >= {frames}; got {tuple(a.shape)}")
