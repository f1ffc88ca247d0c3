"""The report of a finished evaluation: one JSON value that says everything, and its warnings."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel.artifact import inputs_digest
from accel.environment import environment
from accel.metrics.distribution import SAMPLES_PER_FEATURE
from accel.metrics.protocol import Protocol
from apps.evaluation.figures import (
    FEW,
    KEPT,
    Looked,
    by_label,
    by_word,
    figures,
    unrelated,
    worst,
)  # fmt: skip
from apps.evaluation.frames import rendered
from apps.evaluation.request import BASELINE, Plan, Side
from apps.evaluation.tasks import read_arrays
from apps.render.outputs import FIGURES, read_sidecar
from apps.render.plan import PlannedTask

FORMAT = 1
SCALE_SAMPLES = 64  # of the baseline, compared with each other
BUSY = 1.5  # load beyond our own threads


def build(
    made: Plan, folder: Path, looks: Sequence[PlannedTask], times: Sequence[PlannedTask],
    lost: dict[int, str],
) -> dict[str, Any]:  # fmt: skip
    """The report of what lies in ``folder``. ``lost``: calls left out, with the reason.

    Raises:
        ValueError: a look is missing.
    """
    places = sample_places(made, lost)
    labels = [made.calls[call]["labels"][i] for call, i in places]
    stems = {s.name: [t.stem for t in looks if _is_look(t, s)] for s in made.sides}
    base = Looked(folder, stems[BASELINE], len(places))
    real = read_arrays(folder, "real") if made.features is not None else None
    content = [_content(folder, task) for task in looks]
    record = _protocol(made, content, lost)
    rows = []
    for side, timed in zip(made.sides[1:], _times(made, folder, times), strict=True):
        ours = Looked(folder, stems[side.name], len(places))
        rows.append(_row(made, folder, side, timed) | {
            "figures": figures(base, ours, real, made.request.kinds),
            "worst": _placed(worst(ours.values, base.values, labels), made, side, places),
            "by_label": by_label(ours.values, labels),
            "by_word": by_word(ours.values, labels),
            "per_sample": _per_sample(ours.values),
        })  # fmt: skip
    own_environment = next((r["environment"] for r in rows if r["environment"]), None)
    found = {
        "format": FORMAT,
        "kinds": list(made.request.kinds),
        "model": made.model,
        "samples": len(places),
        "calls": len(made.calls) - len(lost),
        "videos": len(content[0][FIGURES]["size"]) == 3,
        "baseline": _row(made, folder, made.sides[0], None) | {
            "per_sample": {k: v for k, v in _per_sample(base.values).items() if k != "psnr"},
        },
        "recipes": rows,
        "unrelated_psnr": _scale(made, folder, places),
        "looked_with": {k: v for k, v in content[-1][FIGURES].items() if isinstance(v, dict)},
        "lost": {made.calls[i]["labels"][0]: reason for i, reason in lost.items()},
        "protocol": record.as_json(),
        "environment": own_environment or environment(made.request.device),
        "request": made.request.as_json(),
        "command": command(made),
    }  # fmt: skip
    dimension = None if real is None else real["features_0"].shape[1]
    return found | {"warnings": warnings(found, dimension)}


def sample_places(made: Plan, lost: dict[int, str] | None = None) -> list[tuple[int, int]]:
    """(call, sample within it) of every sample that is compared, in order."""
    kept = [i for i in range(len(made.calls)) if i not in (lost or {})]
    return [(i, j) for i in kept for j in range(made.calls[i]["samples"])]


def command(made: Plan) -> str:
    """The command line that asks for the same."""
    request = made.request
    kind = request.kinds[0] if len(request.kinds) == 1 else "all"
    words = ["accel", "evaluate", kind, "--model", request.model]
    for recipe in request.recipes:
        words += ["--recipe", recipe]
    for name in ("against", "jobs", "samples", "steps", "features", "real", "clip"):
        value = getattr(request, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for name, usual in (("rounds", 5), ("threads", 1), ("dtype", "float32"), ("device", "cpu")):
        if getattr(request, name) != usual:
            words += [f"--{name}", str(getattr(request, name))]
    return shlex.join(words)


def _is_look(task: PlannedTask, side: Side) -> bool:
    payload = task.payload
    same = payload["what"] == "look" and payload["base"] == (side.name != BASELINE)
    return same and payload["recipe"] == side.recipe


def _content(folder: Path, task: PlannedTask) -> dict[str, Any]:
    content = read_sidecar(folder / f"{task.stem}.json")
    if content is None or content["identity"] != task.id:
        raise ValueError(f"{folder}: {task.stem} is missing; run the evaluation again")
    return content


def _times(made: Plan, folder: Path, times: Sequence[PlannedTask]) -> list[dict[str, Any] | None]:
    """What each recipe's timing found; None where it was not asked for, or failed."""
    by_stem = {task.stem: task for task in times}
    found: list[dict[str, Any] | None] = []
    for side in made.sides[1:]:
        task = by_stem.get(f"time-{side.name}")
        content = read_sidecar(folder / f"{task.stem}.json") if task is not None else None
        good = task is not None and content is not None and content["identity"] == task.id
        found.append(content[FIGURES] if good and content is not None else None)
    return found


