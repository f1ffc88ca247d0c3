"""Two renders of the same jobs, paired job by job: time and quality of one against the other."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.render import strict_json
from apps.render.outputs import FIGURES, is_complete, read_sidecar

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rendered:
    """One finished job of a folder. `seconds` is encode + denoise + decode, without loading."""

    folder: Path
    content: dict[str, Any]

    @property
    def key(self) -> str:
        """What was asked for, whatever model, recipe or machine rendered it."""
        return strict_json.canonical(self.content["payload"]["job"])

    @property
    def label(self) -> str:
        """A few words for a caption: the job's name, its prompt, or its classes."""
        job = self.content["payload"]["job"]
        inputs = job["inputs"]
        named = job.get("name", "").replace("-", " ").replace("_", " ")
        classes = ", ".join(map(str, inputs.get("class_labels", [])))
        prompt = inputs.get("prompt", "")
        prompt = prompt if isinstance(prompt, str) else prompt[0]
        return named or prompt or (f"class {classes}" if classes else self.content["stem"])

    @property
    def seed(self) -> int:
        return self.content["payload"]["job"]["seed"]

    @property
    def seconds(self) -> float:
        timings = self.content["timings"]
        return sum(timings.get(stage, 0.0) for stage in ("encode", "denoise", "decode"))

    @property
    def evaluations(self) -> int | None:
        """Network evaluations that were counted; None where nothing could be counted."""
        report = self.content.get("report")
        return None if report is None else sum(run["nfe"] for run in report["runs"])

    @property
    def path(self) -> Path:
        """The file of the first sample."""
        return self.folder / self.content["files"][0]["name"]

    @property
    def is_video(self) -> bool:
        return self.path.suffix == ".mp4"

    def picture(self) -> np.ndarray:
        """The first sample as uint8 (h, w, 3); of a video its middle frame."""
        return middle(self.frames())

    def frames(self) -> np.ndarray:
        """The first sample as uint8 (frames, h, w, 3); a picture is one frame."""
        return read_frames(self.path)


@dataclass(frozen=True)
class Pair:
    """One job in two renders. `psnr` in dB (None: identical), `ssim` at most 1.

    Of a video over all its frames, as they were written: an MP4 is lossy.
    """

    baseline: Rendered
    other: Rendered
    psnr: float | None
    ssim: float

    @property
    def speed_up(self) -> float:
        return self.baseline.seconds / self.other.seconds


def finished(folder: Path) -> list[Rendered]:
    """All complete outputs of a folder, in the order of its plan where it has one.

    Raises:
        ValueError: there is none.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        content = read_sidecar(path)
        if content is None or FIGURES in content or not _is_render(content):
            continue  # no output, or that of an evaluation
        if is_complete(folder, content):
            found.append(Rendered(folder, content))
    if not found:
        raise ValueError(f"{folder} holds no finished render")
    order = _order(folder)
    return sorted(found, key=lambda r: order.get(r.content["identity"], len(order)))


def pair(baseline: list[Rendered], other: list[Rendered]) -> list[Pair]:
    """Pair jobs that ask for the same thing; jobs in one render only are left out.

    Raises:
        ValueError: the two renders have no job in common.
    """
    by_key = {rendered.key: rendered for rendered in other}
    pairs = [_pair(one, by_key[one.key]) for one in baseline if one.key in by_key]
    if not pairs:
        raise ValueError("the two renders have no job in common")
    return pairs


def median_seconds(rendered: list[Rendered]) -> float:
    return statistics.median(r.seconds for r in rendered)


def read_frames(path: Path) -> np.ndarray:
    """A PNG as one frame, or those of an MP4, as uint8 (frames, h, w, 3)."""
    import numpy as np

    from apps.render.media import decode_mp4, decode_png

    frames = decode_png(path)[None] if path.suffix == ".png" else decode_mp4(path)
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames[..., :3]


def read_picture(path: Path) -> np.ndarray:
    """A PNG, or the middle frame of an MP4, as uint8 (h, w, 3)."""
    return middle(read_frames(path))


def middle(frames: np.ndarray) -> np.ndarray:
    """The middle frame of (frames, h, w, c)."""
    return frames[len(frames) // 2]


def _pair(one: Rendered, two: Rendered) -> Pair:
    import torch

    from accel.metrics.fidelity import psnr, ssim

    left, right = (
        torch.from_numpy(r.frames() / 255.0).permute(0, 3, 1, 2) for r in (one, two)
    )  # (frames, c, h, w)
    same = one.content["files"][0]["frames_sha256"] == two.content["files"][0]["frames_sha256"]
    decibels = None if same else float(psnr(left[None], right[None]))
    return Pair(one, two, decibels, float(ssim(left, right).mean()))


def _is_render(content: dict[str, Any]) -> bool:
    """Whether a sidecar says what `Rendered` tells of an output: its job and its times."""
    payload = content.get("payload")
    job = payload.get("job") if isinstance(payload, dict) else None
    if not isinstance(job, dict) or not isinstance(content.get("timings"), dict):
        return False
    named = isinstance(content.get("stem"), str)
    return named and isinstance(job.get("inputs"), dict) and "seed" in job


def _order(folder: Path) -> dict[str, int]:
    from apps.render.plan import load_plan

    try:
        return {task.id: index for index, task in enumerate(load_plan(folder))}
    except (FileNotFoundError, ValueError):
        return {}
