"""`make demo`: one file of jobs, rendered without and with acceleration, compared and shown.

    python -m apps.demo [--out demo] [--jobs examples/demo.jsonl] [--recipes recipes/*.yaml]

Run it twice and the second run renders nothing: finished work is skipped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.pairs import Pair, Rendered, finished, median_seconds, pair
from apps.render.driver import RunOptions, submit
from apps.render.faults import StorageFault
from apps.render.jobs import JobFileError, read_jobs
from apps.render.lock import FolderBusy
from apps.render.plan import Settings, plan
from apps.render.progress import make, print_summary
from apps.sheet import mean_psnr, shown, write_sheet

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    """One render of the demo: its name, its outputs, and its pairs against the baseline."""

    name: str
    rendered: list[Rendered]
    pairs: list[Pair]


def run(jobs: Path, model: str, recipes: Sequence[Path], out: Path) -> list[Result]:
    """Render `jobs` without and with each recipe into folders of `out`; the baseline comes first.

    Raises:
        ValueError: the jobs, the model or a recipe are not usable, or a job failed.
    """
    results: list[Result] = []
    for recipe in [None, *recipes]:
        name = "baseline" if recipe is None else recipe.stem
        settings = Settings(model=model, recipe=None if recipe is None else str(recipe))
        tasks = plan(read_jobs(jobs), settings, jobs.parent)
        print(f"\n{name}: {len(tasks)} jobs", flush=True)
        summary = submit(out / name, tasks, RunOptions(), make("rich"))
        print_summary(summary, str(out / name))
        if summary.exit_code != 0:
            raise ValueError(f"{name}: not every job could be rendered")
        wanted = {task.id for task in tasks}
        made = [r for r in finished(out / name) if r.content["identity"] in wanted]
        results.append(Result(name, made, pair(results[0].rendered, made) if results else []))
    return results


def print_table(results: Sequence[Result]) -> None:
    """Times and paired quality of every render against the first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the same jobs, the same seeds", title_justify="left")
    for heading in ("render", "time an image", "speed", "PSNR", "SSIM", "without recipe"):
        table.add_column(heading, justify="left" if heading == "render" else "right")
    for result in results:
        table.add_row(result.name, shown(median_seconds(result.rendered)), *_against(result))
    console = Console()
    console.print(table)
    console.print(
        "median over the jobs, loading excluded; PSNR and SSIM against the baseline, job by job; "
        f"1 thread of {os.cpu_count()} cores; a toy model, no claim about others"
    )


def _against(result: Result) -> tuple[str, str, str, str]:
    if not result.pairs:
        return "1.00x", "-", "-", "-"
    speed = statistics.median(p.speed_up for p in result.pairs)
    ssim = statistics.mean(p.ssim for p in result.pairs)
    fallbacks = sum(bool(r.content.get("fallback")) for r in result.rendered)
    return f"{speed:.2f}x", mean_psnr(result.pairs), f"{ssim:.3f}", str(fallbacks or "-")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description="Render a demo with and without acceleration.")
    parser.add_argument("--jobs", type=Path, default=ROOT / "examples" / "demo.jsonl")
    parser.add_argument("--model", default="zoo:digits-dit")
    parser.add_argument("--recipes", type=Path, nargs="*", default=None)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    given = parser.parse_args(arguments)
    recipes = given.recipes
    if recipes is None:
        recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    started = time.monotonic()
    try:
        results = run(given.jobs, given.model, recipes, given.out)
        print_table(results)
        sheet = given.out / "sheet.png"
        title = f"{given.model}: the same jobs, without and with acceleration"
        write_sheet([given.out / result.name for result in results], sheet, title=title)
    except (JobFileError, StorageFault, FolderBusy, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"contact sheet: {sheet}   ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
