"""What there is: `models`, `methods`, `recipe check`, `schema`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.say import fail, told

if TYPE_CHECKING:
    from accel.method import Method

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
    name: Annotated[
        str | None, typer.Argument(help="One method: its settings, and how a recipe names it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods a recipe can name, with their measured effect; or explain one."""
    from accel.methods import index

    rows = index()
    if name is not None:
        with told():
            name = _full_name(name, [row["name"] for row in rows])
        rows = [row for row in rows if row["name"] == name]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{row['name']}\n    {row['summary']}")
        facts = [", ".join(row["slots"]), row["paper"], _measured(row["measured"])]
        typer.echo("    " + "; ".join(fact for fact in facts if fact))
    if name is not None:
        with told():
            from accel.methods import resolve

            for line in explained(resolve(name)):
                typer.echo(line)


def _full_name(name: str, known: list[str]) -> str:
    """``"caches.native:TaylorSeer"`` of its last part; a full one may be of anybody's package."""
    if ":" in name:
        return name
    found = [n for n in known if n.partition(":")[2].lower() == name.lower()]
    if len(found) != 1:
        raise ValueError(f"no method {name!r}; `accel methods` lists them")
    return found[0]


def explained(method: type[Method]) -> list[str]:
    """What a method's settings mean, and a recipe with their defaults, their types beside them."""
    from accel.method import Method

    above = method.__mro__[: method.__mro__.index(Method)]
    texts = [inspect.cleandoc(cls.__doc__) for cls in above if cls.__doc__]
    lines = ["", *"\n\n".join(texts).splitlines(), "", "In a recipe file, with the defaults:", ""]
    lines += ["accel_recipe: 1", "methods:", f"  - method: {method.name()}", "    settings:"]
    return lines + [_setting(field) for field in dataclasses.fields(method)]


def _setting(field: dataclasses.Field[Any]) -> str:
    """One line of YAML. Artifacts are files that calibrations write; they have no default."""
    from accel.settings import plain

    needed = field.default is dataclasses.MISSING
    if needed and "ArtifactRef" in str(field.type):
        value = "{path: artifacts/FILE.safetensors, sha256: ...}"
    else:
        value = "..." if needed else json.dumps(plain(field.default))
    return f"      {field.name}: {value}  # {field.type}{', to be given' * needed}"


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
        typer.echo("  measured: " + (_of_recipe(found.measured) if found.measured else "not yet"))
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


def _of_recipe(measured: dict[str, Any]) -> str:
    """The same of a recipe file, which has the hardware in its environment."""
    where = measured.get("environment")
    return _measured({**(where if isinstance(where, dict) else {}), **measured})


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['estimate']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
    if isinstance(value, list):
        return " -> ".join(_figure(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
