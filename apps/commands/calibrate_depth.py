"""`calibrate depth`: how many of a transformer's blocks each noise level needs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.calibration import model_and_inputs, saved
from apps.commands.device import Device, Dtype, NumberType
from apps.commands.say import told

if TYPE_CHECKING:
    from accel.artifact import Artifact


class Rest(StrEnum):
    skip = "skip"
    residual = "residual"
    forecast = "forecast"
    heads = "heads"


def depth(
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Recipe file to write; its artifact goes beside it.")],
    jobs: Annotated[
        Path | None,
        typer.Option(help="Job file whose inputs are used; zoo models have their own."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pipeline calls to calibrate on.")] = 1,
    quality: Annotated[
        float, typer.Option(min=1, help="PSNR to the unmodified model that is kept, in dB.")
    ] = 30.0,
    speed: Annotated[
        float | None, typer.Option(min=1, help="Predicted speed-up instead of a quality.")
    ] = None,
    rest: Annotated[
        Rest,
        typer.Option(help="What stands in for the blocks left out."),
    ] = Rest.forecast,
    updates: Annotated[int, typer.Option(min=1, help="Runs in which heads are trained.")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
) -> None:
    """Leave a transformer's last blocks out at noise levels where they would change little.

    Takes some 65 runs of the inputs. A training of heads that was stopped goes on.
    """
    with told():
        import torch

        from accel.method import Recipe
        from accel.recipe_file import write_recipe
        from caches.early_exit import EarlyExit, ExitTraining

        torch.set_num_threads(threads)
        pipe, inputs, _ = model_and_inputs(model, jobs, (device, dtype), count)
        instead: Any = rest.value
        if rest is Rest.heads:
            training = ExitTraining(updates=updates)
            instead = training.fit(pipe, inputs, str(out.with_suffix(".parts")))
        asked = {"quality": quality} if speed is None else {"speed": speed}
        artifact = EarlyExit.calibrate(pipe, inputs, rest=instead, **asked)
        for line in said(artifact):
            typer.echo(line)
        with saved(artifact, out) as ref:
            write_recipe(out, Recipe((EarlyExit(ref),)), name=out.stem)
        typer.echo(f"wrote {out}; measure it with: accel measure {out} --model {model}")


def said(artifact: Artifact) -> list[str]:
    """How many blocks run, step by step."""
    from caches._exits import depths_of
    from caches.schedule import of_artifact

    schedule = of_artifact(artifact)
    slot = schedule.columns[0].partition(".")[0]
    depths = depths_of(schedule, slot)
    return [
        f"{schedule.share():.0%} of the blocks run",
        f"at each step, of {max(depths)}: {' '.join(map(str, depths))}",
    ]
