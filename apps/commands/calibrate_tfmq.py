"""`calibrate tfmq`: a quantised form of a model, from some calls of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from apps.commands.calibration import model_and_inputs, saved
from apps.commands.device import Device, Dtype, NumberType
from apps.commands.say import told


class Rounding(StrEnum):
    nearest = "nearest"
    gptq = "gptq"
    adaround = "adaround"


class Temporal(StrEnum):
    cache = "cache"
    tiar = "tiar"
    plain = "plain"


class Activations(StrEnum):
    auto = "auto"
    static = "static"
    groups = "groups"
    token = "token"
    whole = "whole"


def tfmq(
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Recipe file to write; its artifact goes beside it.")],
    jobs: Annotated[
        Path | None,
        typer.Option(help="Job file whose inputs are used; zoo models have their own."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pipeline calls to calibrate on.")] = 2,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that the quantised model will be used with.")
    ] = None,
    bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of weights, 4 or 8.")] = 8,
    plan: Annotated[
        Path | None, typer.Option(help="Bits by layer instead, from `calibrate bits`.")
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="How inputs of layers get 8 bits; whole: not at all.")
    ] = Activations.auto,
    rounding: Annotated[Rounding, typer.Option(help="How weights are rounded.")] = Rounding.gptq,
    iterations: Annotated[
        int,
        typer.Option(min=1, help="Iterations of adaround for each part; thousands come nearer."),
    ] = 300,
    temporal: Annotated[
        Temporal,
        typer.Option(
            help="Layers that depend on the timestep alone: cache keeps their outputs, tiar "
            "calibrates them apart, plain like the rest."
        ),
    ] = Temporal.cache,
    only_faster: Annotated[
        bool | None,
        typer.Option(
            "--only-faster/--every-layer",
            help="Leave layers whole that integers make slower here; default with 8 bits.",
        ),
    ] = None,
    save_model: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the model to, too, for diffusers' from_pretrained, after "
            "`import quant.diffusers_quantizer`."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
) -> None:
    """Quantised weights and activations, part by part; a stopped calibration goes on where it was.

    The recipe that is written quantises, removes what depends on the timestep alone (unless told
    otherwise), and holds the methods of the recipe that was given.
    """
    with told():
        import torch

        import accel
        from accel.method import Recipe
        from accel.recipe_file import write_recipe
        from accel.settings import Settings
        from quant.calibrate import TFMQCalibration
        from quant.mixed_precision import read_plan
        from quant.temporal_cache import TemporalCache
        from quant.tfmq import TFMQ

        if bits not in (4, 8):
            raise ValueError(f"--bits {bits}: 4 or 8")
        torch.set_num_threads(threads)
        how = TFMQCalibration(
            bits=bits,
            activations=activations.value,
            rounding=rounding.value,
            steps=iterations,
            temporal=temporal.value,
            only_faster=bits == 8 and plan is None if only_faster is None else only_faster,
            plan=None if plan is None else Settings(read_plan(plan)),
        )
        pipe, inputs, _ = model_and_inputs(model, jobs, (device, dtype), count)
        others = accel.read_recipe(recipe).recipe if recipe is not None else Recipe(())
        has_cache = any(isinstance(method, TemporalCache) for method in others.methods)
        wants_cache = temporal is Temporal.cache and not has_cache
        others_too = ((TemporalCache(),) if wants_cache else ()) + others.methods
        Recipe(others_too).claims(pipe)  # raises where they cannot be used together
        artifact = how.fit(pipe, inputs, str(out.with_suffix(".parts")), others, say=typer.echo)
        with saved(artifact, out) as ref:
            write_recipe(out, Recipe((TFMQ(ref), *others_too)), name=out.stem)
        typer.echo(f"wrote {out}; measure it with: accel measure {out} --model {model}")
        if save_model is not None:
            from quant.diffusers_quantizer import save_quantised

            save_quantised(pipe, artifact, save_model)
            typer.echo(
                f"wrote {save_model}; accel loads it, and diffusers once "
                "quant.diffusers_quantizer is imported"
            )
