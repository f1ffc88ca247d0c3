"""The `accel` program. Commands live in `apps/commands/`, one file each, and are registered here.

Nothing heavy is imported until a command runs, so that `accel --help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import sys

import typer

COMMANDS = ("render", "folder", "rerender", "catalogue", "measure", "calibrate", "sheet")
COMMANDS += ("evaluate", "app", "search")

app = typer.Typer(
    name="accel",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Accelerate diffusers pipelines, and render jobs with them without losing one.",
)
for _name in COMMANDS:
    importlib.import_module(f"apps.commands.{_name}").register(app)


def main() -> None:
    """Entry point; errors a person can act on are one line on stderr (`commands/say.py`)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name need not be UTF-8
    app()


if __name__ == "__main__":
    main()
