"""Pictures of a report as data in the page: small ones exactly, large ones made smaller."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

import numpy as np

from apps.evaluation.frames import rendered

EXACT = 160  # longest side up to which a picture stands in the page as it is
LARGEST = 420  # of others
MOST_AMPLIFIED = 16


@lru_cache(maxsize=64)
def _call(folder: str, stem: str) -> np.ndarray:
    return rendered(Path(folder), stem)


def frame(folder: Path, stem: str, within: int, number: int | None = None) -> np.ndarray:
    """One sample (h, w, 3) of a rendered call; of a video one frame, the middle one by default."""
    sample = _call(str(folder), stem)[within]
    if sample.ndim == 4:
        sample = sample[len(sample) // 2 if number is None else number]
    return sample


def difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """|a - b|, amplified by a power of two so that it shows; and by how much."""
    gap = np.abs(a.astype(int) - b.astype(int))
    factor = 1
    while factor < MOST_AMPLIFIED and 2 * factor * gap.max() <= 255:
        factor *= 2
    return np.clip(factor * gap, 0, 255).astype(np.uint8), factor


def tag(pixels: np.ndarray, words: str) -> str:
    """An <img> with its pixels inside; `words` say what it shows to who cannot see it."""
    from html import escape

    from PIL import Image

    picture = Image.fromarray(pixels)
    target, small = io.BytesIO(), max(picture.size) <= EXACT
    if small:
        picture.save(target, format="PNG", optimize=True)
    else:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(target, format="JPEG", quality=90)
    kind = "png" if small else "jpeg"
    data = base64.b64encode(target.getvalue()).decode()
    style = ' class="small"' if small else ""
    return f'<img{style} alt="{escape(words)}" src="data:image/{kind};base64,{data}">'
