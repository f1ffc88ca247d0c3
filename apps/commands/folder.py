"""Commands on the folder of a render: `status`, `resume`, `retry`, `cancel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.commands.render import (
    ProgressKind,
    ProgressOption,
    Trust,
    TrustVerifiers,
    Wait,
    Workers,
    run,
)
from apps.commands.say import fail, told

if TYPE_CHECKING:
    from apps.render.ledger import Ledger, Task

Folder = Annotated[Path, typer.Argument(help="Output folder of a render.")]
Jobs = Annotated[list[str] | None, typer.Argument(help="Names, or starts of identities.")]


def register(app: typer.Typer) -> None:
    for command in (status, resume, retry, cancel):
        app.command()(command)


def status(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False
) -> None:
    """Say how far a render is, which jobs failed and why."""
    with told(folder), _ledger(folder, to_read=True) as ledger:
        counts, tasks = ledger.counts(), ledger.tasks("running", "failed")
    if as_json:
        rows = [{"name": t.payload["stem"], "state": t.state, "error": t.error} for t in tasks]
        typer.echo(json.dumps({"counts": counts, "jobs": rows}))
        return
    typer.echo(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for task in tasks:
        what = f"{task.error_class}: {task.error}" if task.state == "failed" else "running"
        stage = f", finished stage: {task.stage}" if task.stage else ""
        typer.echo(f"{task.payload['stem']} ({task.attempts} attempts{stage}) {what}")


def resume(
    folder: Folder,
    workers: Workers = 1,
    progress: ProgressOption = ProgressKind.rich,
    wait: Wait = False,
    trust_remote_code: Trust = False,
    trust_verifiers: TrustVerifiers = False,
) -> None:
    """Render what is left; failed and cancelled jobs stay as they are."""
    with told(folder):
        run(
            folder, None, workers, progress.value, wait=wait, trust=trust_remote_code,
            trust_verifiers=trust_verifiers,
        )  # fmt: skip


def retry(
    folder: Folder,
    jobs: Jobs = None,
    workers: Workers = 1,
    progress: ProgressOption = ProgressKind.rich,
    wait: Wait = False,
    trust_remote_code: Trust = False,
    trust_verifiers: TrustVerifiers = False,
) -> None:
    """Render failed jobs again: all of them, or the named ones (also if they were cancelled)."""
    with told(folder):
        with _ledger(folder) as ledger:
            if jobs:
                ids = [task.id for task in _find(ledger, jobs)]
            else:
                ids = [task.id for task in ledger.tasks("failed")]
        run(
            folder, None, workers, progress.value, wait=wait, trust=trust_remote_code,
            trust_verifiers=trust_verifiers, retry=ids,
        )  # fmt: skip


def cancel(folder: Folder, jobs: Jobs = None) -> None:
    """Cancel jobs that wait, and ask running ones to stop: all of them, or the named ones."""
    with told(folder), _ledger(folder) as ledger:
        ids = [task.id for task in _find(ledger, jobs)] if jobs else None
        now, asked = ledger.cancel(ids)
    typer.echo(f"{now} cancelled, {asked} running asked to stop")


def _ledger(folder: Path, *, to_read: bool = False) -> Ledger:
    from apps.render.ledger import Ledger, LedgerCorrupt, is_writable
    from apps.render.recovery import LEDGER_FILE

    if not (folder / LEDGER_FILE).is_file():
        raise fail(f"{folder} holds no render (no {LEDGER_FILE})")
    if to_read and not is_writable(folder):
        return Ledger.look(folder / LEDGER_FILE)
    try:
        return Ledger.open(folder / LEDGER_FILE)
    except LedgerCorrupt as error:
        raise fail(f"{error}; `accel resume {folder}` keeps it aside and rebuilds it") from None


def _find(ledger: Ledger, wanted: list[str]) -> list[Task]:
    tasks = [task for task in ledger.tasks() if task.state != "superseded"]
    found = []
    for text in wanted:
        name = text.removesuffix(".png").removesuffix(".mp4").removesuffix(".json")
        hits = [t for t in tasks if t.payload["stem"] == name]
        hits = hits or [t for t in tasks if len(text) >= 6 and t.id.startswith(text)]
        if len(hits) != 1:
            raise fail(f"{text!r} is {'ambiguous' if hits else 'no job of this folder'}")
        found += hits
    return found
