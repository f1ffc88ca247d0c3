"""What the judges learn from: roughened samples of DigitWorld, and samples that are no digits.

A quarter of the pictures have the digit taken out of them: noise, bare backgrounds, digits blurred
or scrambled, and blends, splices and overlays of two different digits. Their target is the uniform
distribution, so that a judge is sure only of what looks like one digit.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.loop import step_generator
from accel.zoo.world import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    LEVELS,
    TEXTURES,
    Attributes,
    DigitWorld,
    backdrop,
)

HEADS = {"digit": len(DIGITS), "colour": len(COLOURS), "background": len(BACKGROUNDS)}
FRAMES = 5  # of a video, a judge looks at so many
OUTLIERS = 4  # one picture in so many is no digit
FRAMES_EVERY = 4  # steps; the others see pictures
RAMP = 600  # steps until pictures are deformed in full; before, digits are learnt sooner
BLENDS = 6  # of the kinds of outliers, the first so many mix two digits; see `mixture`
NEARER = 0.3  # a mixture is at least so far from either digit, by their distance

Targets = dict[str, Tensor]  # per attribute, (n, classes) probabilities; a row of zeros: not asked


class JudgeLoss:
    """Cross entropies of all heads on fresh pictures, frames of videos, and outliers.

    bend: how far pictures are deformed in the end; 1 is what a judge with many scans needs.
    """

    def __init__(self, batch: int, seed: int, device: torch.device, split="train", bend=1.0):
        self.world = DigitWorld(split, seed)
        self.film = DigitWorld(split, seed, canvas=64)
        self.batch, self.seed, self.device, self.bend = batch, seed, device, bend

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        draw = self.frames if step % FRAMES_EVERY == 0 else self.pictures
        x, targets = draw(step, generator)
        return cross_entropy(model(x.to(self.device)), targets)

    def pictures(self, step: int, generator: torch.Generator) -> tuple[Tensor, Targets]:
        """(n, 3, 32, 32) and what to say of them; the first quarter are no digits."""
        indices = np.arange(step * self.batch, (step + 1) * self.batch)
        images, what = self.world.batch(indices)
        x, targets = signed(images), one_hot(what, HEADS)
        count = self.batch // OUTLIERS
        digits = other_digits(what.digit[:count], generator)
        # Every other blend is of one style: the same picture but for the digit.
        alike = indices[:count] % 2 == 0
        colours = np.where(alike, what.colour[:count], np.roll(what.colour, 1)[:count])
        partners = np.where(alike, indices[:count], indices[:count] + self.batch)
        twins = signed(self.world.batch(partners, class_ids=digits + 10 * colours)[0])
        x[:count] = non_digits(x[:count], twins, generator)
        disown(targets, torch.arange(len(x)) < count)
        return roughen(x, generator, self.bend * min(1, step / RAMP)), targets

    def frames(self, step: int, generator: torch.Generator) -> tuple[Tensor, Targets]:
        """Frames of as many videos (n, 3, 64, 64), the digit anywhere; as in `pictures`."""
        count = self.batch // 4  # of four times the pixels
        indices = np.arange(step * count, (step + 1) * count)
        rows, at = np.arange(count), indices % FRAMES
        films, what = self.film.videos(indices, frames=FRAMES)
        x, targets = signed(films[rows, at]), one_hot(what, HEADS)
        none = max(1, count // OUTLIERS)
        same_but_digit = other_digits(what.digit, generator) + 10 * what.colour
        twins = self.film.videos(indices, class_ids=same_but_digit, frames=FRAMES)[0]
        x[:none] = non_digits(x[:none], signed(twins[rows, at])[:none], generator)
        disown(targets, torch.arange(count) < none)
        return roughen(x, generator, self.bend * min(1, step / RAMP)), targets


def cross_entropy(logits: dict[str, Tensor], targets: Targets) -> Tensor:
    """Sum over the attributes, mean over the samples; in nats."""
    losses = [
        -(targets[k].to(v.device) * v.float().log_softmax(1)).sum(1).mean()
        for k, v in logits.items()
    ]
    return torch.stack(losses).sum()


def signed(samples: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) in -1..1."""
    return (torch.from_numpy(samples).movedim(-1, -3).float() / 127.5 - 1).contiguous()


def one_hot(what: Attributes, heads: dict[str, int]) -> Targets:
    """The truth as targets."""
    return {k: F.one_hot(torch.from_numpy(getattr(what, k)), n).float() for k, n in heads.items()}


