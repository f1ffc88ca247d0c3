"""DigitWorld: real handwritten digits, coloured, on plain or gently textured backgrounds.

The one world that every embedded model is trained on. Handwriting comes from scikit-learn's 1,797
scans (8x8, from the UCI collection); everything else is drawn here, so the exact attributes of each
sample are known. A sample is a pure function of (split, seed, index): no state, no order, no global
randomness, so that training can be resumed from an integer and any machine draws the same picture.

Three disjoint sets of scans: `train` for generators and the judge, `heldout` for accuracies, and
`referee` for a second judge that has seen nothing else. Scans are split one by one, not by writer
(the collection does not name writers).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Saturated colours that people name alike, apart from each other and from every grey.
PALETTE = {
    "red": (215, 20, 30),
    "orange": (255, 125, 0),
    "yellow": (250, 215, 0),
    "lime": (140, 230, 40),
    "green": (0, 140, 60),
    "cyan": (0, 205, 225),
    "blue": (40, 80, 245),
    "purple": (145, 45, 200),
    "pink": (255, 120, 190),
    "brown": (145, 80, 25),
}
COLOURS = tuple(PALETTE)
# Mean level of the background, 0 black to 1 white; gaps are wide: the name is never in doubt.
LEVELS = {"black": 0.02, "dark": 0.24, "grey": 0.5, "bright": 0.76, "white": 0.98}
BACKGROUNDS = tuple(LEVELS)
LEVEL_JITTER = 0.04  # uniform, either side of the level
TEXTURES = ("plain", "gradient", "stripes", "waves")
TEXTURE_AMPLITUDE = 0.06  # of the full range, either side of the level
# Direction of movement as (x, y) on the screen, y downwards.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = tuple(DIRECTIONS)
SPLITS = {"train": 1077, "referee": 420, "heldout": 300}

NULL_CLASS = 1000  # stock DiTPipeline hard-codes it as "no class"
_DRAWS = 12  # uniform numbers per sample; fixed, so that new attributes do not move the old ones
_MOTION_DRAWS = 4  # further ones per video
_MOTION_STREAM = 0x5EED_0000  # added to the stream of a split, so that they are other numbers
VIDEO_FRAMES = 17  # 1 + 4 x 4: five latent frames of a video autoencoder
VIDEO_CANVAS = 64
VIDEO_TRAVEL = 16  # pixels that a digit moves in a video


@dataclass(frozen=True)
class Attributes:
    """What is in each of n samples: integer arrays of shape (n,), indices into the name tuples."""

    digit: np.ndarray
    colour: np.ndarray
    background: np.ndarray
    texture: np.ndarray
    scan: np.ndarray  # row of scikit-learn's `load_digits`
    motion: np.ndarray | None = None  # of videos: index into MOTIONS

    @property
    def class_id(self) -> np.ndarray:
        """Class of digits-dit: digit + 10 x colour."""
        return self.digit + 10 * self.colour

    def captions(self) -> list[str]:
        """One sentence per sample, by the grammar of `caption`."""
        motions = [None] * len(self.digit) if self.motion is None else self.motion
        return [
            caption(*row)
            for row in zip(self.digit, self.colour, self.background, motions, strict=True)
        ]


def caption(digit: int, colour: int, background: int, motion: int | None = None) -> str:
    """ "a red three on a dark background"; with a motion, "a red three moving left on ..."."""
    moving = "" if motion is None else f" moving {MOTIONS[motion]}"
    article = "an" if COLOURS[colour][0] in "aeiou" else "a"
    ground = BACKGROUNDS[background]
    return f"{article} {COLOURS[colour]} {DIGITS[digit]}{moving} on a {ground} background"


def named(prompt: str) -> dict[str, int]:
    """Attributes that a caption names, as indices; one that it names twice or not is left out."""
    words = prompt.lower().replace(".", " ").replace(",", " ").split()
    known = {"digit": DIGITS, "colour": COLOURS, "background": BACKGROUNDS, "motion": MOTIONS}
    found = {k: [names.index(w) for w in words if w in names] for k, names in known.items()}
    return {k: v[0] for k, v in found.items() if len(v) == 1}


def class_label(class_id: int) -> str:
    """Name of a class of digits-dit, such as "red three"."""
    return f"{COLOURS[class_id // 10]} {DIGITS[class_id % 10]}"


def uniforms(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Counter-based random numbers: (n, count) in [0, 1), each a hash of (seed, index, column).

    SplitMix64 finaliser (Steele, Lea and Flood 2014), so row i never depends on the other rows.
    """
    columns = np.arange(count, dtype=np.uint64)
    z = np.asarray(indices, dtype=np.uint64)[:, None] * np.uint64(count) + columns
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = _mix(z ^ _mix(np.full((1, 1), seed, dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All handwriting: ink (1797, 8, 8) float32 in 0..1, and the digits (1797,).

    Raises ImportError with the remedy where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("DigitWorld needs scikit-learn: pip install -e '.[zoo]'") from error
    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@cache
def split_scans(split: str) -> np.ndarray:
    """Rows of `scans()` in one split, every digit equally represented up to one scan.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"DigitWorld: unknown split {split!r}; known: {', '.join(SPLITS)}")
    digits = scans()[1]
    order = np.random.default_rng(1797).permutation(len(digits))
    # Rank of each scan within its digit, so that every contiguous part is balanced.
    rank = np.empty(len(digits))
    for digit in range(10):
        rows = order[digits[order] == digit]
        rank[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = order[np.argsort(rank[order], kind="stable")]
    start = 0
    for name, count in SPLITS.items():
        if name == split:
            return np.sort(order[start : start + count])
        start += count
    raise AssertionError("unreachable")


def ink(glyphs: np.ndarray, centre: np.ndarray, size: np.ndarray, canvas: int) -> np.ndarray:
    """Handwriting placed on a canvas: opacity (n, canvas, canvas) in 0..1.

    glyphs (n, 8, 8); centre (n, 2) as x, y in pixels; size (n,) side in pixels of the 8x8 scan.
    Cubic interpolation at sub-pixel positions, then a soft threshold that makes strokes crisp.
    """
    across = _cubic_weights(centre[:, 0], size, canvas)  # (n, canvas, 8)
    down = _cubic_weights(centre[:, 1], size, canvas)
    smooth = down @ glyphs @ across.transpose(0, 2, 1)
    edge = np.clip((smooth - 0.32) / 0.40, 0.0, 1.0)
    return edge * edge * (3.0 - 2.0 * edge)


def _cubic_weights(centre: np.ndarray, size: np.ndarray, canvas: int) -> np.ndarray:
    """Interpolation matrix (n, canvas, 8) of Keys' cubic kernel, a = -1/2; zero outside."""
    pixel = np.arange(canvas) + 0.5
    at = (pixel - (centre - size / 2)[:, None]) * (8.0 / size)[:, None] - 0.5  # in scan cells
    t = np.abs(at[:, :, None] - np.arange(8)).astype(np.float32)
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return np.where(t < 1, near, np.where(t < 2, far, 0.0)).astype(np.float32)


def backdrop(level: np.ndarray, texture: np.ndarray, wave: np.ndarray, canvas: int) -> np.ndarray:
    """Grey backgrounds (n, canvas, canvas) in 0..1.

    level (n,); texture (n,) index into TEXTURES; wave (n, 3) uniforms: angle, frequency, phase.
    """
    angle = 2 * np.pi * wave[:, 0, None, None]
    axis = ((np.arange(canvas) + 0.5) / canvas - 0.5).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]
    along = np.cos(angle) * x + np.sin(angle) * y  # -0.7..0.7
    cycles = np.where(texture == TEXTURES.index("stripes"), 2.0, 0.8) * (1 + wave[:, 1])
    phase = 2 * np.pi * (along * cycles[:, None, None] + wave[:, 2, None, None])
    kind = texture[:, None, None]
    pattern = np.where(kind == TEXTURES.index("gradient"), 2 * along, np.sin(phase))
    pattern = np.where(kind == TEXTURES.index("plain"), 0.0, pattern)
    return np.clip(level[:, None, None] + TEXTURE_AMPLITUDE * pattern, 0, 1).astype(np.float32)


class DigitWorld:
    """Endless labelled pictures of one split.

    split: "train", "heldout" or "referee"; seed: another seed is another endless sequence;
    canvas: side of the square picture in pixels; plain: every digit has the middle size, in the
    middle of an untextured background. Raises ValueError for what it does not know.
    """

    def __init__(
        self, split: str = "train", seed: int = 0, canvas: int = 32, *, plain: bool = False
    ):
        self.split, self.seed, self.canvas, self.plain = split, seed, canvas, plain
        rows = split_scans(split)
        digits = scans()[1][rows]
        self._stream = seed * len(SPLITS) + list(SPLITS).index(split)
        self._by_digit = [rows[digits == digit] for digit in range(10)]

    def attributes(self, indices, class_ids=None, backgrounds=None) -> Attributes:
        """What samples `indices` (n,) contain; `class_ids` or `backgrounds` (n,) fix those."""
        return self._attributes(self._uniforms(indices), class_ids, backgrounds)

    def video_attributes(
        self, indices, class_ids=None, backgrounds=None, motions=None
    ) -> Attributes:
        """What videos `indices` (n,) contain; the others (n,) fix that."""
        drawn = _pick(self._motion_uniforms(indices)[:, 0], len(MOTIONS))
        motion = drawn if motions is None else np.asarray(motions)
        return replace(self.attributes(indices, class_ids, backgrounds), motion=motion)

    def batch(self, indices, class_ids=None, backgrounds=None) -> tuple[np.ndarray, Attributes]:
        """Pictures (n, canvas, canvas, 3) uint8 RGB, and what they contain."""
        u = self._uniforms(indices)
        what = self._attributes(u, class_ids, backgrounds)
        size = self.canvas * (22 + 5 * u[:, 5]) / 32  # 22 to 27 of 32 pixels
        centre = self.canvas * (0.5 + (4 * u[:, 6:8] - 2) / 32)  # 2 of 32 pixels either way
        return self._draw(what, u, size, centre), what

    def videos(
        self, indices, class_ids=None, backgrounds=None, motions=None, frames: int = VIDEO_FRAMES
    ) -> tuple[np.ndarray, Attributes]:
        """Videos (n, frames, canvas, canvas, 3) uint8 RGB of a digit that moves, and their content.

        The digit is as large as in a picture of 32 pixels and moves 16 pixels in a straight line at
        constant speed, whatever the number of frames; the background stands still. In 17 frames
        that is one pixel a frame: a digit looks the same in all of them, and, where four frames
        and four pixels make one cell of a video autoencoder, in every cell that it enters.
        """
        u, v = self._uniforms(indices), self._motion_uniforms(indices)
        what = self.video_attributes(indices, class_ids, backgrounds, motions)
        size = 22 + 5 * u[:, 5]
        way = np.array(list(DIRECTIONS.values()), dtype=np.float64)[what.motion]  # (n, 2)
        middle = self.canvas / 2 + (2 * v[:, 2:4] - 1) * np.where(way == 0, 7.0, 2.0)
        reach = VIDEO_TRAVEL / 2 * way
        parts = np.linspace(-1, 1, frames) if frames > 1 else np.zeros(1)
        pictures = [self._draw(what, u, size, middle + part * reach) for part in parts]
        return np.stack(pictures, axis=1), what

    def sample(self, index: int) -> tuple[np.ndarray, Attributes]:
        """One picture (canvas, canvas, 3) uint8 RGB; its attributes have shape (1,)."""
        images, what = self.batch(np.array([index]))
        return images[0], what

    def _draw(self, what: Attributes, u, size, centre) -> np.ndarray:
        """The picture of each row; a video is the same rows at several centres."""
        opacity = ink(scans()[0][what.scan], centre, size, self.canvas)[..., None]
        levels = np.array(list(LEVELS.values()))[what.background]
        levels = np.clip(levels + LEVEL_JITTER * (2 * u[:, 8] - 1), 0, 1)
        grey = backdrop(levels, what.texture, u[:, 9:12], self.canvas)[..., None]
        colours = np.array(list(PALETTE.values()), dtype=np.float32)[what.colour] / 255
        mixed = grey * (1 - opacity) + colours[:, None, None, :] * opacity
        return np.round(mixed * 255).astype(np.uint8)

    def _motion_uniforms(self, indices) -> np.ndarray:
        stream = self._stream + _MOTION_STREAM
        return uniforms(stream, np.atleast_1d(np.asarray(indices)), _MOTION_DRAWS)

    def _uniforms(self, indices) -> np.ndarray:
        u = uniforms(self._stream, np.atleast_1d(np.asarray(indices)), _DRAWS)
        if self.plain:
            u[:, 2], u[:, 5:8] = 0.0, 0.5  # texture; size, x and y
        return u

    def _attributes(self, u, class_ids, backgrounds) -> Attributes:
        classes = _pick(u[:, 0], 100) if class_ids is None else np.asarray(class_ids)
        ground = _pick(u[:, 1], len(LEVELS)) if backgrounds is None else np.asarray(backgrounds)
        # Half of the backgrounds are plain.
        texture = np.where(u[:, 2] < 0.5, 0, 1 + _pick(u[:, 3], len(TEXTURES) - 1))
        digit = classes % 10
        counts = np.array([len(rows) for rows in self._by_digit])[digit]
        which = np.minimum((u[:, 4] * counts).astype(np.int64), counts - 1)
        scan = np.array(
            [self._by_digit[d][w] for d, w in zip(digit, which, strict=True)], dtype=np.int64
        )
        return Attributes(digit, classes // 10, ground, texture, scan)


def _pick(u: np.ndarray, count: int) -> np.ndarray:
    return np.minimum((u * count).astype(np.int64), count - 1)
