"""The finished files of a task: media first, then the sidecar, which is the commit record.

Tasks of other kinds than rendering write arrays (.npz) and figures in the same way.

A sidecar `<stem>.json` on disk means that the files it lists are complete. Whatever dies in
between, a task without a matching sidecar is simply not done, and its files are written again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.files import remove, write_atomically
from apps.render.media import encode_mp4, encode_png, encode_raw, frames_sha256
from apps.render.naming import stem_problem

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
SUFFIXES = (".png", ".mp4", ".npz")
FIGURES = "figures"  # key of what a task found out; it may have no files then


@dataclass(frozen=True)
class Medium:
    """One finished file before it is written."""

    name: str
    data: bytes
    frames_sha256: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bytes": len(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
            "frames_sha256": self.frames_sha256,
            "shape": list(self.shape),
        }


def encode_all(
    frames: Sequence[np.ndarray],
    *,
    stem: str,
    kind: str,
    fps: int,
    record: dict[str, Any] | None,
    raw: bool = False,
) -> list[Medium]:
    """Encode the samples of a task. `frames`: uint8 (h, w, c) each, or (f, h, w, c) for video.

    `kind` is auto, png or mp4; with `raw` the exact frames of what becomes mp4 follow all others,
    as .npz. Raises ValueError when a video is asked as png, and for arrays
    that are neither picture nor video.
    """
    media: list[Medium] = []
    exact: list[Medium] = []
    for index, sample in enumerate(frames):
        video = sample.ndim == 4
        if sample.ndim not in (3, 4) or sample.shape[-1] not in (1, 3, 4):
            raise ValueError(f"output of shape {sample.shape} is neither a picture nor a video")
        if video and kind == "png":
            raise ValueError("this pipeline makes videos; set the job's format to mp4 or auto")
        name = stem if len(frames) == 1 else f"{stem}.{index:03d}"
        digest = frames_sha256(sample)
        own = None if record is None else record | {"sample": index, "frames_sha256": digest}
        if video or kind == "mp4":
            data = encode_mp4(sample if video else sample[None], fps, own)
            name += ".mp4"
        else:
            data = encode_png(sample, own)
            name += ".png"
        media.append(Medium(name, data, digest, sample.shape))
        if raw and name.endswith(".mp4"):
            exact.append(Medium(f"{name[:-4]}.npz", encode_raw(sample), digest, sample.shape))
    return media + exact


def commit(folder: Path, stem: str, media: Sequence[Medium], record: dict[str, Any]) -> dict:
    """Write media, then the sidecar; return the sidecar's content. OSError: nothing committed."""
    sidecar = folder / f"{stem}.json"
    before = read_sidecar(sidecar)
    if before is not None:
        remove(sidecar)  # it must never vouch for files it does not describe
    for medium in media:
        write_atomically(folder / medium.name, medium.data)
    content = record | {"format": FORMAT, "files": [medium.as_json() for medium in media]}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(sidecar, text.encode() + b"\n")
    kept = {medium.name for medium in media}
    for name in set() if before is None else _names(before) - kept:
        if name.startswith(stem + "."):
            remove(folder / name)
    return content


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of a sidecar; None when it is missing, damaged or of another kind."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    files = content.get("files")
    if not isinstance(content.get("identity"), str) or not isinstance(files, list):
        return None
    return content if all(_is_listed(file) for file in files) else None


def is_complete(folder: Path, content: dict[str, Any], *, thorough: bool = False) -> bool:
    """Whether the files a sidecar lists are there in full size (`thorough`: same bytes)."""
    for file in content["files"]:
        path = folder / file["name"]
        try:
            if path.stat().st_size != file["bytes"]:
                return False
            if thorough and hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
                return False
        except OSError:
            return False
    return bool(content["files"]) or FIGURES in content


def result_of(content: dict[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a sidecar."""
    return {
        "files": [file["name"] for file in content["files"]],
        "frames_sha256": [file["frames_sha256"] for file in content["files"]],
        "seconds": content.get("timings", {}).get("total"),
        "fallback": content.get("fallback"),
        "notes": content.get("notes", []),
    }


def _names(content: dict[str, Any]) -> set[str]:
    return {file["name"] for file in content["files"]}


def _is_listed(file: Any) -> bool:
    """Whether an entry of a sidecar's files is what `Medium.as_json` says of one."""
    if not isinstance(file, dict) or not _is_plain_name(file.get("name")):
        return False
    digests = (file.get("sha256"), file.get("frames_sha256"))
    return isinstance(file.get("bytes"), int) and all(isinstance(x, str) for x in digests)


def _is_plain_name(name: Any) -> bool:
    if not isinstance(name, str) or Path(name).name != name:
        return False
    stem = re.sub(r"\.\d+$", "", Path(name).stem)  # of one of several samples: its job's
    return Path(name).suffix in SUFFIXES and stem_problem(stem) is None
