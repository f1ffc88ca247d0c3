"""`make demo`: one file of jobs, rendered without and with acceleration, compared and shown.

    python -m apps.demo [--out demo] [--jobs examples/demo.jsonl] [--recipes FILE ...]

Run it twice and the second run renders nothing: finished work is skipped. Speeds are measured
apart from the render, plain and accelerated in turn, so that a busy machine does not decide them.
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
from typing import TYPE_CHECKING

from apps.pairs import Pair, Rendered, finished, pair
from apps.render.driver import RunOptions, submit
from apps.render.faults import StorageFault
from apps.render.jobs import JobFileError, read_jobs
from apps.render.lock import FolderBusy
from apps.render.plan import Settings, plan
from apps.render.progress import make
from apps.sheet import mean_psnr, shown, write_sheet

if TYPE_CHECKING:
    from accel.measure import PairedTime

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5  # of paired timing; each is one plain and one accelerated call


@dataclass(frozen=True)
class Result:
    """One render of the demo: its outputs, its pairs against the baseline, its paired time."""

    name: str
    rendered: list[Rendered]
    pairs: list[Pair]
    time: PairedTime | None

    @property
    def speed(self) -> str:
        return "1.00x" if self.time is None else f"{self.time.speedup.estimate:.2f}x"


def run(jobs: Path, model: str, recipes: Sequence[Path], out: Path, threads: int) -> list[Result]:
    """Render `jobs` without and with each recipe into folders of `out`; the baseline comes first.

    Raises:
        ValueError: the jobs, the model or a recipe are not usable, or a job failed.
    """
    results: list[Result] = []
    for recipe in [None, *recipes]:
        name = "baseline" if recipe is None else recipe.stem
        given = None if recipe is None else str(recipe)
        tasks = plan(
            read_jobs(jobs), Settings(model=model, recipe=given, threads=threads), jobs.parent
        )
        summary = submit(out / name, tasks, RunOptions(), make("rich"))
        if summary.exit_code != 0:
            why = summary.stopped or "; ".join(t.error or "" for t in summary.failures)
            raise ValueError(f"{name}: not every job could be rendered: {why}")
        print(f"{name}: {summary.made} rendered, {summary.skipped} there already", flush=True)
        wanted = {task.id for task in tasks}
        made = [r for r in finished(out / name) if r.content["identity"] in wanted]
        pairs = pair(results[0].rendered, made) if results else []
        timed = None if recipe is None else measure(made[0], recipe)
        results.append(Result(name, made, pairs, timed))
    return results


def measure(job: Rendered, recipe: Path) -> PairedTime:
    """Time one job's pipeline call without and with a recipe, in turn."""
    import torch

    import accel
    from accel.loading import quiet_loading
    from accel.measure import paired_time
    from apps.render.stages import generators, sample_count

    payload = job.content["payload"]
    inputs, seed = payload["job"]["inputs"], payload["job"]["seed"]
    with quiet_loading():
        pipe = accel.load(payload["model"])
    pipe.set_progress_bar_config(disable=True)
    found = accel.read_recipe(recipe).recipe
    changed = {**inputs, **found.call_changes()}

    def plain() -> None:
        pipe(**inputs, generator=generators(seed, sample_count(inputs)))

    def accelerated() -> None:
        with accel.attached(found, pipe):
            pipe(**changed, generator=generators(seed, sample_count(inputs)))

    before = torch.get_num_threads()
    torch.set_num_threads(payload["threads"])
    try:
        return paired_time(plain, accelerated, rounds=ROUNDS)
    finally:
        torch.set_num_threads(before)


def print_table(results: Sequence[Result], threads: int) -> None:
    """Times and paired quality of every render against the first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the same jobs, the same seeds", title_justify="left")
    for heading in ("render", "evaluations", "time each", "speed", "PSNR", "SSIM", "fallbacks"):
        name = heading == "render"
        table.add_column(heading, justify="left" if name else "right", no_wrap=name)
    baseline = [second for r in results if r.time is not None for second in r.time.seconds_a]
    for result in results:
        seconds = baseline if result.time is None else list(result.time.seconds_b)
        timed = shown(statistics.median(seconds)) if seconds else "-"
        counted = statistics.median(r.evaluations or 0 for r in result.rendered)
        table.add_row(result.name, f"{counted:.0f}", timed, result.speed, *_quality(result))
    console = Console()
    console.print(table)
    console.print(
        f"speed: median of {ROUNDS} paired rounds of one job, {threads} thread(s) of "
        f"{os.cpu_count()} cores; PSNR and SSIM: mean over the jobs, each against its baseline; "
        "an embedded model of toy size: evidence that it works, no claim about large models",
        highlight=False,
    )


def _quality(result: Result) -> tuple[str, str, str]:
    if not result.pairs:
        return "-", "-", "-"
    ssim = statistics.mean(p.ssim for p in result.pairs)
    fallbacks = sum(bool(r.content.get("fallback")) for r in result.rendered)
    return mean_psnr(result.pairs), f"{ssim:.3f}", str(fallbacks)


def measured_on(model: str) -> list[Path]:
    """The recipes that were measured on a model: single methods first, then by speed."""
    import accel

    found = [accel.read_recipe(path) for path in (ROOT / "recipes").glob("*.yaml")]
    kept = [(f, f.measured) for f in found if f.measured and f.measured["model"] == model]
    kept.sort(key=lambda pair: (len(pair[0].recipe.methods), pair[1]["speedup"]["estimate"]))
    return [f.path for f, _ in kept if f.path is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description="Render a demo with and without acceleration.")
    parser.add_argument("--jobs", type=Path, default=ROOT / "examples" / "demo.jsonl")
    parser.add_argument("--model", default="zoo:digits-dit")
    parser.add_argument("--recipes", type=Path, nargs="*", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    given = parser.parse_args(arguments)
    recipes = measured_on(given.model) if given.recipes is None else given.recipes
    started = time.monotonic()
    try:
        results = run(given.jobs, given.model, recipes, given.out, given.threads)
        print_table(results, given.threads)
        sheet = given.out / "sheet.png"
        folders = [given.out / result.name for result in results]
        speeds = {result.name: f"{result.speed} as fast" for result in results if result.time}
        write_sheet(folders, sheet, title=_title(given.model), speeds=speeds)
    except (JobFileError, StorageFault, FolderBusy, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"contact sheet: {sheet}   ({time.monotonic() - started:.0f} s)")
    return 0


def _title(model: str) -> str:
    return f"{model}: the same jobs, without and with acceleration"


if __name__ == "__main__":
    sys.exit(main())
