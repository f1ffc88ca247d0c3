"""What a worker does for an evaluation: time a recipe, look at renders, look at real samples.

A look compares samples one call at a time and keeps only numbers: values of each sample and its
features, as arrays of an .npz beside the sidecar. So memory does not grow with the evaluation, and
what was looked at once is not looked at again.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import accel
from accel.metrics.appearance import LEVELS, appearance
from accel.metrics.extractors import Extractor, extractor
from accel.metrics.fidelity import SSIM_WINDOW, frame_psnr, psnr, ssim, temporal_error
from accel.metrics.video import flicker, motion
from apps.evaluation.frames import pictures, rendered
from apps.render.environment import versions
from apps.render.outputs import FIGURES, Medium, commit

if TYPE_CHECKING:
    from apps.render.worker import Worker

Arrays = dict[str, np.ndarray]
PSNR_CAP = 100.0  # dB; of equal samples, which have an infinite one and no mean


def run(worker: Worker, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
    """One task to finished files; returns the content of its sidecar.

    Raises:
        Stopped: the worker's `check` asked for it.
        ValueError: what the task needs is not there.
    """
    what = {"time": _time, "look": _look, "real": _real}[payload["what"]]
    before = torch.get_num_threads()
    torch.set_num_threads(payload["threads"])
    try:
        figures, arrays = what(worker, payload)
    finally:
        torch.set_num_threads(before)
    record = {
        "identity": task_id, "stem": payload["stem"], "payload": payload, "versions": versions(),
        FIGURES: figures,
    }  # fmt: skip
    return commit(worker.out, payload["stem"], _media(payload["stem"], arrays), record)


def _media(stem: str, arrays: Arrays) -> list[Medium]:
    if not arrays:
        return []
    target = io.BytesIO()
    np.savez_compressed(target, allow_pickle=False, **arrays)
    data = target.getvalue()
    return [Medium(f"{stem}.npz", data, hashlib.sha256(data).hexdigest(), ())]


# -- speed -----------------------------------------------------------------------------------


def _time(worker: Worker, payload: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    from accel.measure import Study
    from accel.method import Recipe

    pipe = worker.pipeline(payload)
    recipe = accel.read_recipe(payload["recipe"]).recipe
    base = accel.read_recipe(payload["base"]).recipe if payload["base"] else Recipe(())
    worker.check()
    study = Study(pipe, [payload["call"]["inputs"]], seeds=[payload["call"]["seed"]], model="time")
    result = study.compare(recipe, base, rounds=payload["rounds"])
    return {
        "speedup": result.time.speedup.as_json(),
        "seconds": [list(result.time.seconds_a), list(result.time.seconds_b)],
        "flops": list(result.flops),
        "nfe": list(result.nfe),
        "peak_bytes": list(result.peak_bytes),
        "effect": [m["effect"] for m in result.report.get("members", [])],
        "environment": result.environment,
    }, {}


# -- quality ---------------------------------------------------------------------------------


def _look(worker: Worker, payload: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    parts: dict[str, list[np.ndarray]] = {}
    size: list[int] = []
    for number, call in enumerate(payload["calls"]):
        worker.check()
        samples = rendered(worker.out, call["stem"], call["id"])
        base = None
        if payload["base"]:
            base = rendered(worker.out, call["base_stem"], call["base_id"])
            if base.shape != samples.shape:
                raise ValueError(
                    f"{call['stem']} has shape {samples.shape}, the baseline's {base.shape}"
                )
        size = list(samples.shape[1:-1])
        for name, values in _values(samples, base, call["inputs"], payload).items():
            if len(values) != call["samples"]:
                raise ValueError(f"{call['stem']}: {len(values)} samples of {call['samples']}")
            parts.setdefault(name, []).append(values)
        worker.emit({"event": "step", "step": number + 1, "steps": len(payload["calls"])})
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    samples = sum(call["samples"] for call in payload["calls"])
    ragged = sorted(name for name, values in arrays.items() if len(values) != samples)
    for name in ragged:  # not every call of this chunk has it
        del arrays[name]
    return {"samples": samples, "size": size, **_identity(payload)}, arrays


def _values(
    samples: np.ndarray, base: np.ndarray | None, inputs: dict[str, Any], payload: dict[str, Any]
) -> Arrays:
    """Everything that is said of the samples of one call, one row a sample."""
    found: Arrays = {"brightness": samples.reshape(len(samples), -1).mean(1)}
    if base is not None:
        found |= paired(samples, base)
    if samples.ndim == 5:
        x = _tensor(samples)
        found |= {"flicker": flicker(x).numpy(), "motion": motion(x).numpy()}
    if payload["referee"]:
        found |= _judged(samples, inputs)
    if payload["features"] is not None:
        found |= _features(samples, extractor(payload["features"]))
    if "clip" in payload["kinds"]:
        found["clip"] = _clip(samples, inputs, payload["clip"])
    return found


def paired(samples: np.ndarray, base: np.ndarray) -> Arrays:
    """Fidelity of uint8 samples to those of the baseline, by sample (of videos also by frame)."""
    a, b = _tensor(samples), _tensor(base)
    found = {"psnr": psnr(a, b).clamp(max=PSNR_CAP).numpy()}
    if min(a.shape[-2:]) >= SSIM_WINDOW:
        frames = [x.reshape(-1, *x.shape[-3:]) for x in (a, b)]
        found["ssim"] = ssim(*frames).reshape(len(a), -1).mean(1).numpy()
    if a.ndim == 5:
        curve = frame_psnr(a, b).clamp(max=PSNR_CAP)
        found |= {"frame_psnr": curve.numpy(), "worst_frame_psnr": curve.min(1).values.numpy()}
        found["temporal_error"] = temporal_error(a, b).numpy()
    return found


def _judged(samples: np.ndarray, inputs: dict[str, Any]) -> Arrays:
    """The referee's answers, right or wrong by attribute and in all; and what it sees."""
    from accel.zoo.judge import judge
    from apps.digits_referee import NAME, asked

    model, what = judge(NAME), asked([inputs])
    answers = model.video_answers(samples) if samples.ndim == 5 else model.answers(samples)
    right = {k: answers[k] == v for k, v in what.items() if k in answers}
    found = {f"right_{k}": v for k, v in right.items()}
    found["right_all"] = np.logical_and.reduce(list(right.values()))
    return found | {"seen": model.features_of(samples).astype(np.float32)}


