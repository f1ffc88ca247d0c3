"""Verifiers without weights: brightness, contrast, sharpness, colourfulness, flicker, motion.

For tests and as a check that a search works at all; as held-out ones they show when a search pays
with looks. None knows what a picture shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from samplers.search.verifiers.protocol import frames_of

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class _Pixels:
    """A function of frames (n, f, h, w, c) in 0..1."""

    name: str
    range: tuple[float, float] = (0.0, 1.0)

    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return self.measure(frames_of(samples))

    def measure(self, frames: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def luma(frames: np.ndarray) -> np.ndarray:
    """(..., c) -> (...)."""
    return frames @ LUMA if frames.shape[-1] == 3 else frames.mean(-1)


def luma_of(samples: Any) -> Any:
    """The same of tensors (n, [f,] c, h, w), with their gradient: (n, f, h, w)."""
    x = samples[:, None] if samples.ndim == 4 else samples
    if x.shape[2] != 3:
        return x.mean(2)
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(2)


class Brightness(_Pixels):
    """Mean luma."""

    name = "brightness"

    def measure(self, frames: np.ndarray) -> np.ndarray:
        return luma(frames).mean((1, 2, 3))

    def differentiable(self, samples: Any, prompts: Sequence[str]) -> Any:
        return luma_of(samples).mean((1, 2, 3))


class Darkness(_Pixels):
    """One minus the mean luma."""

    name = "darkness"

    def measure(self, frames: np.ndarray) -> np.ndarray:
        return 1 - luma(frames).mean((1, 2, 3))

    def differentiable(self, samples: Any, prompts: Sequence[str]) -> Any:
        return 1 - luma_of(samples).mean((1, 2, 3))


class Contrast(_Pixels):
    """Standard deviation of the luma in a frame, of at most 0.5."""

    name, range = "contrast", (0.0, 0.5)

    def measure(self, frames: np.ndarray) -> np.ndarray:
        return luma(frames).std((2, 3)).mean(1)

    def differentiable(self, samples: Any, prompts: Sequence[str]) -> Any:
        return luma_of(samples).std((2, 3), correction=0).mean(1)


class Sharpness(_Pixels):
    """Root mean square of the luma's Laplacian, of at most 8."""

    name, range = "sharpness", (0.0, 8.0)

    def measure(self, frames: np.ndarray) -> np.ndarray:
        y = np.pad(luma(frames), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
        laplacian = around - 4 * y[..., 1:-1, 1:-1]
        return np.sqrt((laplacian**2).mean((2, 3))).mean(1)


class Colourfulness(_Pixels):
    """Hasler and Suesstrunk 2003: spread and mean of the opponent colours."""

    name = "colourfulness"

    def measure(self, frames: np.ndarray) -> np.ndarray:
        if frames.shape[-1] < 3:
            return np.zeros(len(frames))
        r, g, b = np.moveaxis(frames[..., :3], -1, 0)
        rg, yb = r - g, (r + g) / 2 - b
        spread = np.sqrt(rg.var((2, 3)) + yb.var((2, 3)))
        mean = np.sqrt(rg.mean((2, 3)) ** 2 + yb.mean((2, 3)) ** 2)
        return (spread + 0.3 * mean).mean(1)


class Steadiness(_Pixels):
    """One minus the mean change between frames: VBench's temporal flickering. 1 for pictures."""

    name = "steadiness"

    def measure(self, frames: np.ndarray) -> np.ndarray:
        if frames.shape[1] < 2:
            return np.ones(len(frames))
        return 1 - np.abs(np.diff(frames, axis=1)).mean((1, 2, 3, 4))


class Movement(_Pixels):
    """The largest tenth of changes from frame to frame, of luma. 0 for pictures."""

    name = "movement"

    def measure(self, frames: np.ndarray) -> np.ndarray:
        if frames.shape[1] < 2:
            return np.zeros(len(frames))
        change = np.sort(np.abs(np.diff(luma(frames), axis=1)).reshape(len(frames), -1), 1)
        return change[:, -max(1, change.shape[1] // 10) :].mean(1)


PIXELS = {
    v.name: v
    for v in (Brightness, Darkness, Contrast, Sharpness, Colourfulness, Steadiness, Movement)
}
