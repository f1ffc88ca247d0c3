"""`accel search`: spend compute on better noise for one prompt; deliver the best, reproducibly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.device import Dtype, Kind, NumberType, kind_of_device
from apps.commands.render import ProgressKind, ProgressOption, Trust, _overrides
from apps.commands.say import fail, told

if TYPE_CHECKING:
    from apps.render.plan import PlannedTask


def register(app: typer.Typer) -> None:
    app.command()(search)


def explain(name: str | None) -> None:
    """``--explain NAME``: an algorithm's docstring, and its settings with what they are."""
    if name is None:
        return
    with told():
        import dataclasses
        import inspect

        from apps.search import ALGORITHMS, SearchRequest, search_of

        if name not in ALGORITHMS:
            raise ValueError(f"no algorithm {name!r}; known: {', '.join(ALGORITHMS)}")
        found = search_of(SearchRequest.model_validate({"algorithm": name, "verifier": "judge"}))
        typer.echo(inspect.cleandoc(inspect.getmodule(type(found)).__doc__ or ""))
        typer.echo(f"\nSettings of {name}:\n\n{inspect.getdoc(type(found))}\n")
        for field in dataclasses.fields(found):
            typer.echo(f"  --set settings.{field.name}={_as_set(getattr(found, field.name))}")
    raise typer.Exit(0)


def _as_set(value: Any) -> str:
    import json

    return json.dumps(value)


def search(
    model: Annotated[str, typer.Option(help="zoo:NAME, folder or hub id.")],
    verifier: Annotated[
        str,
        typer.Option(
            help="What scores: brightness, sharpness, ..., judge (zoo), clip:FOLDER, "
            "pickscore:FOLDER, hps:FOLDER, worker:COMMAND, http://..., or several joined by +."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="random, zero-order, draft-commit, paths, particles, evolution, rollover, "
            "gradient, correctors; --explain NAME says more."
        ),
    ] = "random",
    budget: Annotated[
        str, typer.Option(help="'8 renders', '320 evaluations' or '60 seconds'.")
    ] = "8 renders",
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe file; of the drafts alone with draft-commit and gradient."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder; a search is resumed from it.")] = Path(
        "out"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="inputs.guidance_scale=2, name=x, settings.candidates=16."),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Verifiers that are reported, never searched.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Search at random at equal cost, too.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many held-out losses in a row.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Candidates in one call.")] = 8,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Kind = "auto",
    progress: ProgressOption = ProgressKind.rich,
    trust_remote_code: Trust = False,
    explained: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="NAME",
            is_eager=True,
            callback=explain,
            help="What an algorithm does, and its settings.",
        ),
    ] = None,
) -> None:
    """Search the noise of one call, and render the winner.

    Beside the picture and its sidecar: NAME.search.json (every candidate), NAME.candidates.png and
    NAME.curve.png. `accel rerender` makes the winner again without searching. The same command
    goes on where it was killed.
    """
    with told():
        from apps.render.jobs import check_jobs
        from apps.render.plan import Settings, plan

        overrides = _overrides(options, prompt, None)
        wanted: dict[str, Any] = {
            "algorithm": algorithm,
            "verifier": verifier,
            "budget": budget,
            "baseline": baseline,
            "batch": batch,
            "settings": _taken(overrides, "settings."),
        }
        wanted |= {} if held_out is None else {"held_out": held_out}
        wanted |= {} if patience is None else {"patience": patience}
        job = {"seed": seed, "search": wanted}
        placed = check_jobs([("command line", job)], overrides)
        settings = Settings(
            model=model,
            recipe=None if recipe is None else str(recipe),
            threads=threads,
            dtype=dtype.value,
            device=kind_of_device(device),
            trusted=True,
        )
        tasks = plan(placed, settings, Path())
        _run(out, tasks, progress.value, trust_remote_code)


def _taken(overrides: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Overrides that begin with ``prefix``, taken out of ``overrides``."""
    found = {k.removeprefix(prefix): v for k, v in overrides.items() if k.startswith(prefix)}
    for key in found:
        del overrides[prefix + key]
    return found


def _run(out: Path, tasks: list[PlannedTask], progress: str, trust: bool) -> None:
    from apps.render.driver import RunOptions, submit
    from apps.render.outputs import read_sidecar
    from apps.render.progress import make

    own = frozenset(task.id for task in tasks)  # the folder may hold others, which are not trusted
    options = RunOptions(trust_remote_code=trust, trusted=own)
    summary = submit(out, tasks, options, make(progress))
    stem = tasks[0].stem
    content = read_sidecar(out / f"{stem}.json")
    if content is None or content["identity"] != tasks[0].id:
        own = [t.error for t in summary.failures if t.id == tasks[0].id]
        reason = (own or [summary.stopped or "it was interrupted"])[0]
        raise fail(f"no winner: {reason}", code=130 if summary.interrupted else 1)
    if progress != "json":
        for line in lines(out, stem, content):
            typer.echo(line)
    raise typer.Exit(0)


def lines(out: Path, stem: str, content: dict[str, Any]) -> list[str]:
    """What a person reads at the end."""
    found = content["search"]
    spent = found["ledger"]["spent"]
    told = [
        f"{out / content['files'][0]['name']}: the best of {found['candidates']} candidates, "
        f"{spent['evaluations']} evaluations, {spent['decodes']} decodes, {spent['verified']} "
        f"scores, {spent['seconds']:.1f} s ({found['stopped']})"
    ]
    for name, figures in found["gain"].items():
        kind = "held out" if name in found["held_out"] else "searched"
        text = f"  {name} ({kind}): {figures['winner']:.4g}"
        if "mean" in figures:
            text += f"; a draw has {figures['mean']:.4g}, spread {figures['spread']:.3g} over"
            text += f" {figures['draws']}"
        if "baseline_best" in figures:
            text += f"; best at random at equal cost: {figures['baseline_best']:.4g}"
        told.append(text)
    told.append(f"  look at {out / stem}.candidates.png and {out / stem}.curve.png")
    return told
