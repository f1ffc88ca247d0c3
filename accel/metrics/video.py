"""Flicker and frozen videos, from raw frames in [0, 1] and without a reference.

Raw frames only: an encoder at its usual quality changes flicker by more than most accelerations do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 1 / 255  # one step of an 8-bit picture
# Mean over median of |N(0, 1)|: sqrt(2 / pi) / 0.67449.
_MEAN_OVER_MEDIAN = 1.1829
FROZEN = 0.1  # of the contrast; real DigitWorld videos have at least 0.2 (tests/accel/metrics)


def flicker(videos: Tensor, still: Tensor | None = None) -> Tensor:
    """Mean absolute change from frame to frame of what should stand still, in [0, 1].

    Where that is, in order of preference: `still_where(reference)`, where there is a reference of
    the same seed; `still_border`, where content leaves a margin untouched (DigitWorld: 3 pixels);
    without `still`, the median over pixels takes the place of the mean, which is the change of the
    background as long as less than half of the picture moves.

    Args:
        videos: (n, f, c, h, w), f at least 2.
        still: bool, broadcast to (n, f - 1, h, w); true where the picture should stand still
            between a frame and the next.

    Returns:
        (n,) float64.

    Raises:
        ValueError: other shapes, or a video of which nothing should stand still.
    """
    import torch

    change = _videos(videos, "flicker").diff(dim=1).abs()  # (n, f - 1, c, h, w)
    if still is None:
        return change.flatten(2).median(dim=2).values.mean(1)
    try:
        where = torch.broadcast_to(still, change[:, :, 0].shape)
    except RuntimeError as error:
        raise ValueError(f"flicker: still is {tuple(still.shape)} of {tuple(videos.shape)}") from (
            error
        )
    count = where.flatten(1).sum(1)
    if (count == 0).any():
        raise ValueError(f"flicker: nothing stands still in video {int(count.argmin())}")
    return (change.mean(2) * where).flatten(1).sum(1) / count


def still_where(reference: Tensor, tolerance: float = LEVEL) -> Tensor:
    """Where a reference (n, f, c, h, w) changes by at most `tolerance`: bool (n, f - 1, h, w)."""
    change = _videos(reference, "still_where").diff(dim=1).abs().amax(2)
    return change <= tolerance + 2.0**-23  # two values in single precision are each off by 2^-25


def still_border(height: int, width: int, margin: int) -> Tensor:
    """The outermost `margin` pixels of each side: bool (h, w)."""
    import torch

    if not 0 < 2 * margin < min(height, width):
        raise ValueError(f"still_border: margin {margin} of {height} x {width}")
    border = torch.ones(height, width, dtype=torch.bool)
    border[margin:-margin, margin:-margin] = False
    return border


def motion(videos: Tensor) -> Tensor:
    """How much of the picture is elsewhere half a video later, in units of its contrast.

    Mean absolute change over f // 2 frames, less what flickers everywhere (the median change, as of
    normal noise), over the mean absolute distance of pixels from their frame's median. A small
    object that has moved by more than its strokes has 2; what stands still has 0. Independent of
    brightness and contrast; blind to motion that repeats after half a video.

    Args:
        videos: (n, f, c, h, w), f at least 2.

    Returns:
        (n,) float64; 0 for a video without contrast.
    """
    videos = _videos(videos, "motion")
    half = videos.shape[1] // 2
    change = (videos[:, half:] - videos[:, :-half]).abs().flatten(2)  # (n, pairs, c h w)
    noise = _MEAN_OVER_MEDIAN * change.median(dim=2).values
    moved = (change.mean(2) - noise).clamp(min=0).mean(1)
    flat = videos.flatten(3)  # (n, f, c, h w)
    contrast = (flat - flat.median(dim=3, keepdim=True).values).abs().flatten(1).mean(1)
    return (moved / contrast).where(contrast > 0, 0.0)


def frozen(videos: Tensor, below: float = FROZEN) -> Tensor:
    """Which videos do not move: bool (n,), those with `motion` under `below`.

    The share of frozen videos is the mean of it (with `accel.metrics.statistics.share`).
    """
    return motion(videos) < below


def _videos(videos: Tensor, name: str) -> Tensor:
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"{name}: wants (n, f, c, h, w), f >= 2; got {tuple(videos.shape)}")
    return videos.double()
