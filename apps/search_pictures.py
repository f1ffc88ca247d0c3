"""What a search leaves to look at: all candidates with their scores, and the score against cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from samplers.search.result import Candidate, SearchResult

PAPER, INK, FAINT, RULE = (250, 249, 246), (28, 28, 30), (120, 118, 114), (222, 219, 212)
GOOD = (20, 110, 70)
TILE, GAP, MARGIN, LINE = 128, 16, 40, 18
COLUMNS, MOST = 8, 96
KINDS = {"render": "renders", "draft": "drafts", "preview": "previews", "baseline": "random draws"}


def candidates_png(result: SearchResult) -> bytes:
    """A contact sheet: rows by purpose, in the order found; the winner is framed."""
    from PIL import Image, ImageDraw

    winner = result.winners[0]
    groups = [
        (kind, shown)
        for kind in KINDS
        if (shown := [c for c in winner.candidates if c.purpose == kind and c.picture is not None])
    ]
    blocks = [(kind, _chosen(shown, winner.best), len(shown)) for kind, shown in groups]
    tile = _tile(blocks[0][1][0].picture) if blocks else (TILE, TILE)
    row = tile[1] + 2 * LINE + GAP
    height = 2 * MARGIN + sum(2 * LINE + row * -(-len(shown) // COLUMNS) for _, shown, _ in blocks)
    width = 2 * MARGIN + COLUMNS * (tile[0] + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN // 2), _title(result), fill=INK, font=_font(20))
    y = MARGIN + LINE
    for kind, shown, count in blocks:
        named = KINDS[kind] if count > 1 else KINDS[kind].removesuffix("s")
        text = f"{count} {named}" + (f", {len(shown)} shown" if len(shown) < count else "")
        draw.text((MARGIN, y), text, fill=FAINT, font=_font(14))
        y += 2 * LINE - 8
        for i, candidate in enumerate(shown):
            x = MARGIN + i % COLUMNS * (tile[0] + GAP)
            _draw(sheet, draw, candidate, (x, y + i // COLUMNS * row), tile, winner.best)
        y += row * -(-len(shown) // COLUMNS) + 8
    return _png(sheet)


def curve_png(result: SearchResult) -> bytes:
    """Scores against evaluations, the best so far as a line; the baseline at random beside it."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    winner = result.winners[0]
    figure = Figure(figsize=(7.2, 4.2), dpi=120, facecolor=_hex(PAPER))
    axes = figure.add_subplot(facecolor=_hex(PAPER))
    styles = {"render": ("#146e46", "o"), "draft": ("#9a6b1f", "s"), "preview": ("#7d8fa3", "."),
              "baseline": ("#8a8884", "x")}  # fmt: skip
    for kind, (colour, mark) in styles.items():
        own = [c for c in winner.candidates if c.purpose == kind and c.score is not None]
        if not own:
            continue
        at = [c.evaluations for c in own]
        if kind == "baseline":  # counted apart: as many as the search took
            each = winner.ledger.by_purpose["baseline"].evaluations / len(own)
            at = [each * (i + 1) for i in range(len(own))]
        scores = [float(c.score or 0) for c in own]
        axes.scatter(at, scores, s=16, color=colour, marker=mark, alpha=0.6, linewidths=1)
        best = np.maximum.accumulate(np.array(scores, dtype=float))
        axes.step(at, best, where="post", color=colour, label=f"best of {KINDS[kind]}")
    axes.set(xlabel="denoiser evaluations", ylabel=result.verifier, title=_title(result))
    axes.title.set_fontsize(10)
    axes.margins(y=0.08)
    axes.set_xlim(left=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _title(result: SearchResult) -> str:
    name = result.search["search"].partition(":")[2]
    winner = result.winners[0]
    spent = winner.ledger.spent().evaluations
    return f"{name} on {result.verifier}: {_said(winner.best)} after {spent} evaluations"


def _chosen(shown: list[Candidate], best: Candidate) -> list[Candidate]:
    """At most MOST of them: the first, and the winner."""
    kept = shown[:MOST]
    if best in shown and best not in kept:
        kept[-1] = best
    return kept


def _draw(
    sheet: Any, draw: Any, candidate: Candidate, at: tuple[int, int], tile: tuple, best: Candidate
) -> None:
    from PIL import Image

    x, y = at
    picture = candidate.picture
    assert picture is not None
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture[..., :3])
    whole = tile[0] % image.width == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    sheet.paste(image.convert("RGB").resize(tile, method), at)
    won = candidate is best
    for grow in range(4 if won else 1):
        box = (x - 1 - grow, y - 1 - grow, x + tile[0] + grow, y + tile[1] + grow)
        draw.rectangle(box, outline=GOOD if won else RULE)
    draw.text((x, y + tile[1] + 5), _said(candidate), fill=GOOD if won else INK, font=_font(13))
    held = " ".join(f"{v:.3g}" for v in candidate.held_out.values() if v is not None)
    held = f"held out {held}" if held else ""
    draw.text((x, y + tile[1] + 5 + LINE), held, fill=FAINT, font=_font(12))


def _said(candidate: Candidate) -> str:
    return "no score" if candidate.score is None else f"{candidate.score:.4g}"


def _tile(picture: Any) -> tuple[int, int]:
    height, width = picture.shape[:2]
    factor = -(-TILE // width) if width < TILE else TILE / width
    return round(width * factor), round(height * factor)


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _png(sheet: Any) -> bytes:
    target = io.BytesIO()
    sheet.save(target, format="PNG", optimize=True)
    return target.getvalue()
