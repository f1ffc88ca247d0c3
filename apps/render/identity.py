"""Who a job is: the hash of everything that decides its pixels, fixed before anything runs.

Job, recipe (by content, artifacts included), model (by content or hub commit), seed, threads per
worker (one and two threads differ in the last bits), number type and kind of device.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from apps.render import strict_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CARD = frozenset({".md", ".png", ".jpg", ".jpeg", ".webp", ".gif"})  # beside model_index.json


def identity(payload: dict[str, Any]) -> str:
    """SHA-256 (hex) over the parts of a payload that decide its pixels."""
    parts = {
        "job": payload["job"],
        "model": payload["model_revision"],
        "recipe": payload["recipe_sha256"],
        "threads": payload["threads"],
        "dtype": payload["dtype"],
        "device": payload["device"],
    }
    return hashlib.sha256(strict_json.canonical(parts).encode()).hexdigest()


@cache
def model_revision(ref: str) -> str:
    """`sha256:...` over the files of a local model but its card, or `hub:commit`.

    Raises:
        ValueError: no such model, in one line.
    """
    folder = model_folder(ref)
    if folder is not None:
        return "sha256:" + _folder_digest(folder)
    return "hub:" + _hub_commit(ref)


def model_folder(ref: str) -> Path | None:
    """The local folder of a model; None for a hub id. ValueError when it is neither."""
    if ref.startswith("zoo:"):
        from accel.loading import zoo_path

        folder = zoo_path(ref)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model {ref!r} is not there (no {folder.name}/model_index.json)")
        return folder
    folder = Path(ref)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model {ref!r} is no diffusers folder (no model_index.json)")
        return folder
    if not _HUB_ID.fullmatch(ref):
        raise ValueError(f"model {ref!r} is no folder, no zoo:NAME and no hub id")
    return None


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and _counts(p, folder)):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _counts(path: Path, folder: Path) -> bool:
    """Whether a file may decide pixels: it is neither hidden nor the model's card or a picture."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and not (path.parent == folder and path.suffix.lower() in _CARD)


def _hub_commit(ref: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(ref, allow_patterns=["model_index.json"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {ref!r} is no local folder, and the hub says: {reason}") from None
    return Path(found).name
