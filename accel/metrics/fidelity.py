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


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"paired samples differ in shape: {tuple(a.shape)}, {tuple(b.shape)}")
