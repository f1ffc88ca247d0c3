"""From raw VBench results to the published scores: normalised, weighted, with what is missing said.

Constants as published with VBench's leaderboard. Quality weighs its dimensions 1 and dynamic degree
one half, Semantic all alike, Total weighs Quality four times. The official script counts a missing
dimension as 0; here a score with one missing is labelled partial and is of those that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel.metrics.statistics import bootstrap, paired_test
from apps.evaluation.vbench.suite import QUALITY, SEMANTIC

RANGES: dict[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
WEIGHTS = {name: 0.5 if name == "dynamic_degree" else 1.0 for name in RANGES}
VIDEOS_OF = {"imaging_quality": 100.0}  # the official code gives videos 0 to 100, their mean 0 to 1
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


def normalised(dimension: str, value: float) -> float:
    """0 to 1 over the published range. Raises KeyError for an unknown dimension."""
    low, high = RANGES[dimension]
    return (value - low) / (high - low)


def totals(raw: Mapping[str, float]) -> dict[str, Any]:
    """Quality, Semantic and Total in per cent of normalised scores, and which are missing.

    A part with nothing in it is None; Total is None unless both parts have something.
    """
    quality, semantic = _part(raw, QUALITY), _part(raw, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        weighed = QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic
        total = weighed / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    missing = [d for d in RANGES if d not in raw]
    return {
        "quality": _percent(quality), "semantic": _percent(semantic), "total": _percent(total),
        "partial": bool(missing), "missing": missing,
    }  # fmt: skip


def _part(raw: Mapping[str, float], names: Sequence[str]) -> float | None:
    there = [name for name in names if name in raw]
    if not there:
        return None
    weights = sum(WEIGHTS[name] for name in there)
    return sum(WEIGHTS[name] * normalised(name, raw[name]) for name in there) / weights


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def by_prompt(dimension: str, results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Per-video results of VBench's output on the scale of its mean, gathered by prompt (from the
    file's name)."""
    found: dict[str, list[float]] = {}
    whole = VIDEOS_OF.get(dimension, 1.0)
    for row in results:
        prompt = Path(row["video_path"]).stem.rpartition("-")[0]
        found.setdefault(prompt, []).append(float(row["video_results"]) / whole)
    return found


def dimension_figure(
    ours: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]] | None
) -> dict[str, Any]:
    """Mean of prompts' means with its interval over prompts; and paired with a baseline's.

    Prompts, not videos, are resampled: videos of a prompt are alike.
    """
    means = {prompt: float(np.mean(values)) for prompt, values in ours.items()}
    figure: dict[str, Any] = {
        "value": bootstrap(list(means.values())).as_json(), "prompts": len(means),
        "videos": sum(len(v) for v in ours.values()),
    }  # fmt: skip
    shared = [p for p in means if base is not None and p in base]
    if shared and base is not None:
        before = [float(np.mean(base[p])) for p in shared]
        figure |= {"paired_prompts": len(shared)}
        figure |= paired_test([means[p] for p in shared], before).as_json()
    return figure
