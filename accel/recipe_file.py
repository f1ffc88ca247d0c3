"""A recipe on disk: methods with their settings, artifacts by content, and the measured effect.

.. code-block:: yaml

    accel_recipe: 1
    name: fast
    methods:
      - method: samplers.swap:SwapScheduler
        settings: {scheduler: DPMSolverMultistepScheduler}
      - method: caches.native:TaylorSeer
        settings: {interval: 3}
    measured: null        # written by `accel measure`
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accel import strict_yaml
from accel.artifact import ArtifactRef
from accel.files import write_atomically
from accel.method import Method, Recipe
from accel.methods import resolve

FORMAT = 1
KEYS = {"accel_recipe", "name", "description", "methods", "measured"}
MAX_BYTES = 1 << 20  # no honest recipe is larger; a hostile one may try to be


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with what is known about it. ``sha256`` identifies the recipe, not the file."""

    recipe: Recipe
    name: str
    description: str = ""
    measured: dict[str, Any] | None = None
    path: Path | None = None

    @property
    def sha256(self) -> str:
        return self.recipe.digest()


def read_recipe(source: str | os.PathLike[str]) -> RecipeFile:
    """Read a recipe file. Artifact paths are relative to it, and must be there; whether their
    content is what the recipe says is checked where it is read, in ``attach``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything wrong with it, in one line, naming file and place.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes is too large for a recipe")
    try:
        content = strict_yaml.read(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable recipe: {error}") from None
    try:
        return _from_content(content, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_content(content: Any, path: Path) -> RecipeFile:
    if not isinstance(content, dict) or "accel_recipe" not in content:
        raise ValueError("not a recipe (no 'accel_recipe' key)")
    if content["accel_recipe"] != FORMAT:
        raise ValueError(f"recipe format {content['accel_recipe']!r}; this accel reads {FORMAT}")
    unknown = sorted(set(content) - KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {sorted(KEYS)}")
    entries = content.get("methods")
    if not isinstance(entries, list):
        raise ValueError("'methods' must be a list")
    methods = tuple(_method(entry, i, path.parent) for i, entry in enumerate(entries))
    measured = content.get("measured")
    if not (measured is None or isinstance(measured, dict)):
        raise ValueError("'measured' must be a mapping or null")
    name, text = content.get("name", path.stem), content.get("description", "")
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError("'name' and 'description' must be text")
    try:  # YAML has dates, bytes, NaN and halves of characters
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"holds what JSON cannot say: {error}") from None
    return RecipeFile(Recipe(methods), name, text, measured, path)


def _method(entry: Any, i: int, folder: Path) -> Method:
    where = f"methods[{i}]"
    if not isinstance(entry, dict) or not set(entry) <= {"method", "settings"}:
        raise ValueError(f"{where} must have 'method' and 'settings', nothing else")
    settings = entry.get("settings") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{where}.settings must be a mapping")
    try:
        method = resolve(entry.get("method", "")).from_settings(settings)
        return _place_artifacts(method, folder)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def _place_artifacts(method: Method, folder: Path) -> Method:
    """Artifact paths made absolute, each beside the recipe and there."""
    changed = {}
    for f in dataclasses.fields(method):
        ref = getattr(method, f.name)
        if isinstance(ref, ArtifactRef):
            if Path(ref.path).is_absolute() or ".." in Path(ref.path).parts:
                raise ValueError(f"artifact path {ref.path!r} must lie beside the recipe")
            changed[f.name] = ArtifactRef(str((folder / ref.path).resolve()), ref.sha256)
            if not Path(changed[f.name].path).is_file():
                raise ValueError(f"artifact {ref.path!r} is missing")
    return dataclasses.replace(method, **changed) if changed else method


def write_recipe(
    target: str | os.PathLike[str],
    recipe: Recipe,
    *,
    name: str | None = None,
    description: str = "",
    measured: dict[str, Any] | None = None,
) -> RecipeFile:
    """Write ``recipe`` to ``target`` atomically, its artifacts copied beside it.

    Raises:
        ValueError: an artifact's content is not what its reference says.
        FileNotFoundError: an artifact is missing.
    """
    path = Path(target)
    placed = Recipe(tuple(_copy_artifacts(m, path.parent) for m in recipe.methods))
    content = {"accel_recipe": FORMAT, "name": name or path.stem}
    content |= {"description": description} if description else {}
    content |= {"methods": placed.to_json()["methods"], "measured": measured}
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, width=100).encode())
    return RecipeFile(recipe, content["name"], description, measured, path)


def _copy_artifacts(method: Method, folder: Path) -> Method:
    import hashlib

    changed = {}
    for f in dataclasses.fields(method):
        ref = getattr(method, f.name)
        if isinstance(ref, ArtifactRef):
            data = Path(ref.path).read_bytes()
            if hashlib.sha256(data).hexdigest() != ref.sha256:
                raise ValueError(f"{ref.path} has changed since it was calibrated")
            name = f"{ref.sha256[:16]}.safetensors"
            write_atomically(folder / "artifacts" / name, data)
            changed[f.name] = ArtifactRef(f"artifacts/{name}", ref.sha256)
    return dataclasses.replace(method, **changed) if changed else method
