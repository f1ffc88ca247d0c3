"""A schedule as a picture: steps from left to right, a line a column, a colour a letter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from caches.schedule import Schedule, executed

COLOURS = {"C": "#1f4e79", "R": "#dfe6ee", "F": "#f2b661", "S": "#ffffff"}
WORDS = {"C": "computed", "R": "repeated", "F": "forecast", "S": "skipped"}
RESTS = "#f3f3f3"  # a column inside one that does not compute
CELL, MARGIN, LINE = 14, 12, 18


def draw(schedule: Schedule, path: str | os.PathLike[str], title: str = "") -> Path:
    """Write the schedule as PNG; every guidance branch with rows of its own is a panel."""
    font = ImageFont.load_default(12)
    names = [_short(column) for column in schedule.columns]
    left = MARGIN + int(max(font.getlength(name) for name in names)) + 8
    panels = ["", *(name for name, _ in schedule.branches)]
    tall = len(names) * CELL + 2 * LINE
    width = max(left + schedule.steps * CELL + MARGIN, 420)
    height = 2 * LINE + MARGIN + len(panels) * tall + LINE
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    said = title or f"{schedule.steps} steps, {schedule.share():.0%} of the cells computed"
    pen.text((MARGIN, MARGIN // 2), said, "black", font)
    _legend(pen, schedule, font)
    for k, branch in enumerate(panels):
        top = 2 * LINE + MARGIN + k * tall
        if branch:
            pen.text((MARGIN, top - LINE + 2), f"branch {branch}", "black", font)
        for j, name in enumerate(names):
            pen.text((MARGIN, top + j * CELL - 1), name, "#333333", font)
        for i, j, colour in _cells(schedule, branch):
            x, y = left + i * CELL, top + j * CELL
            pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), colour, "#c8ccd0")
        bottom = top + len(names) * CELL + 1
        for i in range(0, schedule.steps, 5):
            pen.text((left + i * CELL, bottom), str(i), "#333333", font)
    target = Path(path)
    image.save(target)
    return target


def _cells(schedule: Schedule, branch: str) -> Iterator[tuple[int, int, str]]:
    asked = {(i, j) for i, j, _ in executed(schedule, branch)}
    for i, row in enumerate(schedule.of_branch(branch)):
        for j, letter in enumerate(row):
            yield i, j, COLOURS[letter] if (i, j) in asked else RESTS


def _legend(pen: ImageDraw.ImageDraw, schedule: Schedule, font: Any) -> None:
    used = "".join("".join(rows) for rows in schedule.tables())
    x = MARGIN
    for letter in (c for c in WORDS if c in used):
        pen.rectangle((x, LINE + 6, x + CELL - 2, LINE + 4 + CELL), COLOURS[letter], "#c8ccd0")
        pen.text((x + CELL + 3, LINE + 4), WORDS[letter], "black", font)
        x += CELL + 16 + int(font.getlength(WORDS[letter]))


def _short(column: str) -> str:
    """ "transformer.transformer_blocks.3.attn1" -> "block 3 attn1"."""
    parts = column.split(".")
    if len(parts) == 1:
        return f"whole {column}"
    names = {
        "transformer_blocks": "block",
        "blocks": "block",
        "single_transformer_blocks": "single",
    }
    return " ".join(names.get(part, part) for part in parts[1:])