def _row(made: Plan, folder: Path, side: Side, timed: dict[str, Any] | None) -> dict[str, Any]:
    contents = [read_sidecar(folder / f"{t.stem}.json") for t in made.renders[side.name]]
    done = [c for c in contents if c is not None]
    keys = ("speedup", "seconds", "flops", "nfe", "peak_bytes", "effect", "environment")
    path = None if side.recipe is None else Path(side.recipe).name
    return {
        "name": side.name, "label": side.label, "description": side.description, "recipe": path,
        "sha256": side.sha256, "methods": list(side.methods),
        "fallbacks": sum(bool(c.get("fallback")) for c in done),
        "notes": sorted({note for c in done for note in c.get("notes", [])}),
        **{k: (timed or {}).get(k) for k in keys},
    }  # fmt: skip


def _placed(
    rows: list[dict[str, Any]], made: Plan, side: Side, places: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """The worst samples, with where their pictures are."""
    for row in rows:
        call, i = places[row["sample"]]
        row |= {
            "seed": made.calls[call]["seed"] + i, "within": i,
            "files": [made.renders[name][call].stem for name in (BASELINE, side.name)],
        }  # fmt: skip
    return rows


def _per_sample(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """One number a sample and measure, for paired tests with other reports."""
    return {
        name: [float(f"{x:.5g}") for x in array.astype(float).tolist()]
        for name, array in sorted(values.items())
        if array.ndim == 1
    }


def _protocol(made: Plan, content: Sequence[dict[str, Any]], lost: dict[int, str]) -> Protocol:
    kept = [call for i, call in enumerate(made.calls) if i not in lost]
    inputs = [call["inputs"] for call in kept]
    seen = content[-1][FIGURES]
    base, request = made.sides[0], made.request
    return Protocol(
        model=made.model,
        inputs={"sha256": inputs_digest(inputs), "calls": len(inputs)},
        samples=sum(call["samples"] for call in kept),
        seeds=_digest([call["seed"] for call in kept]),
        steps=_agreed(inputs, "num_inference_steps"),
        guidance=_agreed(inputs, "guidance_scale"),
        features=seen.get("features"),
        size=content[0][FIGURES]["size"],
        quantise="round(255 x): everything is said of 8-bit frames",
        more={
            "baseline": base.sha256, "real": seen.get("real"), "clip": seen.get("clip"),
            "referee": content[0][FIGURES].get("referee"),
            "kept": KEPT if made.features else None, "threads": request.threads,
            "dtype": request.dtype, "device": request.device,
        },
    )  # fmt: skip


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _agreed(inputs: Sequence[dict[str, Any]], name: str) -> Any:
    values = [call.get(name) for call in inputs]
    return values[0] if all(v == values[0] for v in values) else None


def _scale(made: Plan, folder: Path, places: list[tuple[int, int]]) -> float | None:
    """PSNR of unrelated outputs: baseline samples beside the next ones."""
    calls = list(dict.fromkeys(call for call, _ in places))
    frames: list[np.ndarray] = []
    for call in calls:
        frames += list(rendered(folder, made.renders[BASELINE][call].stem))
        if len(frames) >= SCALE_SAMPLES:
            break
    same = all(f.shape == frames[0].shape for f in frames)
    return unrelated(frames[:SCALE_SAMPLES]) if same and len(frames) > 1 else None


def warnings(found: dict[str, Any], dimension: int | None) -> list[str]:
    """What a reader must know before believing a figure, in sentences. ``dimension``: of features;
    None where no distance was asked for."""
    told = []
    count = found["samples"]
    if count < FEW:
        told.append(
            f"{count} samples: intervals from fewer than {FEW} hold the truth less often than 95 %."
        )
    if dimension is not None and not any("frechet" in r["figures"] for r in found["recipes"]):
        told.append(
            f"No Frechet distance: of {dimension} features it wants at least "
            f"{SAMPLES_PER_FEATURE * dimension:,} samples and as many real ones; there are {count} "
            "samples."
        )
    for row in found["recipes"]:
        told += _warnings_of(row, count)
    for label, reason in found["lost"].items():
        told.append(f"The call of {label!r} is left out of every side: {reason}")
    where = found["environment"]
    load = max((x for x in where.get("load") or [] if x is not None), default=0.0)
    if found["request"]["rounds"] and load > where["threads"] + BUSY:
        told.append(f"The machine was busy (load {load}): expect other times on a quiet one.")
    return told


def _warnings_of(row: dict[str, Any], count: int) -> list[str]:
    told, name = [], row["label"]
    if row["effect"] and "none" in row["effect"]:
        told.append(f"{name}: a method of it had no effect.")
    if row["fallbacks"]:
        told.append(
            f"{name}: {row['fallbacks']} calls came out broken and were made again without it; "
            "they count as they are, unaccelerated."
        )
    distance = row["figures"].get("frechet")
    if distance and distance["difference"] and distance["difference"]["high"] < 0:
        told.append(
            f"{name}: its Frechet distance is below the baseline's. That can be without "
            "anything being better; read it beside the paired figures."
        )
    right = row["figures"].get("right_all")
    if right:
        width = max(
            abs(right["difference"][k] - right["difference"]["estimate"]) for k in ("low", "high")
        )
        if width > 5:
            told.append(
                f"{name}: with {count} samples, changes of under {width:.0f} points in what is "
                "judged right cannot be told from chance."
            )
    return told
