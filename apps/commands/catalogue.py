"""What there is: `models`, `methods`, `recipe check`, `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from apps.commands.say import fail, told

_FIGURES = ("speedup", "flops", "nfe", "psnr", "ssim")


def register(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(methods)
    app.command()(schema)
    recipes = typer.Typer(help="Look at recipe files.", no_args_is_help=True)
    recipes.command("check")(recipe_check)
    app.add_typer(recipes, name="recipe")


def models() -> None:
    """List the embedded models."""
    with told():
        from accel import zoo

        for name in zoo.names():
            index = zoo.path(name) / "model_index.json"
            if index.is_file():  # else a single model, such as a judge: nothing to render with
                kind = json.loads(index.read_text("utf-8"))["_class_name"]
                typer.echo(f"zoo:{name}  {kind}")


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods a recipe can name, with their measured effect."""
    from accel.methods import index

    rows = index()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{row['name']}\n    {row['summary']}")
        facts = [", ".join(row["slots"]), row["paper"], _measured(row["measured"])]
        typer.echo("    " + "; ".join(fact for fact in facts if fact))


def schema() -> None:
    """Print the JSON schema of a job."""
    from apps.render.jobs import job_schema

    typer.echo(json.dumps(job_schema(), indent=1))


def recipe_check(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    model: Annotated[str | None, typer.Option(help="Also try it on this model.")] = None,
) -> None:
    """Say whether a recipe can be read, and whether it fits a model. Exit code 2 if not."""
    with told():
        import accel

        found = accel.read_recipe(recipe)
        typer.echo(f"{found.name}: {len(found.recipe.methods)} methods, {found.sha256[:12]}")
        for method in found.recipe.methods:
            typer.echo(f"  {method}")
        typer.echo("  measured: " + (json.dumps(found.measured) if found.measured else "not yet"))
        if model is not None:
            _try_on(found.recipe, model)


def _try_on(recipe: object, model: str) -> None:
    import accel
    from accel.loading import quiet_loading

    try:
        with quiet_loading():
            pipe = accel.load(model)
    except (OSError, ValueError) as error:
        raise fail(f"model {model}: {' '.join(str(error).split())}") from None
    for live in reversed(accel.live_on(pipe)):
        live.detach()
    with accel.attached(recipe, pipe):  # pyright: ignore[reportArgumentType]
        typer.echo(f"  fits {model} ({type(pipe).__name__})")


def _measured(measured: object) -> str:
    """The measured row of a method in one line; intervals as `estimate (low to high)`."""
    if not isinstance(measured, dict):
        return "not measured yet"
    figures = [f"{key} {_figure(measured[key])}" for key in _FIGURES if measured.get(key)]
    distances = measured.get("frechet") or (measured.get("judged") or {}).get("frechet")
    if distances:
        figures.append(f"Frechet {distances['before']:.3g} -> {distances['after']:.3g}")
    where = ", ".join(
        str(measured[key]) for key in ("setting", "model", "hardware") if key in measured
    )
    return ", ".join(figures) + (f" [{where}]" if where else "")


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['estimate']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
    if isinstance(value, list):
        return " -> ".join(_figure(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
