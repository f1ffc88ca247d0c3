"""`measure`: what a recipe gains and costs on a model, before it is used in bulk."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.device import Device, Dtype, NumberType, plain_pipeline
from apps.commands.say import fail, told

if TYPE_CHECKING:
    from accel.measure import Comparison, Study

QUIET_LOAD = 1.5  # processes beyond our own threads, of which load averages always show some


def register(app: typer.Typer) -> None:
    app.command()(measure)


def measure(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    jobs: Annotated[
        Path | None,
        typer.Option(help="Job file whose inputs and seeds are used; zoo models have their own."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Paired timings; one has no interval.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
    write: Annotated[
        bool, typer.Option(help="Store the figures in the recipe file, in place of those there.")
    ] = True,
) -> None:
    """Measure a recipe against the unmodified model, in turn: speed, work, memory, quality.

    The figures go into the `measured` block of the recipe file; nothing else in it changes. The
    block holds figures of one model: a second model's overwrite the first one's. Exit code 1, and
    nothing stored, if the recipe changed nothing.
    """
    with told():
        import torch

        import accel
        from apps.recipe_text import store_measured

        found = accel.read_recipe(recipe)
        torch.set_num_threads(threads)
        study = _study(model, jobs, device, dtype)
        doing = f"{len(study.inputs)} calls without and with {found.name}, then {rounds} rounds"
        typer.echo(f"{doing} of both in turn", err=True)
        result = study.compare(found.recipe, rounds=rounds)
        for line in table(found.name, model, result):
            typer.echo(line)
        if result.report["effect"] == "none":
            raise fail(_without_effect(found.name, result.report), code=1)
        if write:
            store_measured(recipe, {"model": model, **result.measured()})
            typer.echo(f"stored in {recipe}")


def _study(model: str, jobs: Path | None, device: str, dtype: Dtype) -> Study:
    """The model without any recipe, its inputs and, for zoo models, their referee."""
    from accel.measure import Study
    from apps.digits_referee import digits_referee, standard_inputs
    from apps.render.identity import model_revision
    from apps.render.jobs import read_jobs

    listed = [job.job for job in read_jobs(jobs)] if jobs is not None else []
    zoo = model.startswith("zoo:")
    if jobs is None and not zoo:
        raise ValueError(f"no inputs are known for {model}; give some with --jobs FILE")
    pipe = plain_pipeline(model, device, dtype)
    inputs = [job.inputs for job in listed] if jobs is not None else standard_inputs(pipe)
    return Study(
        pipe,
        inputs,
        seeds=[job.seed for job in listed] if jobs is not None else None,
        referee=digits_referee(inputs) if zoo else None,
        model={"name": model, "revision": model_revision(model)},
    )


def _without_effect(name: str, report: dict[str, Any]) -> str:
    """A sentence on a recipe that did nothing in any run, with what its methods gave as reasons."""
    members = report["members"]
    names = " and ".join(m["method"].partition(":")[2] for m in members) or name
    why = dict.fromkeys(x for m in members for run in m["runs"] for x in run["fallbacks"])
    reasons = f" ({', '.join(why)})" if why else ""
    return (
        f"{names} changed nothing in these calls{reasons}: nothing was stored; give calls of more "
        "steps, or other settings"
    )


def table(name: str, model: str, result: Comparison) -> list[str]:
    """The figures as lines of text: without, with, and the change with its interval."""
    env = result.environment
    seconds = [statistics.median(s) for s in (result.time.seconds_a, result.time.seconds_b)]
    lines = [
        f"{name} on {model}: {result.samples} samples, {len(result.time.seconds_a)} rounds, "
        f"{env['hardware']}, {env['threads']} thread(s)",
        _line("", "without", "with", "change, with 95 % interval"),
        _line("seconds, median", *(f"{s:.3f}" for s in seconds), _span(result.time.speedup, "x")),
        _counted("operations (G)", result.flops, 1e9, "{:.2f}"),
        _counted("network evaluations", result.nfe, 1, "{:.0f}"),
        _counted("peak memory (MB)", result.peak_bytes, 1e6, "{:.1f}"),
        _line("PSNR", "", "", _span(result.psnr, " dB", "{:.1f}")),
    ]
    if result.ssim is not None:
        lines.append(_line("SSIM", "", "", _span(result.ssim, "", "{:.3f}")))
    lines += _judged(result)
    members = result.report.get("members", [])
    lines += [f"  {m['method']}: effect {m['effect']}" for m in members]
    load = max((x for x in env["load"] if x is not None), default=0.0)
    if load > env["threads"] + QUIET_LOAD:
        lines.append(f"the machine was busy (load {load}): expect other times on a quiet one")
    return lines


def _judged(result: Comparison) -> list[str]:
    judged = result.judged
    if judged is None:
        return []
    shares = [100 * x.estimate for x in (judged.before, judged.after)]
    points = [100 * x for x in judged.difference]
    change = f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
    lines = [_line("judged right", *(f"{s:.1f} %" for s in shares), change)]
    if judged.feature_distance is not None:
        lines.append(
            _line("feature distance", "", "", _span(judged.feature_distance, "", "{:.3f}"))
        )
    if judged.frechet is not None:
        before, after, floor = judged.frechet
        note = f"real to other real samples: {floor:.2f}"
        lines.append(_line("Frechet distance", f"{before:.2f}", f"{after:.2f}", note))
    return lines


def _line(what: str, *cells: str) -> str:
    """One row: without, with, change."""
    without, with_recipe, change = cells
    return f"  {what:<20}{without:>10}{with_recipe:>10}   {change}".rstrip()


def _counted(what: str, pair: tuple[int, int], unit: float, form: str) -> str:
    ratio = f"{pair[1] / pair[0]:.2f} of it" if pair[0] else "-"
    return _line(what, *(form.format(n / unit) for n in pair), ratio)


def _span(interval: Any, unit: str, form: str = "{:.2f}") -> str:
    estimate, low, high = (form.format(x) for x in interval)
    return f"{estimate}{unit} ({low} to {high})"
