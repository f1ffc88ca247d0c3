"""How commands end: in one line on stderr and an exit code, never in a traceback of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

MAX_PROBLEMS = 50


def fail(lines: str | Sequence[str], code: int = 2) -> typer.Exit:
    """Print problems on stderr, one per line; raise what is returned."""
    listed = [lines] if isinstance(lines, str) else list(lines)
    for line in listed[:MAX_PROBLEMS]:
        typer.echo(line, err=True)
    if len(listed) > MAX_PROBLEMS:
        typer.echo(f"... and {len(listed) - MAX_PROBLEMS} more problems", err=True)
    return typer.Exit(code)


@contextlib.contextmanager
def told(folder: Path | None = None) -> Iterator[None]:
    """Turn the errors that a person can act on into one line and exit code 2; names `folder`."""
    import sqlite3

    from apps.render.faults import StorageFault, WorkersDie
    from apps.render.jobs import JobFileError
    from apps.render.ledger import LedgerCorrupt
    from apps.render.lock import FolderBusy

    try:
        yield
    except JobFileError as error:
        raise fail(error.problems) from None
    except sqlite3.DatabaseError as error:
        where = f" in {folder}" if folder else ""
        raise fail(f"the ledger{where} cannot be used: {error}") from None
    except WorkersDie as error:
        raise fail(str(error), code=1) from None
    except StorageFault as error:
        raise fail(str(error), code=1 if error.started else 2) from None
    except KeyboardInterrupt:
        raise fail("interrupted", code=130) from None
    except (OSError, FolderBusy, LedgerCorrupt, ValueError, ImportError) as error:
        raise fail(" ".join(_words(error).split())) from None


def _words(error: BaseException) -> str:
    """An error of the operating system without its number; others as they are."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)[:200]}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)
