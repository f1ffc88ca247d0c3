"""`accel sheet A B`: two renders of the same jobs side by side, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.say import told


def register(app: typer.Typer) -> None:
    app.command()(sheet)


def sheet(
    baseline: Annotated[Path, typer.Argument(help="Folder of the unaccelerated render.")],
    accelerated: Annotated[list[Path], typer.Argument(help="Folders of accelerated renders.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("sheet.png"),
    title: Annotated[str, typer.Option(help="Printed on top.")] = "",
) -> None:
    """Write a labelled contact sheet: a row per folder, a column per job."""
    with told():
        from apps.sheet import write_sheet

        columns = write_sheet([baseline, *accelerated], out, title=title)
        typer.echo(f"{out}: {columns} jobs, {1 + len(accelerated)} rows")
