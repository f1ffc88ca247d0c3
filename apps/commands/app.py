"""`accel app`: the suite in a browser."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from apps.commands.device import Dtype
from apps.commands.say import fail, told

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def register(app: typer.Typer) -> None:
    app.command("app")(run)


def run(
    out: Annotated[
        Path, typer.Option(help="Everything is written here, and only media of it is served.")
    ] = Path("out/app"),
    model: Annotated[
        list[Path] | None, typer.Option(help="A model folder beside the zoo; may stand repeatedly.")
    ] = None,
    recipes: Annotated[
        list[Path] | None, typer.Option(help="A folder of recipes beside the shipped ones.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    listen: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 for other machines, who then need a password.")
    ] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="A public address through gradio.live, with a password.")
    ] = False,
    auth: Annotated[
        Path | None, typer.Option(help="File with one line user:password; default: a new one.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of the worker.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Number type of the models.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
) -> None:
    """Open the app: create, compare, render in bulk, evaluate and look at recipes in a browser.

    It can be reached from this machine only, unless --listen or --share is given.
    """
    with told():
        try:
            from apps.web.server import LOCAL, Serving, credentials, serve
            from apps.web.site import Site

            if listen != LOCAL or share:
                user = credentials(auth)
            else:
                user = credentials(auth) if auth is not None else None
            import gradio  # noqa: F401  named here, where its lack can be told
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise fail("the app needs Gradio; install it with: pip install -e '.[app]'") from None
        site = Site(
            out=out.resolve(),
            models=_models(model or []),
            recipe_folders=tuple(_folder(path) for path in [SHIPPED, *(recipes or [])] if
                                 path != SHIPPED or path.is_dir()),
            threads=threads,
            dtype=dtype.value,
            device=_device(device),
        )  # fmt: skip
        serve(site, Serving(port, listen, share, user), lambda *at: _say(site, user, auth, at))


def _say(
    site: object, user: tuple[str, str] | None, auth: Path | None, at: tuple[str, str | None]
) -> None:
    local, public = at
    typer.echo(f"accel is at {public or local}   (Ctrl-C ends it; batches can be resumed)")
    if user is not None and auth is None:
        typer.echo(f"user: {user[0]}   password: {user[1]}")


def _models(folders: list[Path]) -> tuple[str, ...]:
    """The models of the zoo that are pipelines, and the folders given."""
    from accel import zoo

    named = [f"zoo:{n}" for n in zoo.names() if (zoo.path(n) / "model_index.json").is_file()]
    for folder in folders:
        if not (folder / "model_index.json").is_file():
            raise fail(f"--model {folder}: no diffusers folder (no model_index.json)")
    named.sort(key=lambda name: name != "zoo:digits-dit")
    return (*named, *(str(folder.resolve()) for folder in folders))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise fail(f"--recipes {path}: no such folder")
    return path.resolve()


def _device(wanted: Device) -> str:
    """`auto` asks the driver's device file, not torch: the page should not wait for its import."""
    if wanted is not Device.auto:
        return wanted.value
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
