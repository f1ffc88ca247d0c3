"""`accel render`: a job file, or one job from the command line, into a folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.device import Dtype, Kind, NumberType, kind_of_device
from apps.commands.say import fail, told

if TYPE_CHECKING:
    from apps.render.jobs import PlacedJob
    from apps.render.plan import PlannedTask

MAX_SHOWN = 20


class ProgressKind(StrEnum):
    rich = "rich"
    json = "json"
    none = "none"


Workers = Annotated[int, typer.Option(min=1, max=256, help="Worker processes; 1: this process.")]
ProgressOption = Annotated[ProgressKind, typer.Option(help="json: one JSON object per line.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a model repository run code.")
]
TrustVerifiers = Annotated[
    bool,
    typer.Option(
        "--trust-verifiers", help="Let searches of this folder start commands and call servers."
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another renderer in the folder.")]


def register(app: typer.Typer) -> None:
    app.command("render")(render)


def render(
    jobs: Annotated[
        Path | None,
        typer.Argument(help="Job file: .jsonl, a job a line; or .yaml with a matrix, see above."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="zoo:NAME, folder or hub id.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe for jobs that name none; default: the model's own, if it has one."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder; a render is resumed from it.")] = Path(
        "out"
    ),
    prompt: Annotated[str | None, typer.Option(help="One job with this prompt.")] = None,
    class_label: Annotated[
        list[int] | None, typer.Option(help="One job with these class labels.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override: seed=3, inputs.guidance_scale=2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    workers: Workers = 1,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="CPU threads per worker; part of the identity.")
    ] = 1,
    dtype: NumberType = Dtype.float32,
    device: Kind = "auto",
    progress: ProgressOption = ProgressKind.rich,
    strict: Annotated[
        bool, typer.Option("--strict", help="A recipe without effect fails.")
    ] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Put no job into the pictures (sidecars stay).")
    ] = False,
    wait: Wait = False,
    trust_remote_code: Trust = False,
) -> None:
    """Render every job of a file that is not finished yet.

    A .yaml file makes a job of each combination in its matrix, and of each in `jobs` beside it:

    defaults: {inputs: {num_inference_steps: 50}}

    matrix: {seed: [0, 1, 2], inputs.class_labels: [[3], [14]]}

    `accel schema` prints the fields of a job.

    Exit code: 0 all done, 1 some failed or are left, 2 the input is wrong and nothing was started,
    130 interrupted. Run the same command again to continue, or `accel resume`.
    """
    with told():
        from apps.render.plan import Settings, plan

        placed = _jobs(jobs, _overrides(overrides, prompt, class_label))
        settings = Settings(
            model=model,
            recipe=None if recipe is None else str(recipe),
            threads=threads,
            dtype=dtype.value,
            device=kind_of_device(device),
            strict=strict,
            metadata=not no_metadata,
        )
        tasks = plan(placed, settings, Path() if jobs is None else jobs.parent)
        if dry_run:
            _show(tasks, out)
            return
        run(out, tasks, workers, progress.value, wait=wait, trust=trust_remote_code)


def run(
    out: Path,
    tasks: list[PlannedTask] | None,
    workers: int,
    progress: str,
    *,
    wait: bool,
    trust: bool,
    trust_verifiers: bool = False,
    retry: list[str] | None = None,
) -> None:
    """Submit tasks (or resume when there are none), print the summary, exit with its code.

    With `trust_verifiers` every search that the folder holds may start commands.
    """
    from apps.render.driver import RunOptions, resume, submit
    from apps.render.plan import load_plan
    from apps.render.progress import make, print_summary

    trusted = frozenset(task.id for task in load_plan(out)) if trust_verifiers else frozenset()
    options = RunOptions(workers, trust, trusted, wait)
    shown = make(progress)
    if tasks is None:
        summary = resume(out, options, shown, retry=retry or [])
    else:
        summary = submit(out, tasks, options, shown)
    if progress != "json":
        print_summary(summary, str(out))
    raise typer.Exit(summary.exit_code)


def _overrides(
    texts: list[str] | None, prompt: str | None, class_label: list[int] | None
) -> dict[str, Any]:
    from apps.render.matrix import parse_override

    overrides = dict(parse_override(text) for text in texts or [])
    if prompt is not None:
        overrides["inputs.prompt"] = prompt
    if class_label:
        overrides["inputs.class_labels"] = class_label
    return overrides


def _jobs(path: Path | None, overrides: dict[str, Any]) -> list[PlacedJob]:
    from apps.render.jobs import check_jobs, read_jobs

    if path is not None:
        return read_jobs(path, overrides)
    if not overrides:
        raise fail("nothing to render: give a job file, or --prompt, --class-label or --set")
    return check_jobs([("command line", {})], overrides)


def _show(tasks: list[PlannedTask], out: Path) -> None:
    from apps.render.outputs import is_complete, read_sidecar

    def finished(task: PlannedTask) -> bool:
        content = read_sidecar(out / f"{task.stem}.json")
        return content is not None and content["identity"] == task.id and is_complete(out, content)

    waiting = [task for task in tasks if not finished(task)]
    for task in waiting[:MAX_SHOWN]:
        job = task.payload["job"]
        inputs = ", ".join(f"{key}={value}" for key, value in job["inputs"].items())
        typer.echo(f"{task.stem}: seed {job['seed']}, {inputs}"[:200])
    if len(waiting) > MAX_SHOWN:
        typer.echo(f"... and {len(waiting) - MAX_SHOWN} more")
    steps = sum(_steps(task) for task in waiting)
    groups = len({task.bucket for task in waiting})
    typer.echo(
        f"{len(tasks)} jobs in {out}: {len(tasks) - len(waiting)} finished,"
        f" {len(waiting)} to render"
        + (f", {steps:,} steps asked" if steps else "")
        + (f", {groups} pairs of model and recipe" if groups > 1 else "")
        + "; nothing was started"
    )


def _steps(task: PlannedTask) -> int:
    steps = task.payload["job"]["inputs"].get("num_inference_steps")
    return steps if isinstance(steps, int) else 0
