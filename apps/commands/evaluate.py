"""`accel evaluate fidelity | fid | judge | clip | all | compare | page`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands import vbench
from apps.commands.device import Dtype, Kind, NumberType, kind_of_device
from apps.commands.render import ProgressKind, ProgressOption, Trust, Workers
from apps.commands.say import fail, told

if TYPE_CHECKING:
    from apps.evaluate import Request

Model = Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")]
Recipes = Annotated[list[Path], typer.Option("--recipe", help="Recipe file; may be repeated.")]
Against = Annotated[
    str | None, typer.Option(help="Recipe file to compare with; default: no recipe at all.")
]
Jobs = Annotated[
    Path | None, typer.Option(help="Job file with inputs and seeds; zoo models have their own.")
]
Samples = Annotated[int | None, typer.Option(min=2, help="Samples of a zoo model's own calls.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of a zoo model's own calls.")]
Rounds = Annotated[int, typer.Option(min=0, help="Paired timings; 0: no speeds.")]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="CPU threads; part of the protocol.")]
Out = Annotated[Path, typer.Option(help="Folder of the report; an evaluation is resumed from it.")]
Features = Annotated[
    str | None,
    typer.Option(help="zoo:NAME, torchscript:FILE or transformers:FOLDER; local weights only."),
]
Real = Annotated[Path | None, typer.Option(help="Folder of real pictures; zoo models need none.")]
Clip = Annotated[Path | None, typer.Option(help="Folder of a CLIP model.")]

HELP = {
    "fidelity": "How far outputs are from the baseline's: PSNR, SSIM, by sample, and where it "
    "hurts most.",
    "fid": "Distances to real samples: Frechet, kernel, precision, recall, density, coverage.",
    "judge": "Whether outputs show what was asked for, by the zoo's judge.",
    "clip": "How well outputs fit their prompts, by a CLIP model in a local folder.",
    "all": "Fidelity, distances and the judge in one report (CLIP score too with --clip).",
}


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Compare recipes with a baseline: figures with intervals, and one HTML page.",
        no_args_is_help=True,
    )
    for kind, text in HELP.items():
        group.command(kind, help=text)(_command(kind))
    group.command("compare")(compare)
    group.command("page")(page)
    vbench.register(group)
    app.add_typer(group, name="evaluate")


def _command(kind: str) -> Any:
    def evaluate(
        model: Model,
        recipe: Recipes,
        against: Against = None,
        jobs: Jobs = None,
        samples: Samples = None,
        steps: Steps = None,
        rounds: Rounds = 5,
        features: Features = None,
        real: Real = None,
        clip: Clip = None,
        threads: Threads = 1,
        dtype: NumberType = Dtype.float32,
        device: Kind = "auto",
        out: Out = Path("report"),
        workers: Workers = 1,
        progress: ProgressOption = ProgressKind.rich,
        trust_remote_code: Trust = False,
    ) -> None:
        with told():
            from apps.evaluate import Request

            request = Request(
                model=model,
                recipes=tuple(map(str, recipe)),
                kinds=_kinds(kind, model, clip),
                against=None if against in (None, "none") else against,
                jobs=None if jobs is None else str(jobs),
                samples=samples,
                steps=steps,
                rounds=rounds,
                threads=threads,
                device=kind_of_device(device),
                dtype=dtype.value,
                features=features,
                real=None if real is None else str(real),
                clip=None if clip is None else str(clip),
            )
            run(request, out, workers, progress.value, trust=trust_remote_code)

    return evaluate


def _kinds(kind: str, model: str, clip: Path | None) -> tuple[str, ...]:
    if kind != "all":
        return (kind,)
    kinds = ("fidelity", "fid") + (("judge",) if _asks(model) else ())
    return (*kinds, "clip") if clip is not None else kinds


def _asks(model: str) -> bool:
    """Whether a zoo model's calls ask for something that a judge knows."""
    return model.startswith("zoo:") and not model.endswith("ddpm")


def run(request: Request, out: Path, workers: int, progress: str, *, trust: bool) -> None:
    """Run an evaluation and print its figures; exit code 1 or 130 if it stopped before its end."""
    from apps.evaluate import PAGE, Unfinished, plan
    from apps.evaluate import run as evaluate

    made = plan(request)
    if progress != "json":
        names = ", ".join(side.label for side in made.sides[1:])
        typer.echo(
            f"{request.model}: {made.samples} samples of {len(made.calls)} calls without and with "
            f"{names}",
            err=True,
        )
    try:
        with _shown(progress) as heard:
            found = evaluate(made, out, workers=workers, progress=heard, trust_remote_code=trust)
    except Unfinished as error:
        raise fail(str(error), code=130 if error.interrupted else 1) from None
    if progress == "json":
        print(json.dumps({"phase": "end", "report": str(out / PAGE)}), flush=True)
        return
    for line in lines(found):
        typer.echo(line)
    typer.echo(f"report: {out / PAGE}")


def lines(found: dict[str, Any]) -> list[str]:
    """A report's figures as lines of text."""
    from apps.evaluation.page import verdict

    said = [f"{row['label']}: {verdict(row)}" for row in found["recipes"]]
    return said + [f"note: {line}" for line in found["warnings"]]


def compare(
    a: Annotated[Path, typer.Argument(help="A report's folder.")],
    b: Annotated[Path, typer.Argument(help="Another's, of the same protocol.")],
) -> None:
    """Recipes of two reports against each other, sample by sample. Refuses other protocols."""
    with told():
        from apps.evaluate import compare as paired
        from apps.evaluate import report

        for row in paired(report(a), report(b)):
            d = row["difference"]
            typer.echo(
                f"{row['measure']}: {row['b']} less {row['a']}: {d['estimate']:+.4g} "
                f"({d['low']:+.4g} to {d['high']:+.4g}), p = {row['p']:.2g}"
            )


def page(out: Annotated[Path, typer.Argument(help="A report's folder.")]) -> None:
    """Write a report's page again."""
    with told():
        from apps.evaluate import PAGE, RENDERS, report
        from apps.evaluation.page import write_page

        write_page(report(out), out / RENDERS, out / PAGE)
        typer.echo(str(out / PAGE))


@contextmanager
def _shown(kind: str) -> Iterator[Any]:
    """What `run` reports its progress to."""
    if kind == "json":
        yield lambda event: print(json.dumps(event), flush=True)
        return
    if kind == "none":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<7}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task("render", total=None, note="")

        def heard(event: dict[str, Any]) -> None:
            note = event.get("name", "") + (
                f" step {event['step']}/{event['steps']}" if "step" in event else ""
            )
            if "message" in event or "failed" in event:
                shown.console.print(
                    event.get("message") or f"{note}: {event['failed']}", markup=False
                )
            shown.update(
                bar, description=event["phase"], completed=event["done"], total=event["total"],
                note=note,
            )  # fmt: skip

        yield heard
