"""`accel rerender FILE`: make a finished output again from what it carries, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.render import ProgressKind, ProgressOption, Trust
from apps.commands.say import told


def register(app: typer.Typer) -> None:
    app.command()(rerender)


def rerender(
    file: Annotated[Path, typer.Argument(help="A .png or .mp4 made by accel, or its .json.")],
    out: Annotated[Path | None, typer.Option(help="Keep the result here.")] = None,
    progress: ProgressOption = ProgressKind.rich,
    trust_remote_code: Trust = False,
) -> None:
    """Render a file again and compare the raw frames. Exit code 0: the same; 1: they differ."""
    with told():
        from apps.render.progress import make
        from apps.render.rerender import again

        verdict = again(file, out, make(progress.value), trust_remote_code)
        for line in verdict.lines():
            typer.echo(line)
        raise typer.Exit(0 if verdict.same else 1)
