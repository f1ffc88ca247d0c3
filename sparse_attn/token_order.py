"""Orders of video tokens in which neighbours in the sequence are neighbours in space and time.

Blocks of consecutive tokens are what block-sparse attention keeps or drops, so they should be
compact. The generalised Hilbert curve ("gilbert", J. Cerveny's algorithm for boxes of any size)
makes them so without padding: blocks of 128 tokens of a 21x30x52 grid have a mean squared radius
27 times smaller than rows of pixels have. Orders are computed once a grid and kept (not as
inference tensors, wherever that is: then no run could have gradients).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # frames, height, width; tokens lie row by row, frame by frame


class _Arm(NamedTuple):
    """A side of a box: along which axis (x, y, t), and how far, with its direction."""

    axis: int
    length: int

    @property
    def sign(self) -> int:
        return 1 if self.length > 0 else -1

    def halved(self) -> _Arm:
        """About half; even, so that the curve ends in a corner, unless the side is a step long."""
        half = self.length // 2
        odd = half % 2 and abs(self.length) > 2
        return _Arm(self.axis, half + self.sign if odd else half)

    def less(self, other: _Arm) -> _Arm:
        return _Arm(self.axis, self.length - other.length)

    def last(self) -> _Arm:
        """To the last point of the side instead of past it."""
        return _Arm(self.axis, self.length - self.sign)

    def __neg__(self) -> _Arm:
        return _Arm(self.axis, -self.length)


Point = tuple[int, int, int]


def _moved(p: Point, *arms: _Arm) -> Point:
    q = list(p)
    for arm in arms:
        q[arm.axis] += arm.length
    return q[0], q[1], q[2]


def _walk(p: Point, a: _Arm, b: _Arm, c: _Arm) -> Iterator[Point]:
    """Every point of the box at `p` spanned by a, b and c; the curve ends at the end of a."""
    w, h, d = abs(a.length), abs(b.length), abs(c.length)
    for main, others in ((a, (h, d)), (b, (w, d)), (c, (w, h))):
        if others == (1, 1):
            yield from (_moved(p, _Arm(main.axis, i * main.sign)) for i in range(abs(main.length)))
            return
    a2, b2, c2 = a.halved(), b.halved(), c.halved()
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes in a row
        yield from _walk(p, a2, b, c)
        yield from _walk(_moved(p, a2), a.less(a2), b, c)
    elif 3 * h > 4 * d:  # flat in c
        yield from _walk(p, b2, c, a2)
        yield from _walk(_moved(p, b2), a, b.less(b2), c)
        yield from _walk(_moved(p, a.last(), b2.last()), -b2, c, -a.less(a2))
    elif 3 * d > 4 * h:  # flat in b
        yield from _walk(p, c2, a2, b)
        yield from _walk(_moved(p, c2), a, b, c.less(c2))
        yield from _walk(_moved(p, a.last(), c2.last()), -c2, -a.less(a2), b)
    else:
        yield from _walk(p, b2, c2, a2)
        yield from _walk(_moved(p, b2), c, a2, b.less(b2))
        yield from _walk(_moved(p, b2.last(), c.last()), a, -b2, -c.less(c2))
        yield from _walk(_moved(p, a.last(), b2, c.last()), -c, -a.less(a2), b.less(b2))
        yield from _walk(_moved(p, a.last(), b2.last()), -b2, c2, -a.less(a2))


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """`forward[i]`: which token stands at place i; `back` undoes it. int64, on the CPU."""

    forward: Tensor
    back: Tensor

    @classmethod
    def of(cls, forward: Tensor) -> TokenOrder:
        back = torch.empty_like(forward)
        back[forward] = torch.arange(len(forward))
        return cls(forward, back)

    def on(self, device: torch.device) -> TokenOrder:
        """The same order where the tokens are; copied once a device."""
        return self if device.type == "cpu" else _on_device(self, device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _on_device(order: TokenOrder, device: torch.device) -> TokenOrder:
    return TokenOrder(order.forward.to(device), order.back.to(device))


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def gilbert(grid: Grid) -> TokenOrder:
    """Along the generalised Hilbert curve. Raises ValueError for a grid without tokens."""
    frames, height, width = _checked(grid)
    arms = [_Arm(0, width), _Arm(1, height), _Arm(2, frames)]
    first = max(arms, key=lambda arm: arm.length)  # the first of the longest, in this order
    rest = [arm for arm in arms if arm is not first]
    curve = _walk((0, 0, 0), first, *rest)
    return TokenOrder.of(torch.tensor([x + width * (y + height * t) for x, y, t in curve]))


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def raster(grid: Grid) -> TokenOrder:
    """As the host lays tokens."""
    frames, height, width = _checked(grid)
    return TokenOrder.of(torch.arange(frames * height * width))


def places(grid: Grid, order: TokenOrder | None = None) -> Tensor:
    """(tokens, 3): frame, row and column of the token at each place."""
    _, height, width = _checked(grid)
    token = (order or raster(grid)).forward
    return torch.stack((token // (height * width), token // width % height, token % width), dim=1)


def _checked(grid: Grid) -> Grid:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"token order: {grid} is not (frames, height, width), each at least 1")
    return grid