def disown(targets: Targets, rows: Tensor) -> None:
    """Makes rows (n,) bool those of no digit: any digit alike, and nothing else is asked."""
    for target in targets.values():
        target[rows] = 0
    targets["digit"][rows] = 1 / len(DIGITS)


def other_digits(digits: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """For each digit (n,) another one, all nine alike."""
    return (digits + torch.randint(1, 10, (len(digits),), generator=generator).numpy()) % 10


def non_digits(x: Tensor, twins: Tensor, generator: torch.Generator) -> Tensor:
    """Outliers made of samples x (n, c, h, w) and of twins, like x, with other digits."""
    rows = []
    for i, kind in enumerate(torch.randint(BLENDS + 5, (len(x),), generator=generator).tolist()):
        one, two = x[i : i + 1], twins[i : i + 1]
        if kind < BLENDS:
            mixed = mixture(one, two, kind, generator)
            apart = (one - two).abs().mean()
            nearer = min((mixed - one).abs().mean(), (mixed - two).abs().mean())
            # A mixture that is almost one of the two digits is a digit.
            fair = nearer > NEARER * apart
            rows.append(mixed if fair else (one + two) / 2)
        else:
            rows.append(ruin(one, kind - BLENDS, generator))
    return torch.cat(rows)


def mixture(one: Tensor, two: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """Two samples (1, c, h, w) in one: averaged, overlaid, cut by a line, or in blobs."""
    u = torch.rand(3, generator=generator)
    if kind == 0:
        return torch.lerp(one, two, (0.3 + 0.4 * u[0]).item())
    if kind == 1:
        return torch.maximum(one, two) if u[0] < 0.5 else torch.minimum(one, two)
    height, width = one.shape[2:]
    if kind == 2:
        mask = torch.randn(1, 1, 4, 4, generator=generator)
        mask = F.interpolate(mask, (height, width), mode="bicubic").mul(8).sigmoid()
        return torch.lerp(one, two, mask)
    angle = 2 * torch.pi * u[0]
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :]
    along = angle.cos() * x + angle.sin() * y + 0.3 * (u[1] - 0.5)
    return torch.lerp(one, two, (along * (4 + 60 * u[2])).sigmoid())


def ruin(one: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """A sample (1, c, h, w) without its digit: noise, a background, blurred, or scrambled."""
    _, channels, height, width = one.shape
    u = torch.rand(3, generator=generator)
    if kind == 0:  # noise, from fine to smooth
        side = (height, height // 2, height // 4, height // 8)[int(4 * u[0])]
        noise = torch.randn(1, channels, side, side, generator=generator)
        noise = F.interpolate(noise, (height, width), mode="bilinear")
        return (2 * u[1] - 1 + (0.1 + u[2]) * noise).clamp(-1, 1)
    if kind == 1:  # a bare background
        level = np.array(list(LEVELS.values()))[[int(len(LEVELS) * u[0])]]
        texture = np.array([int(len(TEXTURES) * u[1])])
        wave = torch.rand(1, 3, generator=generator).numpy()
        grey = torch.from_numpy(backdrop(level, texture, wave, height))
        return (2 * grey - 1)[:, None].expand_as(one)
    if kind == 2:  # blurred until nothing can be read
        cells = F.adaptive_avg_pool2d(one, (height // 10, width // 10))
        return F.interpolate(cells, (height, width), mode="bilinear")
    side = 8 if kind == 3 else 4  # tiles in another order
    tiles = F.unfold(one, side, stride=side)
    order = torch.randperm(tiles.shape[2], generator=generator)
    return F.fold(tiles[:, :, order], (height, width), side, stride=side)


def roughen(x: Tensor, generator: torch.Generator, bend: float = 1.0) -> Tensor:
    """What scans lack, on (n, c, h, w): other hands, blur and noise.

    Rotation, shear, stretch and a smooth random displacement of about `bend` pixels.
    """
    n, _, height, width = x.shape
    scale = 32 / height  # the displacements are in pixels, whatever the canvas
    affine = torch.eye(2) + 0.1 * bend * torch.randn(n, 2, 2, generator=generator)
    shift = 0.06 * scale * torch.randn(n, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([affine, shift], 2), list(x.shape), align_corners=False)
    coarse = torch.randn(n, 2, height // 8, width // 8, generator=generator)
    waves = F.interpolate(coarse, (height, width), mode="bicubic").movedim(1, -1)
    grid = grid + 0.05 * bend * scale * waves
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, 1.4 * torch.rand(n, 1, 1, 1, generator=generator) - 0.4)
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return (x + strength * torch.randn(x.shape, generator=generator)).clamp(-1.2, 1.2)