def _features(samples: np.ndarray, look: Extractor) -> Arrays:
    found = {"features": look.features(samples).astype(np.float32)}
    if look.probabilities is not None:
        found["probabilities"] = look.probabilities(samples).astype(np.float32)
    frames = samples if samples.ndim == 4 else samples[:, samples.shape[1] // 2]
    if all(side % 2**LEVELS == 0 for side in frames.shape[1:3]):
        found["looks"] = appearance(_tensor(frames)).numpy().astype(np.float32)
    return found


def _clip(samples: np.ndarray, inputs: dict[str, Any], folder: str) -> np.ndarray:
    from accel.metrics.clip_score import clip_score

    said = inputs["prompt"]
    said = [said] if isinstance(said, str) else said
    copies = len(samples) // len(said)
    return clip_score(folder)(samples, [text for text in said for _ in range(copies)])


def _real(worker: Worker, payload: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Features of two disjoint sets of real samples, as many as were rendered where there are."""
    look = extractor(payload["features"])
    if payload["real"] is None:
        from apps.digits_referee import real_samples

        sets = [_features(real_samples(payload["inputs"], draw), look) for draw in (0, 1)]
        return _identity(payload) | {"real": "zoo"}, _two(sets)
    parts: list[Arrays] = []
    for batch in pictures(Path(payload["real"])):
        worker.check()
        parts.append(_features(batch, look))
    names = set.intersection(*(set(p) for p in parts)) - {"probabilities"}
    whole = {k: np.concatenate([p[k] for p in parts]) for k in names}
    digest = hashlib.sha256(whole["features"].tobytes()).hexdigest()
    return _identity(payload) | {"real": digest}, _two(_halves(whole, payload["samples"]))


def _halves(whole: Arrays, count: int) -> list[Arrays]:
    """Two sets that share no picture; the second is empty where there are too few for one."""
    total = len(whole["features"])
    order = np.random.default_rng(0).permutation(total)
    first, rest = order[:count], order[count : 2 * count]
    return [{k: v[rows] for k, v in whole.items()} for rows in (first, rest)]


def _two(sets: list[Arrays]) -> Arrays:
    return {f"{k}_{i}": v for i, found in enumerate(sets) for k, v in found.items()}


def _identity(payload: dict[str, Any]) -> dict[str, Any]:
    """Which networks looked, by the hash of their weights, and how they see."""
    found: dict[str, Any] = {}
    if payload["features"] is not None:
        look = extractor(payload["features"])
        found["features"] = {"name": look.name, "sha256": look.sha256, "sees": look.sees}
    if payload.get("referee"):
        from apps.digits_referee import NAME

        judge = extractor(f"zoo:{NAME}")
        found["referee"] = {"name": judge.name, "sha256": judge.sha256}
    if payload.get("clip"):
        from accel.metrics.clip_score import clip_score

        found["clip"] = {"sha256": clip_score(payload["clip"]).sha256}
    return found


def _tensor(samples: np.ndarray) -> torch.Tensor:
    """uint8 (..., h, w, c) -> (..., c, h, w) in [0, 1]."""
    return torch.from_numpy(samples).movedim(-1, -3) / 255.0


def read_arrays(folder: Path, stem: str) -> Arrays:
    """What a look kept. Never unpickles."""
    with np.load(folder / f"{stem}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
