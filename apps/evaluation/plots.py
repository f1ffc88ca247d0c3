"""Plots as SVG text, drawn here: they scale, follow the page's colours, and need nothing.

Widths are in units of a phone's screen, so that letters stay legible there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 460
COLOURS = 8  # classes c0 .. c7 of the page's style
LETTER, BOLD = 6.4, 7.4  # mean width of a letter of 12 units


class Point(NamedTuple):
    """One recipe in a plane; x and y are intervals {estimate, low, high}."""

    name: str
    x: dict[str, float]
    y: dict[str, float]


def pareto(points: Sequence[Point], x_label: str, y_label: str, *, higher: bool) -> str:
    """Each recipe with both intervals; what no other one beats in both is joined by a line."""
    height, left, right, top, bottom = 330, 48, 14, 14, 44
    xs = [p.x[k] for p in points for k in ("low", "high", "estimate")]
    ys = [p.y[k] for p in points for k in ("low", "high", "estimate")]
    x_scale = _Scale.of([*xs, 1.0], left, WIDTH - right)
    y_scale = _Scale.of(ys, height - bottom, top)
    parts = _grid(x_scale, y_scale, height, left, right, top, bottom)
    front = sorted(_front(points, higher), key=lambda p: p.x["estimate"])
    line = " ".join(f"{x_scale(p.x['estimate']):.1f},{y_scale(p.y['estimate']):.1f}" for p in front)
    if len(front) > 1:
        parts.append(f'<polyline class="front" points="{line}"/>')
    taken: list[tuple[float, float, float]] = []
    for i, point in enumerate(points):
        x, y = x_scale(point.x["estimate"]), y_scale(point.y["estimate"])
        ends = [x_scale(point.x[k]) for k in ("low", "high")]
        rise = [y_scale(point.y[k]) for k in ("low", "high")]
        parts.append(
            f'<g class="c{i % COLOURS}"><line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><line x1="{x:.1f}" x2="{x:.1f}" y1="{rise[0]:.1f}" '
            f'y2="{rise[1]:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
        parts.append(_placed_name(point.name, x, y, taken))
    parts.append(f'<text class="axis" x="{(left + WIDTH - right) / 2}" y="{height - 6}" '
                 f'text-anchor="middle">{escape(x_label)}</text>')  # fmt: skip
    parts.append(f'<text class="axis" transform="translate(12 {(top + height - bottom) / 2}) '
                 f'rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')  # fmt: skip
    return _svg(height, parts, f"{y_label} against {x_label}")


class Bar(NamedTuple):
    """colour: number of the recipe, as in the other plots; None for what it is compared with."""

    name: str
    value: dict[str, float]
    words: str
    colour: int | None


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars with whiskers, and words after each."""
    step, top = 38, 6
    height = top + step * len(rows) + 26
    room = max(len(row.words) for row in rows) * BOLD + 14
    scale = _Scale(0.0, max(row.value["high"] for row in rows) or 1.0, 2, WIDTH - room)
    parts = []
    for i, (name, value, words, colour) in enumerate(rows):
        y, end = top + step * i, scale(value["estimate"])
        parts.append(f'<text x="2" y="{y + 11}">{escape(name)}</text>')
        kind = "base" if colour is None else f"c{colour % COLOURS}"
        parts.append(f'<rect class="{kind}" x="2" y="{y + 16}" width="{max(end - 2, 1):.1f}" '
                     'height="14" rx="2"/>')  # fmt: skip
        low, high = scale(value["low"]), scale(value["high"])
        if high - low > 1:
            parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 23}" '
                         f'y2="{y + 23}"/>')  # fmt: skip
        parts.append(f'<text class="strong" x="{max(high, end) + 6:.1f}" y="{y + 27}">'
                     f"{escape(words)}</text>")  # fmt: skip
    parts.append(f'<text class="axis" x="2" y="{height - 6}">{escape(label)}</text>')
    return _svg(height, parts, label)


