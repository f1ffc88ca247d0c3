"""Outputs that are certainly wrong: not finite, black, or a video that does not move.

Thresholds are in units of one grey level of 255, because that is what a viewer can see: a picture
is black when no value reaches two grey levels, a video frozen when no value changes by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BLACK_BELOW = 2 / 255
FROZEN_BELOW = 1 / 255


def suspicion(frames: np.ndarray) -> str | None:
    """What is wrong with float frames in [0, 1], "nan" | "black" | "frozen", or None.

    `frames`: (samples, h, w, c), or (samples, f, h, w, c) for video. One bad sample is enough.
    """
    import numpy as np

    if not np.isfinite(frames).all():
        return "nan"
    samples = frames.reshape(len(frames), -1)
    if (samples.max(axis=1) < BLACK_BELOW).any():
        return "black"
    if frames.ndim == 5 and frames.shape[1] > 1:
        motion = np.abs(frames - frames[:, :1]).reshape(len(frames), -1)
        if (motion.max(axis=1) < FROZEN_BELOW).any():
            return "frozen"
    return None
