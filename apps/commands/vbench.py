"""`accel evaluate vbench plan | generate | check | run | score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.device import Dtype, Kind, NumberType, kind_of_device
from apps.commands.render import ProgressKind, ProgressOption, Workers
from apps.commands.say import fail, told

Folder = Annotated[Path, typer.Argument(help="Folder of the run.")]
Dimensions = Annotated[
    list[str] | None, typer.Option("--dimension", help="May be repeated; default: all sixteen.")
]


def register(group: typer.Typer) -> None:
    own = typer.Typer(
        help="VBench: videos by the renderer, scores by its own code in its own interpreter.",
        no_args_is_help=True,
    )
    for command in (plan, generate, check, run, score):
        own.command(command.__name__)(command)
    group.add_typer(own, name="vbench")


def plan(
    folder: Folder,
    suite: Annotated[Path, typer.Option(help="VBench_full_info.json, from the vbench package.")],
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe file; default: none.")] = None,
    dimension: Dimensions = None,
    indices: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 5,
    flicker: Annotated[
        int, typer.Option(min=1, help="Videos of each prompt of temporal_flickering.")
    ] = 25,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompts of each dimension at most; of a part there is no VBench score."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Argument of the call: num_frames=17.")
    ] = None,
    fps: Annotated[int, typer.Option(min=1, max=240, help="Frames per second.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per worker.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Kind = "auto",
) -> None:
    """Say which videos will be made, and write it down. Nothing is generated."""
    with told():
        from apps.evaluation.vbench.folder import Plan, save_plan
        from apps.evaluation.vbench.suite import DIMENSIONS
        from apps.render.matrix import parse_override

        made = Plan(
            suite=str(suite),
            model=model,
            recipe=None if recipe is None else str(recipe),
            dimensions=tuple(dimension or DIMENSIONS),
            indices=indices,
            flicker_indices=flicker,
            prompts=prompts,
            inputs=dict(parse_override(text) for text in overrides or []),
            fps=fps,
            threads=threads,
            device=kind_of_device(device, here=False),
            dtype=dtype.value,
        )
        videos = save_plan(made, folder)
        counts = {d: sum(d in v.dimensions for v in videos) for d in made.dimensions}
        for name, count in counts.items():
            typer.echo(f"  {name}: {count}")
        label = "" if made.whole else "; a part of the suite, no VBench score"
        prompts_named = len({v.prompt for v in videos})
        typer.echo(f"{len(videos)} videos of {prompts_named} prompts in {folder}{label}")


def generate(
    folder: Folder,
    workers: Workers = 1,
    shard: Annotated[str, typer.Option(help="k/n: a share, for one of n machines.")] = "1/1",
    progress: ProgressOption = ProgressKind.rich,
) -> None:
    """Render what is missing, through the renderer's ledger; the same command resumes."""
    with told():
        from apps.evaluation.vbench.folder import RENDERS
        from apps.evaluation.vbench.folder import generate as make_videos
        from apps.render.progress import make, print_summary

        try:
            k, n = (int(part) for part in shard.split("/"))
        except ValueError:
            raise fail(f"--shard {shard}: wants k/n, such as 2/4") from None
        shown = make(progress.value)
        summary = make_videos(folder, workers=workers, shard=(k, n), progress=shown)
        if progress.value != "json":
            print_summary(summary, str(folder / RENDERS))
        raise typer.Exit(summary.exit_code)


def check(folder: Folder) -> None:
    """Name what is missing, too much, or wrong. Exit code 1 if a score would be."""
    with told():
        from apps.evaluation.vbench.folder import check as look

        found = look(folder)
    typer.echo(f"{found.there} of {found.wanted} videos are there")
    for line in found.problems:
        typer.echo(f"problem: {line}")
    for line in found.remarks:
        typer.echo(f"note: {line}")
    raise typer.Exit(int(bool(found.problems)))


def run(
    folder: Folder,
    python: Annotated[str, typer.Option(help="Interpreter that VBench is installed in.")],
    dimension: Dimensions = None,
    device: Annotated[str, typer.Option(help="Device of VBench's networks.")] = "cuda",
) -> None:
    """Let VBench judge the videos, in its own interpreter; finished dimensions are kept."""
    with told():
        from apps.evaluation.vbench.folder import run_official

        wrong = run_official(folder, python, dimension or (), device=device)
    for name, reason in wrong.items():
        typer.echo(f"{name}: {reason}", err=True)
    raise typer.Exit(int(bool(wrong)))


def score(
    folder: Folder,
    against: Annotated[Path | None, typer.Option(help="Folder of the baseline.")] = None,
) -> None:
    """Normalise and weigh the scores; with a baseline, paired by prompt."""
    with told():
        from apps.evaluation.vbench.folder import score as scored

        for line in lines(scored(folder, against)):
            typer.echo(line)


def lines(found: dict[str, Any]) -> list[str]:
    """Scores as text: official ones, then native ones under their own names."""
    told_lines = []
    for name, figure in found["official"].items():
        told_lines.append(f"{name}: {figure['official']:.4f}, {_normal(figure)}{_paired(figure)}")
        if "remark" in figure:
            told_lines.append(f"  {figure['remark']}")
    totals = found["totals"]
    if found["official"]:
        part = f" (partial: {len(totals['missing'])} dimensions missing)" * totals["partial"]
        shown = {k: totals[k] for k in ("quality", "semantic", "total") if totals[k] is not None}
        said = ", ".join(f"{name} {value:.2f} %" for name, value in shown.items())
        whole = "" if found["whole"] else "; a part of the suite: no VBench score"
        told_lines.append(f"{said}{part}{whole}")
    for name in found["outdated"]:
        told_lines.append(f"{name}: judged of other videos than this plan's; judge it again (run)")
    for name, figure in found["native"].items():
        value = figure["value"]
        span = f"{value['estimate']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        told_lines.append(f"native {name} [{figure['formula']}]: {span}{_paired(figure)}")
    return told_lines


def _normal(figure: dict[str, Any]) -> str:
    return f"{100 * figure['normalised']:.2f} % normalised"


def _paired(figure: dict[str, Any]) -> str:
    if "difference" not in figure:
        return ""
    d = figure["difference"]
    span = f"{d['estimate']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
    return f"; {span} on {figure['paired_prompts']} prompts, p = {figure['p']:.2g}"
