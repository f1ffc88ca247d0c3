"""A contact sheet: the same jobs in several renders, one row each, one column per job.

Small pictures are enlarged by whole factors without smoothing, so that what you see are the pixels
that were rendered. Under every accelerated picture: its time and its PSNR against the baseline.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.files import write_atomically
from apps.pairs import Pair, Rendered, finished, median_seconds, pair

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

PAPER, INK, FAINT, RULE = (250, 249, 246), (28, 28, 30), (120, 118, 114), (222, 219, 212)
GOOD = (20, 110, 70)
TILE = 128  # a tile is at least this wide, by whole enlargement, or exactly, by reduction
GAP, MARGIN, HEADER = 18, 48, 250
MAX_COLUMNS = 12
LINE = 20


@dataclass(frozen=True)
class Cell:
    """A picture with its lines of caption; `strong` is printed in the accent colour."""

    rendered: Rendered
    caption: str
    strong: str


@dataclass(frozen=True)
class Row:
    """A render: its name, what is said about it, and a cell per job (None: not rendered)."""

    name: str
    facts: Sequence[str]
    cells: Sequence[Cell | None]


def write_sheet(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    speeds: Mapping[str, str] | None = None,
) -> int:
    """Compose the sheet of `folders` (the first is the baseline); return the number of jobs.

    Args:
        speeds: what to say of a folder's speed, by folder name, where it was measured better than
            by the times recorded in its sidecars.

    Raises:
        ValueError: a folder holds no finished render, or shares no job with the baseline.
    """
    jobs, rows = build_rows(folders, speeds or {})
    picture = compose(jobs, rows, title or f"{folders[0].name} and {len(rows) - 1} more")
    target = io.BytesIO()
    picture.save(target, format="PNG", optimize=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, target.getvalue())
    return len(jobs)


def build_rows(
    folders: Sequence[Path], speeds: Mapping[str, str]
) -> tuple[list[Rendered], list[Row]]:
    """The baseline's jobs, and a row per folder."""
    baseline = finished(folders[0])
    rows = [_baseline_row(folders[0].name, baseline)]
    for folder in folders[1:]:
        pairs = pair(baseline, finished(folder))
        rows.append(_compared_row(folder.name, baseline, pairs, speeds.get(folder.name)))
    return baseline, rows


def compose(jobs: Sequence[Rendered], rows: Sequence[Row], title: str) -> Image.Image:
    """Draw the sheet; wide ones are broken into bands of MAX_COLUMNS jobs."""
    from PIL import Image, ImageDraw

    bands = [range(i, min(i + MAX_COLUMNS, len(jobs))) for i in range(0, len(jobs), MAX_COLUMNS)]
    tile = max(_tile_size(job) for job in jobs[:1])
    row_height = tile[1] + 2 * LINE + GAP
    band_height = 3 * LINE + len(rows) * row_height + GAP
    width = 2 * MARGIN + HEADER + len(bands[0]) * (tile[0] + GAP) - GAP
    top = MARGIN + 4 * LINE
    height = top + len(bands) * band_height + MARGIN // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=_font(32))
    _rule(draw, width, MARGIN + 3 * LINE)
    for number, band in enumerate(bands):
        y = top + number * band_height
        _draw_heads(draw, [jobs[i] for i in band], tile[0], y)
        for index, row in enumerate(rows):
            cells = [row.cells[i] for i in band]
            _draw_row(sheet, draw, row, cells, tile, y + 3 * LINE + index * row_height)
    return sheet


def _baseline_row(name: str, rendered: list[Rendered]) -> Row:
    cells = [Cell(r, shown(r.seconds), "") for r in rendered]
    facts = [f"{shown(median_seconds(rendered))} each (median)", evaluations(rendered)]
    return Row(name, facts, cells)


