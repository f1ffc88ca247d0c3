"""Who a job is: the hash of everything that decides its pixels, fixed before anything runs.

Job, recipe (by content, artifacts included), model (by content or hub commit), seed, threads per
worker (one and two threads differ in the last bits), number type and kind of device.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from apps.render import strict_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CARD = frozenset({".md", ".png", ".jpg", ".jpeg", ".webp", ".gif"})  # beside model_index.json
# Beside it, too: `recipe_sha256` is of it and of what it refers to.
RECIPE_FILE = "accel_recipe.yaml"


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


def model_revision(ref: str) -> str:
    """`sha256:...` over the files of a local model but its card and its recipe, or `hub:commit`.

    Files are read again when one has another size or time; a hub is asked once.

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
    folder = folder.resolve()
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and _counts(p, folder))
    stats = [(path, path.stat()) for path in paths]
    return _digest(folder, tuple((p, s.st_size, s.st_mtime_ns) for p, s in stats))


@lru_cache(maxsize=64)
def _digest(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files as (path, bytes, time of the last change in ns), which a cached digest is of."""
    digest = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _counts(path: Path, folder: Path) -> bool:
    """Whether a file may decide pixels by itself: it is neither hidden nor of the model's card, and
    not the folder's recipe or an artifact beside that."""
    parts = path.relative_to(folder).parts
    if any(part.startswith(".") for part in parts):
        return False
    if parts == (RECIPE_FILE,) or (parts[0] == "artifacts" and (folder / RECIPE_FILE).is_file()):
        return False
    return len(parts) > 1 or path.suffix.lower() not in _CARD


@cache
def _hub_commit(ref: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(ref, allow_patterns=["model_index.json"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {ref!r} is no local folder, and the hub says: {reason}") from None
    return Path(found).name
