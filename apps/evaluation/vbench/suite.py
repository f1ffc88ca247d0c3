"""VBench's prompt suite, from the user's copy of `VBench_full_info.json`, and its file names.

A file is `<prompt>-<index>.mp4` with the prompt to the letter: the official code looks for exactly
that, warns where it is missing, and computes with what it found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel.metrics.protocol import file_sha256

QUALITY = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
    "dynamic_degree", "aesthetic_quality", "imaging_quality",
)  # fmt: skip
SEMANTIC = (
    "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
    "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
DIMENSIONS = (*QUALITY, *SEMANTIC)
FLICKER = "temporal_flickering"
INDICES, FLICKER_INDICES = 5, 25  # videos of a prompt; more where a filter takes some away
MAX_NAME = 255  # bytes, of every common file system


@dataclass(frozen=True)
class Video:
    """One video of the suite. `seed` depends on prompt and index alone: sides pair by it."""

    prompt: str
    index: int
    dimensions: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.prompt}-{self.index}.mp4"

    @property
    def seed(self) -> int:
        digest = hashlib.sha256(f"{self.prompt}\0{self.index}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    @property
    def stem(self) -> str:
        """Name in the renderer's folder, where a prompt may be no safe file name."""
        return f"vb-{hashlib.sha256(self.prompt.encode()).hexdigest()[:16]}-{self.index:02d}"


@dataclass(frozen=True)
class Suite:
    """Prompts in the order of the file, each with all of its dimensions."""

    prompts: dict[str, tuple[str, ...]]
    sha256: str
    path: Path

    def videos(
        self,
        dimensions: Collection[str] = DIMENSIONS,
        *,
        indices: int = INDICES,
        flicker_indices: int = FLICKER_INDICES,
        prompts: int | None = None,
    ) -> list[Video]:
        """Every video that the dimensions want, each once, in the order of the suite.

        Args:
            prompts: of each dimension at most, evenly spread; None: all. A subset is no VBench
                score, and is labelled so.

        Raises:
            ValueError: an unknown dimension, or nothing to make.
        """
        unknown = sorted(set(dimensions) - set(DIMENSIONS))
        if unknown or not dimensions or min(indices, flicker_indices) < 1:
            known = ", ".join(DIMENSIONS)
            raise ValueError(f"vbench: dimension {unknown or 'missing'}; known: {known}")
        wanted: dict[str, set[str]] = {}
        for dimension in dimensions:
            listed = [p for p, own in self.prompts.items() if dimension in own]
            for prompt in _spread(listed, prompts):
                wanted.setdefault(prompt, set()).add(dimension)
        found = []
        for prompt in self.prompts:
            own = wanted.get(prompt, set())
            for index in range(max(indices * bool(own), flicker_indices * (FLICKER in own))):
                kept = own if index < indices else own & {FLICKER}
                if index >= flicker_indices:
                    kept = kept - {FLICKER}
                if kept:
                    ordered = tuple(d for d in DIMENSIONS if d in kept)
                    found.append(Video(prompt, index, ordered))
        return found


def read_suite(path: Path) -> Suite:
    """The suite of a `VBench_full_info.json`; a prompt listed twice gets both lists' dimensions.

    Raises:
        ValueError: not there, not that file, or a prompt that cannot be a file name.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
        prompts: dict[str, tuple[str, ...]] = {}
        for row in rows:
            old = prompts.get(row["prompt_en"], ())
            prompts[row["prompt_en"]] = (*old, *(d for d in row["dimension"] if d not in old))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no VBench_full_info.json ({' '.join(str(error).split())}); it lies in the "
            "vbench package: pip download --no-deps vbench, and unzip it"
        ) from None
    wrong = [p for p in prompts if _bad_name(p)]
    if wrong or not prompts:
        raise ValueError(f"{path}: {wrong[:1] or 'no prompt'} cannot be a file name")
    return Suite(prompts, file_sha256(path), path)


def _bad_name(prompt: str) -> bool:
    long = len(f"{prompt}-{FLICKER_INDICES}.mp4".encode()) > MAX_NAME
    return not prompt or long or "/" in prompt or "\0" in prompt or prompt.startswith(".")


def _spread(items: list[str], count: int | None) -> list[str]:
    if count is None or count >= len(items):
        return items
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[i] for i in places]