def _compared_row(name: str, baseline: list[Rendered], pairs: list[Pair], speed: str | None) -> Row:
    by_key = {p.baseline.key: p for p in pairs}
    cells = [_cell(by_key[job.key]) if job.key in by_key else None for job in baseline]
    if speed is None:
        recorded = shown(median_seconds([p.other for p in pairs]))
        speed = f"{recorded} each (median), {statistics.median(p.speed_up for p in pairs):.2f}x"
    ssim = statistics.mean(p.ssim for p in pairs)
    facts = [
        speed,
        evaluations([p.other for p in pairs]),
        f"PSNR {mean_psnr(pairs)}, SSIM {ssim:.3f}",
    ]
    return Row(name, facts, cells)


def evaluations(rendered: Sequence[Rendered]) -> str:
    """How many network evaluations a job took, in words (median over jobs that were counted)."""
    counted = [r.evaluations for r in rendered if r.evaluations is not None]
    return f"{statistics.median(counted):.0f} evaluations each" if counted else "not counted"


def shown(seconds: float) -> str:
    """A time for people: `85 ms`, `1.25 s`."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def mean_psnr(pairs: Sequence[Pair]) -> str:
    """Mean PSNR in words: identical pictures have none and are counted apart."""
    values = [p.psnr for p in pairs if p.psnr is not None]
    same = len(pairs) - len(values)
    if not values:
        return "identical"
    return f"{statistics.mean(values):.1f} dB" + (f" ({same} identical)" if same else "")


def _cell(found: Pair) -> Cell:
    quality = "identical" if found.psnr is None else f"{found.psnr:.1f} dB"
    return Cell(found.other, shown(found.other.seconds), quality)


def _draw_heads(draw: ImageDraw.ImageDraw, jobs: Sequence[Rendered], width: int, y: int) -> None:
    for column, job in enumerate(jobs):
        x = MARGIN + HEADER + column * (width + GAP)
        draw.text((x, y), _fit(job.label, _font(16), width), fill=INK, font=_font(16))
        draw.text((x, y + LINE), f"seed {job.seed}", fill=FAINT, font=_font(13))


def _draw_row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: Row,
    cells: Sequence[Cell | None],
    tile: tuple[int, int],
    y: int,
) -> None:
    name = _fit(row.name, _font(20), HEADER - GAP)
    draw.text((MARGIN, y + tile[1] // 2 - 2 * LINE), name, fill=INK, font=_font(20))
    for number, fact in enumerate(row.facts):
        place = (MARGIN, y + tile[1] // 2 - LINE // 2 + number * LINE)
        draw.text(place, _fit(fact, _font(14), HEADER - GAP), fill=FAINT, font=_font(14))
    for column, cell in enumerate(cells):
        x = MARGIN + HEADER + column * (tile[0] + GAP)
        if cell is None:
            draw.rectangle((x, y, x + tile[0] - 1, y + tile[1] - 1), outline=RULE)
            continue
        sheet.paste(_enlarged(cell.rendered, tile), (x, y))
        draw.rectangle((x - 1, y - 1, x + tile[0], y + tile[1]), outline=RULE)
        below = y + tile[1] + 4
        draw.text((x, below), cell.caption, fill=FAINT, font=_font(13))
        end = x + tile[0] - draw.textlength(cell.strong, font=_font(13))
        draw.text((end, below), cell.strong, fill=GOOD, font=_font(13))


def _tile_size(job: Rendered) -> tuple[int, int]:
    height, width = job.picture().shape[:2]
    if width >= TILE:
        return TILE * 2, max(1, round(height * TILE * 2 / width))
    factor = -(-TILE // width)
    return width * factor, height * factor


def _enlarged(job: Rendered, tile: tuple[int, int]) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(job.picture())
    whole = tile[0] % picture.width == 0 and tile[1] % picture.height == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return picture.resize(tile, method)


def _fit(text: str, font: Any, width: int) -> str:
    """Cut a text with an ellipsis so that it is at most `width` pixels long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _rule(draw: ImageDraw.ImageDraw, width: int, y: int) -> None:
    draw.line((MARGIN, y, width - MARGIN, y), fill=RULE, width=1)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
