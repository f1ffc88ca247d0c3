"""Untrained features of how a picture looks: its colour, and how much detail it has at each scale.

For `frechet` and `kid` beside the features of a classifier. A classifier that was trained on noisy
and blurred pictures, as digits-judge was, ignores noise and blur on purpose: its features cannot
say that an accelerated model blurs. These can, and say nothing about content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 3  # blocks of 2, 4 and 8 pixels
FLOOR = (1 / 255) ** 2 / 12  # variance of rounding to 8 bits: less detail than that is none


def appearance(images: Tensor, levels: int = LEVELS) -> Tensor:
    """Per channel: mean, and log of the root mean square of the Haar details at each scale.

    The detail at one scale is the picture less its means over blocks of 2 x 2; the block means are
    the picture of the next. Half the detail is less by log 2, whatever the contrast. Frames of a
    video are pictures.

    Args:
        images: (n, c, h, w) in [0, 1], sides divisible by 2^levels.

    Returns:
        (n, c (1 + levels)) float64: the means, then the details from fine to coarse.

    Raises:
        ValueError: other shapes.
    """
    import torch
    import torch.nn.functional as F

    if images.ndim != 4 or levels < 1 or images.shape[2] % 2**levels or images.shape[3] % 2**levels:
        raise ValueError(
            f"appearance: wants (n, c, h, w) with sides divisible by {2**levels}; "
            f"got {tuple(images.shape)}"
        )
    x = images.double()
    found = [x.mean((2, 3))]
    for _ in range(levels):
        coarse = F.avg_pool2d(x, 2)
        energy = (x - F.interpolate(coarse, scale_factor=2)).square().mean((2, 3))
        found.append(0.5 * (energy + FLOOR).log())
        x = coarse
    return torch.cat(found, 1)
