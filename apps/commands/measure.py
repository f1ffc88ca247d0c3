"""`measure`: what a recipe gains and costs on a model, before it is used in bulk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.commands.say import told

if TYPE_CHECKING:
    from accel.measure import Comparison


def register(app: typer.Typer) -> None:
    app.command()(measure)


def measure(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    jobs: Annotated[Path, typer.Option(help="Job file whose inputs and seeds are used.")],
    rounds: Annotated[int, typer.Option(min=1, help="Paired timings.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    write: Annotated[bool, typer.Option("--write", help="Store it in the recipe.")] = False,
) -> None:
    """Measure a recipe against the unmodified model: paired speed, counted work, fidelity."""
    with told():
        import torch

        import accel
        from accel.loading import quiet_loading
        from accel.measure import compare
        from apps.render.jobs import read_jobs

        listed = [job.job for job in read_jobs(jobs)]
        found = accel.read_recipe(recipe)
        torch.set_num_threads(threads)
        with quiet_loading():
            pipe = accel.load(model, device=device)
        for live in reversed(accel.live_on(pipe)):
            live.detach()  # a folder's own recipe must not stand on both sides
        pipe.set_progress_bar_config(disable=True)
        result = compare(
            pipe,
            found.recipe,
            [job.inputs for job in listed],
            seeds=[job.seed for job in listed],
            rounds=rounds,
        )
        _show(found.name, model, result)
        if write:
            measured = {"model": model, **result.measured()}
            accel.write_recipe(
                recipe,
                found.recipe,
                name=found.name,
                description=found.description,
                measured=measured,
            )
            typer.echo(f"written into {recipe}")


def _show(name: str, model: str, result: Comparison) -> None:
    speed, psnr, ssim = result.time.speedup, result.psnr, result.ssim
    typer.echo(f"{name} on {model}: {result.samples} samples, {len(result.time.seconds_a)} rounds")
    typer.echo(f"  speed-up  {speed.estimate:.2f}x ({speed.low:.2f} to {speed.high:.2f})")
    typer.echo(f"  work      {result.flops[1] / result.flops[0]:.2f} of the operations")
    typer.echo(f"  network   {result.nfe[1]} of {result.nfe[0]} evaluations")
    typer.echo(f"  PSNR      {psnr.estimate:.1f} dB ({psnr.low:.1f} to {psnr.high:.1f})")
    if ssim is not None:
        typer.echo(f"  SSIM      {ssim.estimate:.3f} ({ssim.low:.3f} to {ssim.high:.3f})")
    for member in result.report.get("members", []):
        typer.echo(f"  {member['method']}: effect {member['effect']}")