def strips(rows: Sequence[tuple[str, Sequence[float]]], label: str, marks: dict[str, float]) -> str:
    """A dot a sample, one strip a row, with the median; `marks` are named lines across."""
    step, top, left, right = 46, 20, 8, 10
    height = top + step * len(rows) + 40
    values = [x for _, row in rows for x in row]
    scale = _Scale.of([*values, *marks.values()], left, WIDTH - right)
    bottom = top + step * len(rows)
    parts = [
        f'<line class="grid" x1="{scale(t):.1f}" x2="{scale(t):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{scale(t):.1f}" y="{bottom + 14}" text-anchor="middle">{t:g}</text>'
        for t in scale.ticks(6)
    ]
    for name, value in marks.items():
        x = scale(value)
        anchor = "start" if x < WIDTH / 2 else "end"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="{top - 8}" text-anchor="{anchor}">'
            f"{escape(name)}</text>"
        )
    for i, (name, row) in enumerate(rows):
        y = top + step * i
        parts.append(f'<text x="{left}" y="{y + 13}">{escape(name)}</text>')
        kept = _thinned(row, 400)
        dots = "".join(
            f'<circle cx="{scale(x):.1f}" cy="{y + 30 + _jitter(j):.1f}" r="2"/>'
            for j, x in enumerate(kept)
        )
        middle = scale(sorted(row)[len(row) // 2])
        parts.append(
            f'<g class="c{i % COLOURS} dots">{dots}</g><line class="median" x1="{middle:.1f}" '
            f'x2="{middle:.1f}" y1="{y + 20}" y2="{y + 40}"/>'
        )
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">'
                 f"{escape(label)}</text>")  # fmt: skip
    return _svg(height, parts, label)


def curve(values: Sequence[float], label: str) -> str:
    """A small line over frames, with its range."""
    width, height = 170, 44
    x = _Scale(0.0, max(len(values) - 1, 1), 4, width - 4)
    y = _Scale.of(list(values), height - 14, 4)
    line = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
    text = f"{label}: {min(values):.1f} to {max(values):.1f}"
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(text)}">'
        f'<polyline class="front" points="{line}"/>'
        f'<text class="tick" x="4" y="{height - 2}">{escape(text)}</text></svg>'
    )


class _Scale(NamedTuple):
    """From values to places on the page."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        """With a margin around the values, and never of no width."""
        low, high = min(values), max(values)
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round values inside, about so many."""
        raw = (self.high - self.low) / about
        size = 10 ** math.floor(math.log10(raw))
        step = next(f * size for f in (1, 2, 5, 10) if f * size >= raw)
        first = math.ceil(self.low / step)
        count = int(math.floor(self.high / step) - first) + 1
        return [round((first + i) * step, 10) for i in range(count)]


def _grid(x: _Scale, y: _Scale, height: int, left: int, right: int, top: int, bottom: int) -> list:
    parts = []
    for tick in x.ticks(6):
        place = f"{x(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{place}" x2="{place}" y1="{top}" y2="{height - bottom}"/>'
            f'<text class="tick" x="{place}" y="{height - bottom + 14}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for tick in y.ticks(6):
        place = f"{y(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{place}" y2="{place}"/>'
            f'<text class="tick" x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{tick:g}</text>"
        )
    return parts


def _front(points: Sequence[Point], higher: bool) -> list[Point]:
    """Those that no other one beats in speed and in quality."""
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(
            q is not p
            and q.x["estimate"] >= p.x["estimate"]
            and sign * q.y["estimate"] >= sign * p.y["estimate"]
            for q in points
        )

    return [p for p in points if not beaten(p)]


def _placed_name(name: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """A name beside its dot, inside the plot, where no other name is."""
    width = len(name) * LETTER
    right = x + 9 + width <= WIDTH
    start = x + 9 if right else max(x - 9 - width, 2)
    place = y - 8
    for offset in (-8, 16, -22, 30, -36, 44):
        place = y + offset
        if not any(
            abs(place - other) < 13 and start < end and begin < start + width
            for begin, end, other in taken
        ):
            break
    taken.append((start, start + width, place))
    return f'<text x="{start:.1f}" y="{place:.1f}">{escape(name)}</text>'


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """All extremes and, evenly by rank, so many others."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    ends = 20
    step = (len(ordered) - 2 * ends) / (most - 2 * ends)
    middle = [ordered[ends + int(i * step)] for i in range(most - 2 * ends)]
    return [*ordered[:ends], *middle, *ordered[-ends:]]


def _jitter(i: int) -> float:
    """-8 to 8, spread evenly: the golden ratio's fractions."""
    return 16 * ((i * 0.6180339887) % 1) - 8


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
