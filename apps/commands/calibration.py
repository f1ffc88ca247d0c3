"""What commands of `calibrate` begin and end with: a plain model with inputs, an artifact saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.commands.device import Dtype, plain_pipeline

if TYPE_CHECKING:
    from accel.artifact import Artifact, ArtifactRef


def model_and_inputs(
    model: str, jobs: Path | None, where: tuple[str, Dtype], count: int
) -> tuple[Any, list[dict[str, Any]], list[int]]:
    """The plain model, `count` inputs and their seeds. `where`: device and number type."""
    from apps.digits_referee import standard_inputs
    from apps.render.jobs import read_jobs

    listed = [job.job for job in read_jobs(jobs)] if jobs is not None else []
    if jobs is None and not model.startswith("zoo:"):
        raise ValueError(f"no inputs are known for {model}; give some with --jobs FILE")
    pipe = plain_pipeline(model, *where)
    inputs = [job.inputs for job in listed] if listed else standard_inputs(pipe)
    seeds = [job.seed for job in listed] if listed else list(range(len(inputs)))
    if len(inputs) < count:
        raise ValueError(f"calibrate: {len(inputs)} inputs, {count} wanted; give more or --count")
    return pipe, inputs[:count], seeds[:count]


@contextmanager
def saved(artifact: Artifact, out: Path) -> Iterator[ArtifactRef]:
    """An artifact in a folder of its own beside ``out``, until the recipe there has its copy."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as folder:
        yield artifact.save(Path(folder) / "artifact.safetensors")
