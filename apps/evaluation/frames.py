"""What was rendered, as exact 8-bit frames: PNG and .npz keep them, an mp4 would not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from apps.render.media import decode_png, decode_raw
from apps.render.outputs import read_sidecar

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def rendered(folder: Path, stem: str, identity: str | None = None) -> np.ndarray:
    """All samples of one finished render: uint8 (n, h, w, 3) or (n, f, h, w, 3).

    Raises:
        ValueError: not there, or of another identity than was asked for.
    """
    content = read_sidecar(folder / f"{stem}.json")
    if content is None or identity not in (None, content["identity"]):
        raise ValueError(f"{folder}: {stem} is not rendered, or was rendered for another job")
    names = [file["name"] for file in content["files"]]
    exact = [n for n in names if n.endswith(".npz")] or [n for n in names if n.endswith(".png")]
    if not exact:
        raise ValueError(f"{folder}: {stem} has no exact frames; an mp4 alone is not compared")
    return np.stack([coloured(read_exact(folder / name)) for name in exact])


def read_exact(path: Path) -> np.ndarray:
    return decode_raw(path) if path.suffix == ".npz" else decode_png(path)


def coloured(frames: np.ndarray) -> np.ndarray:
    """Three channels: grey repeated, transparency dropped."""
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames[..., :3]


def pictures(folder: Path, batch: int = 32) -> Iterator[np.ndarray]:
    """The pictures of a folder in order of their names, some of one size at a time.

    Raises ValueError if there is none.
    """
    from PIL import Image

    paths = require_pictures(folder)
    held: list[np.ndarray] = []
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        if held and (pixels.shape != held[0].shape or len(held) == batch):
            yield np.stack(held)
            held = []
        held.append(pixels)
    yield np.stack(held)


def pictures_sha256(folder: Path) -> str:
    """Of names, sizes and times of change of a folder's pictures: others have another."""
    stats = [(path.name, path.stat()) for path in require_pictures(folder)]
    rows = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in stats]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def require_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, by name. Raises ValueError if there is none."""
    files = folder.iterdir() if folder.is_dir() else ()
    paths = sorted(p for p in files if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder}: no pictures ({', '.join(PICTURES)}) there")
    return paths
