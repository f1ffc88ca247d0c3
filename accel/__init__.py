"""Acceleration for diffusers pipelines, with its measured cost. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.artifact import Artifact as Artifact
    from accel.artifact import ArtifactRef as ArtifactRef
    from accel.clock import clock_of as clock_of
    from accel.loading import load as load
    from accel.loading import save as save
    from accel.method import Attached as Attached
    from accel.method import FallbackWarning as FallbackWarning
    from accel.method import GuidanceWarning as GuidanceWarning
    from accel.method import Method as Method
    from accel.method import NoEffectError as NoEffectError
    from accel.method import NoEffectWarning as NoEffectWarning
    from accel.method import Recipe as Recipe
    from accel.method import Search as Search
    from accel.method import Trainer as Trainer
    from accel.method import attached as attached
    from accel.method import live_on as live_on
    from accel.recipe_file import RecipeFile as RecipeFile
    from accel.recipe_file import read_recipe as read_recipe
    from accel.recipe_file import write_recipe as write_recipe
    from accel.settings import Settings as Settings

_HOME = {
    "Artifact": "artifact",
    "ArtifactRef": "artifact",
    "clock_of": "clock",
    "load": "loading",
    "save": "loading",
    "Attached": "method",
    "FallbackWarning": "method",
    "GuidanceWarning": "method",
    "Method": "method",
    "NoEffectError": "method",
    "NoEffectWarning": "method",
    "Recipe": "method",
    "Search": "method",
    "Settings": "settings",
    "Trainer": "method",
    "attached": "method",
    "live_on": "method",
    "RecipeFile": "recipe_file",
    "read_recipe": "recipe_file",
    "write_recipe": "recipe_file",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"accel.{_HOME[name]}"), name)
