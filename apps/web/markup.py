"""Small pieces of HTML. Everything that a person or a file wrote passes through `text`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    import numpy as np

    from apps.pairs import Pair, Rendered

SMALL = 160  # pixels: pictures up to here are enlarged as they are, without smoothing
COMPUTED, REUSED, AHEAD = (31, 78, 121), (223, 230, 238), (246, 247, 249)
CELL = 8  # pixels of a cell of the map, with its gap
MAX_GAPS = 100  # steps up to which cells have gaps between them
AMPLIFIED = 4  # differences are shown so many times as strong


def text(value: object) -> str:
    """Any value as text that is no markup."""
    return html.escape(str(value), quote=True)


def code(words: str) -> str:
    """Words in which `this` is code."""
    parts = text(words).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def notice(message: str, kind: str = "error") -> str:
    """A sentence that stands out; `kind` is error, warning or info. Nothing for no message."""
    if not message:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="ac-notice ac-{kind}" role="{role}">{text(message)}</div>'


def empty(title: str, hint: str) -> str:
    """What stands where nothing is yet, and what to do about it."""
    title = f'<p class="ac-empty-title">{text(title)}</p>'
    return f'<div class="ac-empty">{title}<p>{text(hint)}</p></div>'


def facts(pairs: Iterable[tuple[str, str]], css: str = "ac-facts") -> str:
    """Names and values; a value is markup already."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="{css}">{rows}</dl>'


def url(path: Path) -> str:
    """Where the browser finds a file of the output folder."""
    return text("gradio_api/file=" + quote(str(path.resolve())))


def medium(rendered: Rendered, alt: str, *, controls: bool = True) -> str:
    """A finished picture or video."""
    if rendered.is_video:
        extra = "controls" if controls else ""
        return (
            f'<video src="{url(rendered.path)}" aria-label="{text(alt)}" {extra} '
            'loop muted playsinline preload="auto"></video>'
        )
    return f'<img src="{url(rendered.path)}" alt="{text(alt)}" class="{_sharp(rendered)}">'


def picture(pixels: np.ndarray, alt: str, css: str = "") -> str:
    """Pixels (h, w, 3) as an image inside the page."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    data = base64.b64encode(target.getvalue()).decode()
    css = css or ("ac-sharp" if max(pixels.shape[:2]) <= SMALL else "")
    return f'<img src="data:image/png;base64,{data}" alt="{text(alt)}" class="{css}">'


def figure(title: str, inside: str, below: str = "") -> str:
    """A framed picture with its name above and facts below."""
    return (
        f'<figure class="ac-figure"><figcaption>{text(title)}</figcaption>'
        f'<div class="ac-frame">{inside}</div>{below}</figure>'
    )


def bar(step: int, steps: int, label: str) -> str:
    """A progress bar with its text."""
    share = 100 * step / steps if steps else 0
    return (
        f'<div class="ac-bar" role="progressbar" aria-label="{text(label)}" aria-valuemin="0" '
        f'aria-valuemax="{steps}" aria-valuenow="{step}"><i style="width:{share:.1f}%"></i></div>'
        f'<p class="ac-bar-text">{text(label)}</p>'
    )


def slider(pair: Pair) -> str:
    """Two pictures on top of each other with a divider that mouse, finger and keys can move."""
    below = medium(pair.baseline, f"{pair.baseline.label}, baseline")
    above = medium(pair.other, f"{pair.other.label}, accelerated")
    return (
        '<div><div class="ac-slider" data-slider style="--cut:50%">'
        f'{below}<div class="ac-over">{above}</div><span class="ac-line" aria-hidden="true"></span>'
        '<input type="range" min="0" max="100" value="50" '
        'aria-label="Divider: baseline left of it, accelerated right of it"></div>'
        '<p class="ac-ends"><span>Baseline</span><span>Accelerated</span></p></div>'
    )


def players(pair: Pair) -> str:
    """Two videos that play in step under one set of controls."""
    videos = "".join(
        figure(title, medium(one, f"{one.label}, {title.lower()}", controls=False))
        for title, one in (("Baseline", pair.baseline), ("Accelerated", pair.other))
    )
    return (
        f'<div class="ac-players" data-players><div class="ac-pair">{videos}</div>'
        '<div class="ac-controls">'
        '<button type="button" data-play aria-pressed="false">Play</button>'
        '<input type="range" data-seek min="0" max="1000" value="0" '
        'aria-label="Position in both videos">'
        '<label>Speed <select data-speed aria-label="Speed of both videos"><option>0.25</option>'
        "<option>0.5</option><option selected>1</option></select></label></div></div>"
    )


def difference(pair: Pair) -> tuple[str, str]:
    """Where two outputs differ (of a video: in its worst frame), and what is shown in words."""
    import numpy as np

    one, two = pair.baseline.frames(), pair.other.frames()
    gaps = np.abs(one.astype(np.int16) - two.astype(np.int16))
    worst = int(gaps.reshape(len(gaps), -1).mean(1).argmax())
    pixels = np.clip(gaps[worst] * AMPLIFIED, 0, 255).astype(np.uint8)
    where = f"frame {worst + 1} of {len(gaps)}, the worst; " if len(gaps) > 1 else ""
    words = f"{where}{AMPLIFIED} times as strong; at most {int(gaps[worst].max())} of 255"
    return picture(pixels, f"Difference of baseline and accelerated: {words}"), words


def heat_map(rows: Sequence[Sequence[int]], steps: int, full: int, alt: str) -> str:
    """Steps from left to right, a line a part; dark is computed in full, light is not computed."""
    import numpy as np

    height = len(rows[0]) if rows else 1
    cells = np.full((height, max(steps, len(rows)), 3), AHEAD, dtype=np.float64)
    for i, row in enumerate(rows):
        share = np.clip(np.asarray(row, dtype=np.float64) / max(full, 1), 0, 1)[:, None]
        cells[:, i] = share * np.asarray(COMPUTED) + (1 - share) * np.asarray(REUSED)
    big = cells.repeat(CELL, axis=0).repeat(CELL, axis=1)
    if cells.shape[1] <= MAX_GAPS:  # finer than the screen shows, gaps would only hide cells
        big[CELL - 1 :: CELL], big[:, CELL - 1 :: CELL] = 255, 255
    return picture(big.astype(np.uint8), alt, "ac-map")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table; cells are markup already."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="ac-scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def details(title: str, inside: str) -> str:
    """Something to open."""
    return f"<details><summary>{text(title)}</summary>{inside}</details>"


def gallery(title: str, cells: Iterable[str]) -> str:
    """Pictures with their names, each a cell of markup."""
    listed = "".join(cells)
    return f'<h2 class="ac-gallery-title">{text(title)}</h2><ul class="ac-gallery">{listed}</ul>'


def data(value: Any) -> str:
    """JSON for reading."""
    import json

    return f"<pre tabindex='0'>{text(json.dumps(value, indent=1, ensure_ascii=False))}</pre>"


def sharpness(path: Path) -> str:
    """The class of a PNG in the page: small ones are enlarged without smoothing."""
    with open(path, "rb") as file:
        head = file.read(24)
    sides = (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    return "ac-sharp" if max(sides) <= SMALL else ""


def _sharp(rendered: Rendered) -> str:
    shape = rendered.content["files"][0].get("shape") or [SMALL + 1]
    return "ac-sharp" if max(shape[:2]) <= SMALL else ""
