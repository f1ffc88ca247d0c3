"""The plan of a VBench run: which videos are to be made, how, and each one's identity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.files import write_atomically
from accel.metrics.protocol import Protocol
from apps.evaluation.vbench.suite import (
    DIMENSIONS,
    FLICKER_INDICES,
    INDICES,
    Suite,
    Video,
    read_suite,
)  # fmt: skip

if TYPE_CHECKING:
    from apps.render.plan import PlannedTask

PLAN = "vbench.json"


@dataclass(frozen=True)
class Plan:
    """What is to be made. `inputs` are the arguments of every call beside the prompt."""

    suite: str
    model: str
    recipe: str | None = None
    dimensions: tuple[str, ...] = DIMENSIONS
    indices: int = INDICES
    flicker_indices: int = FLICKER_INDICES
    prompts: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    fps: int = 16
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def whole(self) -> bool:
        """Whether this is VBench's own protocol, and not a part of it."""
        counts = (self.indices, self.flicker_indices)
        return self.prompts is None and counts == (INDICES, FLICKER_INDICES)

    def read_suite(self) -> Suite:
        return read_suite(Path(self.suite))

    def videos(self) -> list[Video]:
        return self.read_suite().videos(
            self.dimensions, indices=self.indices, flicker_indices=self.flicker_indices,
            prompts=self.prompts,
        )  # fmt: skip


def save_plan(plan: Plan, out: Path) -> list[Video]:
    """Check a plan and write it; nothing is generated. Raises ValueError in one line."""
    videos = plan.videos()
    tasks(plan, videos[:1])  # model and recipe are there
    out.mkdir(parents=True, exist_ok=True)
    record = asdict(plan) | {"suite": str(Path(plan.suite).resolve())}
    if plan.recipe is not None:
        record["recipe"] = str(Path(plan.recipe).resolve())
    write_atomically(out / PLAN, (json.dumps(record, indent=1) + "\n").encode())
    return videos


def read_plan(out: Path) -> Plan:
    """Raises ValueError if the folder has none."""
    try:
        record = json.loads((out / PLAN).read_text("utf-8"))
        return Plan(**record | {"dimensions": tuple(record["dimensions"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out}: no VBench plan ({' '.join(str(error).split())})") from None


def tasks(plan: Plan, videos: Sequence[Video]) -> list[PlannedTask]:
    """What the renderer is asked for, one task a video."""
    from apps.render.jobs import PlacedJob, parse_job
    from apps.render.plan import Settings
    from apps.render.plan import plan as resolve

    settings = Settings(
        model=plan.model, recipe=plan.recipe, threads=plan.threads, dtype=plan.dtype,
        device=plan.device, native=True,
    )  # fmt: skip
    rows = [
        {
            "name": video.stem, "seed": video.seed, "format": "mp4", "fps": plan.fps,
            "inputs": {**plan.inputs, "prompt": video.prompt},
        }
        for video in videos
    ]  # fmt: skip
    placed = [PlacedJob(parse_job(row, {}), row["name"]) for row in rows]
    return resolve(placed, settings, Path())


def protocol(plan: Plan) -> Protocol:
    """How a folder's videos are made and judged; not with which recipe."""
    from apps.render.identity import model_revision

    videos = plan.videos()
    return Protocol(
        model={"name": plan.model, "revision": model_revision(plan.model)},
        inputs={"suite": plan.read_suite().sha256, "dimensions": list(plan.dimensions)},
        samples=len(videos),
        seeds="sha256(prompt, index)",
        steps=plan.inputs.get("num_inference_steps"),
        guidance=plan.inputs.get("guidance_scale"),
        quantise="8 bits; official scores of an mp4 (crf 14), native ones of raw frames",
        more={
            "call": plan.inputs, "indices": plan.indices, "flicker_indices": plan.flicker_indices,
            "prompts": plan.prompts, "fps": plan.fps, "dtype": plan.dtype,
            "device": plan.device, "threads": plan.threads,
        },
    )  # fmt: skip
