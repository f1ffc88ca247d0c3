"""What can be said of a video without any network, from raw frames while they are there.

`temporal_flickering` is VBench's own formula. The rest have no counterpart there, or only one with
weights, and have other names so that nobody takes them for it.
"""

from __future__ import annotations

import numpy as np

EXACT = ("temporal_flickering",)  # VBench's formula; but on raw frames, which an mp4 changes
OWN = ("linear_smoothness", "flicker_of_still", "motion")  # ours


def native(frames: np.ndarray) -> dict[str, float]:
    """Scores of one video (f, h, w, 3) uint8, f at least 3.

    temporal_flickering: 1 - mean absolute difference of neighbouring frames, over 255.
    linear_smoothness: the same of each odd frame and the mean of its neighbours; VBench's
    motion_smoothness takes a trained interpolation in place of the mean.
    flicker_of_still, motion: `accel.metrics.video`.

    Raises:
        ValueError: no such video.
    """
    import torch

    from accel.metrics.video import flicker, motion

    if frames.ndim != 4 or frames.shape[0] < 3 or frames.dtype != np.uint8:
        raise ValueError(f"vbench: wants uint8 (f, h, w, 3), f >= 3; got {frames.shape}")
    x = frames.astype(np.float32)
    middle = x[1:-1:2]
    between = (x[0:-2:2] + x[2::2]) / 2
    video = torch.from_numpy(frames).movedim(-1, -3)[None] / 255.0
    return {
        "temporal_flickering": float(_likeness(x[1:], x[:-1])),
        "linear_smoothness": float(_likeness(middle, between)),
        "flicker_of_still": float(flicker(video)),
        "motion": float(motion(video)),
    }


def _likeness(a: np.ndarray, b: np.ndarray) -> np.floating:
    """(255 - mean absolute difference) / 255, the mean taken frame by frame as VBench does."""
    return (255.0 - np.abs(a - b).reshape(len(a), -1).mean(1).mean()) / 255.0
