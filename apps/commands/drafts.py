"""`accel calibrate draft`: which recipe's drafts rank a model's seeds as its renders do?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.device import Device, Dtype, NumberType, plain_pipeline
from apps.commands.say import told

if TYPE_CHECKING:
    from samplers.search.draft_commit import Calibration


def draft(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files that make drafts.")],
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    verifier: Annotated[str, typer.Option(help="What scores; see `accel search --help`.")],
    jobs: Annotated[
        Path | None, typer.Option(help="Job file of one-sample calls; zoo models have their own.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Inputs that are used.")] = 8,
    candidates: Annotated[int, typer.Option(min=2, help="Seeds of each input.")] = 8,
    capture: Annotated[
        float, typer.Option(min=0, max=1, help="Share of best-of-N's gain that is wanted.")
    ] = 0.95,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Folder of journals, one for each recipe's content; a stopped one goes on."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
) -> None:
    """Draft and render the same seeds, and say how much of best-of-N's gain drafts capture.

    Names the cheapest recipe that captures enough, for `accel search --algorithm draft-commit`.
    """
    with told():
        import torch

        import accel
        from samplers.search.conduct import SearchSettings
        from samplers.search.draft_commit import calibrate
        from samplers.search.verifiers.names import verifier_named

        torch.set_num_threads(threads)
        found = [accel.read_recipe(path) for path in recipes]
        pipe = plain_pipeline(model, device, dtype)
        inputs = _inputs(pipe, model, jobs, count)
        judge = verifier_named(verifier, device=str(pipe.device))
        doing = f"{len(inputs)} inputs x {candidates} seeds, rendered once and drafted with each"
        typer.echo(doing, err=True)
        results = {}
        for path, file in zip(recipes, found, strict=True):
            journal = None if keep is None else str(keep / file.sha256[:16])
            settings = SearchSettings(held_out=(), journal=journal)
            results[str(path)] = calibrate(
                pipe, inputs, judge, file.recipe, candidates=candidates, settings=settings
            )
        for line in table(results, capture):
            typer.echo(line)


def _inputs(pipe: Any, model: str, jobs: Path | None, count: int) -> list[dict[str, Any]]:
    """Calls that make one sample each."""
    from apps.digits_referee import standard_inputs
    from apps.render.jobs import read_jobs

    if jobs is not None:
        return [placed.job.inputs for placed in read_jobs(jobs)][:count]
    if not model.startswith("zoo:"):
        raise ValueError(f"no inputs are known for {model}; give some with --jobs FILE")
    single: list[dict[str, Any]] = []
    for call in standard_inputs(pipe):
        listed = next(
            (k for k in ("prompt", "class_labels") if isinstance(call.get(k), list)), None
        )
        if listed is None:
            single.append(call)
            continue
        one = (lambda x: x) if listed == "prompt" else (lambda x: [x])
        single += [{**call, listed: one(x)} for x in call[listed]]
    return single[:count]


def table(results: dict[str, Calibration], capture: float) -> list[str]:
    """The figures as lines of text, and the choice. Work is in operations, cost in work."""
    width = max(len(name) for name in results) + 2
    heads = "evaluations    work   rank correlation     captured gain        cost of best-of-N"
    lines = [f"{'':<{width}}{heads}"]
    for name, row in results.items():
        rank, got = (_span(x) for x in (row.rank, row.captured))
        work = row.price if row.work is None else row.work
        lines.append(f"{name:<{width}}{100 * row.price:9.0f} % {100 * work:5.0f} %   "
                     f"{rank:<20} {got:<20} "
                     f"{100 * row.cost:.1f} %")  # fmt: skip
    enough = [(row.cost, name) for name, row in results.items() if row.captured.estimate >= capture]
    if enough:
        lines.append(f"cheapest that captures {capture:.0%}: {min(enough)[1]}")
    else:
        lines.append(f"none captures {capture:.0%}; draft more carefully, or search at random")
    return lines


def _span(interval: Any) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*interval)
