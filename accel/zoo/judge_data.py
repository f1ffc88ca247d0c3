"""What the judges learn from: roughened samples of DigitWorld, and samples that are no digits.

A quarter of each batch has the digit taken out of it: noise, bare backgrounds, digits blurred or
scrambled, and blends, splices and overlays of two different digits. Their target is the uniform
distribution, so that a judge is sure only of what a digit looks like.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from accel.zoo.loop import step_generator
from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, MOTIONS, DigitWorld

HEADS = {"digit": len(DIGITS), "colour": len(COLOURS), "background": len(BACKGROUNDS)}
VIDEO_HEADS = HEADS | {"motion": len(MOTIONS)}
FRAMES = 5  # a judge looks at so many of a video's
OUTLIERS = 4  # one sample in so many is no digit
VIDEOS = 10  # pictures per video in a batch; a video is 20 times as much work

Targets = dict[str, Tensor]  # (n, classes) probabilities per attribute; a row of zeros: not asked


class JudgeLoss:
    """Cross entropies of all heads on fresh pictures, videos and outliers.

    `bend`: how strongly pictures are deformed, 1 for ordinary.
    """

    def __init__(
        self,
        batch: int,
        seed: int,
        device: torch.device,
        *,
        split: str = "train",
        bend: float = 1.0,
    ):
        self.pictures = DigitWorld(split, seed)
        self.frames = DigitWorld(split, seed, canvas=64)
        self.batch, self.seed, self.device, self.bend = batch, seed, device, bend

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        x, targets = self._pictures(step, generator)
        loss = cross_entropy(model(x.to(self.device)), targets, self.device)
        x, targets, of_frames = self._videos(step, generator)
        videos, frames = model.video_logits(x.to(self.device))
        loss = loss + cross_entropy(videos, targets, self.device)
        return loss + cross_entropy(frames, of_frames, self.device)

    def _pictures(self, step: int, generator: torch.Generator) -> tuple[Tensor, Targets]:
        """(n, 3, 32, 32) and what to say of them."""
        indices = np.arange(step * self.batch, (step + 1) * self.batch)
        images, what = self.pictures.batch(indices)
        x, targets = signed(images).movedim(-1, 1), one_hot(what, HEADS)
        count = self.batch // OUTLIERS
        twins = self._twins(self.pictures.batch, indices[:count], what, generator)
        x[:count] = non_digits(x[:count], twins.movedim(-1, 1), generator)
        forget_digit(targets, slice(count))
        return roughen(x, generator, self.bend), targets

    def _videos(self, step: int, generator: torch.Generator) -> tuple[Tensor, Targets, Targets]:
        """(n, 3, 5, 64, 64), what to say of them, and of each frame.

        In turn: no digit; a digit that becomes another; one that stands still; one that jumps
        about; and four as they are.
        """
        count = max(4, self.batch // VIDEOS)
        indices = np.arange(step * count, (step + 1) * count)
        videos, what = self.frames.videos(indices, frames=FRAMES)
        x, targets = signed(videos), one_hot(what, VIDEO_HEADS)
        of_frames = {k: targets[k].repeat_interleave(FRAMES, 0).clone() for k in HEADS}
        kind = (indices + indices // 8) % 8

        def draw(*args, **fixed):
            return self.frames.videos(*args, frames=FRAMES, motions=what.motion[:count], **fixed)

        twins = self._twins(draw, indices, what, generator)
        for row in range(count):
            if kind[row] == 0:
                x[row] = _no_digit_video(x[row], twins[row], generator)
                forget_digit(targets, slice(row, row + 1))
                forget_digit(of_frames, slice(FRAMES * row, FRAMES * (row + 1)))
        for row in np.flatnonzero(kind == 2):
            x[row] = x[row, torch.randint(FRAMES, (1,), generator=generator)]
        for row in np.flatnonzero(kind == 3):
            x[row] = x[row, _jumping(generator)]
        still = torch.from_numpy((kind == 2) | (kind == 3))
        targets["motion"][still] = 1 / len(MOTIONS)
        folded = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (n, 5 x 3, 64, 64): bent as one
        x = roughen(folded, generator, self.bend).unflatten(1, (FRAMES, 3)).transpose(1, 2)
        return x, targets, of_frames
