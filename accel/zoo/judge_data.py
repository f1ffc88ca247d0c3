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

from accel.zoo.loop import step_generator
from accel.zoo.world import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    LEVELS,
    MOTIONS,
    TEXTURES,
    Attributes,
    DigitWorld,
    backdrop,
)

HEADS = {"digit": len(DIGITS), "colour": len(COLOURS), "background": len(BACKGROUNDS)}
VIDEO_HEADS = HEADS | {"motion": len(MOTIONS)}
FRAMES = 5  # of a video, a judge looks at so many
OUTLIERS = 4  # one picture in so many is no digit
VIDEOS = 16  # pictures per video in a batch: a video has 20 times the pixels
RAMP = 600  # steps until pictures are deformed in full; before, digits are learnt sooner
BLENDS = 6  # of the kinds of outliers, the first so many mix two digits; see `mixture`
NEARER = 0.3  # a mixture is at least so far from either digit, by their distance
NO_DIGIT, TURNS, STANDS, JUMPS = range(4)  # of each 8 videos, these are not as the world draws them

Targets = dict[str, Tensor]  # per attribute, (n, classes) probabilities; a row of zeros: not asked


class JudgeLoss:
    """Cross entropies of all heads on fresh pictures, videos, frames of videos and outliers.

    bend: how far pictures are deformed in the end; 1 is what a judge with many scans needs.
    film_every: videos, which cost most, come in one step of so many.
    """

    def __init__(
        self, batch: int, seed: int, device: torch.device, split="train", bend=1.0, film_every=1
    ):
        self.world = DigitWorld(split, seed)
        self.film = DigitWorld(split, seed, canvas=64)
        self.batch, self.seed, self.device = batch, seed, device
        self.bend, self.film_every = bend, film_every

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        x, targets = self.pictures(step, generator)
        loss = cross_entropy(model(x.to(self.device)), targets)
        if step % self.film_every:
            return loss
        x, targets, of_frames = self.videos(step, generator)
        videos, frames = model.training_logits(x.to(self.device))
        return loss + cross_entropy(videos, targets) + cross_entropy(frames, of_frames)

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

    def videos(self, step: int, generator: torch.Generator) -> tuple[Tensor, Targets, Targets]:
        """(n, 3, 5, 64, 64), what to say of them, and of each frame (5n, .)."""
        count = max(4, self.batch // VIDEOS)
        indices = np.arange(step * count, (step + 1) * count)
        films, what = self.film.videos(indices, frames=FRAMES)
        digits = other_digits(what.digit, generator)
        same_but_digit = digits + 10 * what.colour
        twins = signed(self.film.videos(indices, class_ids=same_but_digit, frames=FRAMES)[0])
        x, targets = signed(films), one_hot(what, VIDEO_HEADS)  # x (n, 5 x 3, 64, 64): bent as one
        of_frames = {k: targets[k].repeat_interleave(FRAMES, 0) for k in HEADS}
        kind = torch.from_numpy(indices % 8)
        for row in (kind == TURNS).nonzero().flatten().tolist():
            cut = int(torch.randint(1, FRAMES, (1,), generator=generator))
            x[row, 3 * cut :] = twins[row, 3 * cut :]
            of_frames["digit"][FRAMES * row + cut : FRAMES * (row + 1)] = one_digit(digits[row])
        for row in ((kind == STANDS) | (kind == JUMPS)).nonzero().flatten().tolist():
            order = _standing(generator) if kind[row] == STANDS else _jumping(generator)
            x[row] = x[row].unflatten(0, (FRAMES, 3))[order].flatten(0, 1)
        none = kind == NO_DIGIT
        if none.any():
            x[none] = non_digits(x[none], twins[none], generator)
        disown(targets, none)
        disown(of_frames, none.repeat_interleave(FRAMES))
        targets["digit"][kind == TURNS] = 1 / len(DIGITS)
        targets["motion"][(kind == STANDS) | (kind == JUMPS)] = 1 / len(MOTIONS)
        bend = self.bend * min(1, step / RAMP)
        x = roughen(x, generator, bend).unflatten(1, (FRAMES, 3)).transpose(1, 2)
        return x, targets, of_frames


def cross_entropy(logits: dict[str, Tensor], targets: Targets) -> Tensor:
    """Sum over the attributes, mean over the samples; in nats."""
    losses = [
        -(targets[k].to(v.device) * v.float().log_softmax(1)).sum(1).mean()
        for k, v in logits.items()
    ]
    return torch.stack(losses).sum()


def signed(samples: np.ndarray) -> Tensor:
    """(n, h, w, 3) or (n, f, h, w, 3) uint8 -> (n, 3, h, w) or (n, f x 3, h, w) in -1..1."""
    x = torch.from_numpy(samples).movedim(-1, -3).float() / 127.5 - 1
    return x.flatten(1, -3).contiguous()


def one_hot(what: Attributes, heads: dict[str, int]) -> Targets:
    """The truth as targets."""
    return {k: F.one_hot(torch.from_numpy(getattr(what, k)), n).float() for k, n in heads.items()}


def one_digit(digit: int) -> Tensor:
    """(10,): sure of one digit."""
    return torch.eye(len(DIGITS))[int(digit)]


def disown(targets: Targets, rows: Tensor) -> None:
    """Makes rows (n,) bool those of no digit: any digit alike, and nothing else is asked."""
    for target in targets.values():
        target[rows] = 0
    targets["digit"][rows] = 1 / len(DIGITS)


def other_digits(digits: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """For each digit (n,) another one, all nine alike."""
    return (digits + torch.randint(1, 10, (len(digits),), generator=generator).numpy()) % 10


def _standing(generator: torch.Generator) -> Tensor:
    """One frame five times."""
    return torch.randint(FRAMES, (1,), generator=generator).expand(FRAMES)


def _jumping(generator: torch.Generator) -> Tensor:
    """An order of the five frames without a direction: it has no or little trend."""
    middle = torch.arange(FRAMES) - (FRAMES - 1) / 2
    while True:
        order = torch.randperm(FRAMES, generator=generator)
        if abs((middle * order).sum()) <= 2:  # of 10 for constant speed
            return order


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
