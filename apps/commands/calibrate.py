"""`calibrate`: what a method needs to know of a model before it can be used with care."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.calibrate_bits import bits
from apps.commands.calibrate_depth import depth
from apps.commands.calibrate_tfmq import tfmq
from apps.commands.calibration import model_and_inputs, saved
from apps.commands.device import Device, Dtype, NumberType
from apps.commands.drafts import draft
from apps.commands.say import told

if TYPE_CHECKING:
    from sparse_attn.budgets import Allocation
    from sparse_attn.subblock_lse import SubblockLSE

commands = typer.Typer(no_args_is_help=True, help="Measure what a method needs to know of a model.")


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="calibrate")
    commands.command()(sparse)
    commands.command()(tfmq)
    commands.command()(bits)
    commands.command()(draft)
    commands.command()(depth)


@commands.callback()
def calibrate() -> None:
    """Measure what a method needs to know of a model."""


def sparse(
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Recipe file to write; its artifact goes beside it.")],
    jobs: Annotated[
        Path | None,
        typer.Option(help="Job file whose inputs and seeds are used; zoo models have their own."),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Inputs; the last is held out.")] = 3,
    quality: Annotated[
        float, typer.Option(min=1, help="PSNR to what dense attention makes that is kept, in dB.")
    ] = 30.0,
    density: Annotated[
        float | None, typer.Option(min=0.05, max=1, help="Mean density instead of a quality.")
    ] = None,
    blocks: Annotated[
        tuple[int, int], typer.Option(help="Tokens of a block of queries, of keys.")
    ] = (256, 64),
    dense: Annotated[float, typer.Option(min=0, max=1, help="First steps left dense.")] = 0.2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
) -> None:
    """Budgets of sparse attention for each layer and noise level, within a loss of quality.

    An input takes as long as about ten plain runs; a stopped calibration goes on where it was.
    The quality is then checked on an input that was held out.
    """
    with told():
        import torch

        from accel.method import Recipe
        from accel.recipe_file import write_recipe
        from sparse_attn.budgets import Budgets
        from sparse_attn.calibrate import CalibrationSettings
        from sparse_attn.subblock_lse import SubblockLSE

        torch.set_num_threads(threads)
        pipe, inputs, seeds = model_and_inputs(model, jobs, (device, dtype), count)
        calls = [
            {**x, "generator": torch.Generator("cpu").manual_seed(seed)}
            for x, seed in zip(inputs, seeds, strict=True)
        ]
        settings = CalibrationSettings(blocks=blocks, dense=dense)
        kept = out.with_suffix(".parts")
        typer.echo(f"{len(calls) - 1} inputs, each kept in {kept}", err=True)
        artifact = SubblockLSE.calibrate(pipe, calls[:-1], settings, str(kept))
        with saved(artifact, out) as ref:
            budgets = Budgets.load(ref, pipe)
            chosen = budgets.at_quality(quality) if density is None else budgets.at_density(density)
            share = min(1.0, chosen.density)
            method = SubblockLSE((dense, 0.0), blocks, density=share, artifact=ref)
            typer.echo(f"density {chosen.density:.3f}, expected PSNR {_expected(chosen)}")
            found = held_out(pipe, method, inputs[-1], seeds[-1])
            if found is not None:
                typer.echo(f"on an input held out: density {found[0]:.3f}, PSNR {found[1]:.1f} dB")
            write_recipe(out, Recipe((method,)), name=out.stem)
        typer.echo(f"wrote {out}; measure it with: accel measure {out} --model {model}")


def held_out(
    pipe: Any, method: SubblockLSE, call: dict[str, Any], seed: int
) -> tuple[float, float] | None:
    """Density and PSNR of an input, where the guard does not mind; None where all stays dense."""
    from dataclasses import replace

    from accel.measure import mean_psnr, pipeline_samples
    from accel.method import attached

    plain = pipeline_samples(pipe, call, seed)
    with attached(replace(method, guard=False), pipe) as live:
        sample = pipeline_samples(pipe, call, seed)
        detail = live.report()["runs"][0]["detail"]
    return (detail["density"], mean_psnr(sample, plain)) if "density" in detail else None


def _expected(chosen: Allocation) -> str:
    if chosen.extremes is None or math.isinf(chosen.quality):
        return f"{chosen.quality:.1f} dB"
    low, high = chosen.extremes
    return f"{chosen.quality:.1f} dB ({low:.1f} to {high:.1f} between inputs)"
