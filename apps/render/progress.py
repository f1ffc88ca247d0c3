"""What a person (or a program) sees while a render runs. All events pass through one interface."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from apps.render.driver import Summary
    from apps.render.ledger import Task

MAX_LISTED = 10


class Progress(Protocol):
    """Gets everything that happens, in order."""

    def begin(self, counts: dict[str, int]) -> None: ...
    def event(self, event: dict[str, Any], task: Task) -> None: ...
    def say(self, line: str) -> None: ...
    def end(self, summary: Summary) -> None: ...


class Silent:
    """Says nothing; the caller prints the summary."""

    def begin(self, counts: dict[str, int]) -> None: ...
    def event(self, event: dict[str, Any], task: Task) -> None: ...
    def say(self, line: str) -> None: ...
    def end(self, summary: Summary) -> None: ...


class JsonLines:
    """One JSON object per line: `begin`, `say`, task events with `name`, and `end`."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._started = time.monotonic()

    def begin(self, counts: dict[str, int]) -> None:
        self._print({"event": "begin", "counts": counts})

    def event(self, event: dict[str, Any], task: Task) -> None:
        self._print({**event, "name": task.payload["stem"], "attempt": task.attempts})

    def say(self, line: str) -> None:
        self._print({"event": "say", "message": line})

    def end(self, summary: Summary) -> None:
        self._print(
            {
                "event": "end",
                "counts": summary.counts,
                "made": summary.made,
                "images": summary.images,
                "images_per_second": _rate(summary),
                "stopped": summary.stopped,
                "exit_code": summary.exit_code,
            }
        )

    def _print(self, row: dict[str, Any]) -> None:
        row["seconds"] = round(time.monotonic() - self._started, 3)
        print(json.dumps(row, sort_keys=True), file=self._stream, flush=True)


class RichBars:
    """A bar for the render and one per running task, on a terminal; failures as they happen."""

    def __init__(self, console: Any = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._rows: dict[str, Any] = {}
        self._all: Any = None
        self._images = 0
        self._started = time.monotonic()

    def begin(self, counts: dict[str, int]) -> None:
        todo = counts["pending"] + counts["running"]
        total = todo + counts["done"]
        self._bars.start()
        self._all = self._bars.add_task("jobs", total=total, completed=counts["done"], note="")
        self._started = time.monotonic()

    def event(self, event: dict[str, Any], task: Task) -> None:
        from rich.markup import escape

        kind, name = event["event"], escape(task.payload["stem"])
        if kind == "start":
            self._rows[task.id] = self._bars.add_task(f"  {name}", total=None, note="")
        row = self._rows.get(task.id)
        if row is None:
            return
        if kind == "step":
            self._bars.update(row, completed=event["step"], total=event["steps"])
        elif kind == "search":
            best = "-" if event["best"] is None else f"{event['best']:.4g}"
            note = escape(f"best {event['verifier']} {best}")
            self._bars.update(row, completed=round(100 * event["share"]), total=100, note=note)
        elif kind in ("stage", "loading"):
            note = "loading the model" if kind == "loading" else f"{event['stage']} done"
            self._bars.update(row, note=note)
        elif kind in ("done", "failed", "lost", "stopped", "cancelled"):
            self._bars.remove_task(self._rows.pop(task.id))
            self._finish(kind, event, name)

    def say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False)

    def end(self, summary: Summary) -> None:
        self._bars.stop()

    def _finish(self, kind: str, event: dict[str, Any], name: str) -> None:
        if kind == "done":
            self._images += len(event["result"]["files"])
            rate = self._images / max(time.monotonic() - self._started, 1e-9)
            self._bars.update(self._all, advance=1, note=f"{rate:.2f} images/s")
        elif "fault" in event:
            verdict = "will be tried again" if event.get("retry") else "failed"
            self.say(f"{name} {verdict}: {event['fault']['message']}")


def make(kind: str) -> Progress:
    """The progress called `rich`, `json` or `none`."""
    return {"rich": RichBars, "json": JsonLines, "none": Silent}[kind]()


def print_summary(summary: Summary, folder: str, console: Any = None) -> None:
    """The table a person reads at the end."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"render in {escape(folder)}", title_justify="left")
    for title in ("done", "made now", "images/s", "left", "failed", "cancelled", "seconds"):
        table.add_column(title, justify="right")
    counts = summary.counts
    table.add_row(
        str(counts["done"]),
        str(summary.made),
        f"{_rate(summary):.2f}" if summary.images else "-",
        str(summary.left),
        str(counts["failed"]),
        str(counts["cancelled"]),
        f"{summary.seconds:.1f}",
    )
    console.print(table)
    lines = [f"failed: {t.payload['stem']} ({t.error_class}): {t.error}" for t in summary.failures]
    lines += [f"rendered without the recipe: {n} ({why})" for n, why in summary.fallbacks]
    lines += [f"note: {name}: {note}" for name, note in summary.notes]
    for line in lines[:MAX_LISTED]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_LISTED:
        console.print(f"... and {len(lines) - MAX_LISTED} more; see: accel status {folder}")
    if summary.stopped:
        console.print(f"stopped: {summary.stopped}", markup=False, style="bold red")
    if summary.left:
        console.print(f"continue with: accel resume {folder}", markup=False)
    elif counts["failed"]:
        invalid = [task for task in summary.failures if task.error_class == "invalid"]
        if len(invalid) < counts["failed"]:
            console.print(f"try the failed ones again with: accel retry {folder}", markup=False)
        if invalid:
            console.print("invalid: correct the job and render again; a retry changes nothing")


def _rate(summary: Summary) -> float:
    return summary.images / summary.seconds if summary.seconds else 0.0
