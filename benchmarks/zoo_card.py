"""The text of a model card, from results alone: those of `bench_zoo`, and the model's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apps.evaluation.page import interval as said
from apps.evaluation.page import number
from benchmarks.recipe_cards import unrelated
from benchmarks.results_file import read
from benchmarks.zoo_subjects import SUBJECTS, Subject

JUDGES = ("digits-judge", "digits-judge-b")
REFEREE = "digits-judge-b"


def card(r: Mapping[str, Any]) -> str:
    """The card of a model whose results are ``r``."""
    name = r["model"]
    if name in JUDGES:
        return judge_card(r)
    return pipeline_card(r, SUBJECTS[name], read(f"report_{name}"))


def percent(share: float) -> str:
    """0.9876 -> "98.8"."""
    return f"{100 * share:.1f}"


def interval(share: Mapping[str, float]) -> str:
    """ "98.8 (97.9 to 99.3)", in percent."""
    low, high = percent(share["low"]), percent(share["high"])
    return f"{percent(share['estimate'])} ({low} to {high})"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pipeline_card(r: Mapping[str, Any], subject: Subject, report: Mapping[str, Any] | None) -> str:
    """Card of a pipeline. ``report``: of `accel evaluate all` on it, if there is one."""
    parts = [
        _front(r, "text-to-video" if subject.is_video else "text-to-image"),
        f"{subject.about}, trained from nothing on DigitWorld: real handwritten digits "
        "(scikit-learn's scans), coloured, on backgrounds from black to white. It exists so that "
        "acceleration methods can be tried, tested and measured offline. Its figures say whether a "
        "method works, nothing about large models.",
        "```python\nimport diffusers\nfrom accel import zoo\n\n" + subject.example + "\n```",
        *([subject.note] if subject.note else []),
        "![samples beside real ones](samples.png)",
        _size(r, subject),
        _quality(r, subject),
        _distances(r, subject),
        *([_movement(r)] if "movement" in r else []),
        *([_brightness(r)] if "brightness" in r else []),
        _evaluated(r["model"], report),
        _training(r),
        _neighbours(r),
    ]
    return "\n\n".join(parts) + "\n"


def judge_card(r: Mapping[str, Any]) -> str:
    """Card of a judge."""
    referee = r["model"] == REFEREE
    use = (
        "The referee: trained on other scans than everything else here, with another architecture, "
        "and used by nothing but reports."
        if referee
        else "The verifier that calibration, search and training may use."
    )
    names = [n for n in r["videos"] if n != "all"] + ["all"]
    rows = [
        [kind, *(percent(r[kind][n]) if n in r[kind] else "-" for n in names)]
        for kind in ("pictures", "videos")
    ]
    digit_like = [[name, interval(v)] for name, v in r["digit_like"].items()]
    parts = [
        _front(r, "image-classification"),
        "Reads digit, colour and background of a picture, and of a video also the motion; its 64 "
        f"features serve Frechet distances. {use}",
        f'```python\nfrom accel.zoo.judge import judge\n\njudge("{r["model"]}").answers(images)'
        "  # (n, 32, 32, 3) uint8\n```",
        "## Accuracy\n\nOn held-out handwriting, in percent "
        f"({r['protocol']['samples']:,} pictures, {r['protocol']['videos']:,} videos):\n\n"
        + table(["", *names], rows),
        "## What is a digit\n\nTaken for a digit with confidence above 0.9, in percent, with 95 % "
        "interval:\n\n" + table(["what", "share"], digit_like),
        f"## Size\n\n{r['parameters'] / 1e6:.2f} M parameters, {r['bytes'] / 1e6:.2f} MB in half "
        f"precision. {_measured_on(r)}",
        _training(r),
    ]
    return "\n\n".join(parts) + "\n"


def _front(r: Mapping[str, Any], task: str) -> str:
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: {task}
---
<!-- Written by benchmarks/bench_zoo.py from benchmarks/results/zoo_{r["model"]}.json. -->
# {r["model"]}"""


def _measured_on(r: Mapping[str, Any]) -> str:
    env = r["environment"]
    versions = env["versions"]
    return (
        f"Measured on {env['hardware']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}, commit {env['commit']}, {env['date']}."
    )


def _size(r: Mapping[str, Any], subject: Subject) -> str:
    what = "guidance pair of one video" if subject.is_video else "batch of 16"
    cost = "; ".join(
        f"{n} thread{'s'[: int(n) - 1]}: median {v['median']:.1f} ms, best {v['best']:.1f} ms"
        for n, v in r["evaluation_ms"].items()
    )
    schedule = ", ".join(str(v) for v in r["scheduler"].values() if v)
    rows = [["weights, half precision", f"{r['bytes'] / 1e6:.2f} MB"]]
    rows += [[name, f"{n / 1e6:.2f} M parameters"] for name, n in r["parameters"].items()]
    rows += [["schedule", schedule], [f"one evaluation, {what}, float32", cost]]
    return f"## Size and cost\n\n{table(['part', 'size'], rows)}\n\n{_measured_on(r)}"


def _quality(r: Mapping[str, Any], subject: Subject) -> str:
    n = r["protocol"]["samples"]
    steps = r["protocol"]["steps"][0]
    if "digit_like" in r:
        by_judge = r["digit_like"]
        rows = [
            [what, *(interval(by_judge[j][what]) for j in by_judge)]
            for what in next(iter(by_judge.values()))
        ]
        others = f", except where {' or '.join(subject.also)} is named" if subject.also else ""
        return (
            f"## Are they digits?\n\nTaken for a digit with confidence above 0.9, in percent, with "
            f"95 % interval; {n:,} each, {steps} steps. Samples are {subject.pipeline}'s"
            f"{others}.\n\n" + table(["what", *by_judge], rows)
        )
    accuracy = r["accuracy"]
    names = [*subject.asked, "all"]
    rows = [
        [guidance, judge, *(interval(shares[name]) for name in names)]
        for guidance, by_judge in accuracy["guidance"].items()
        for judge, shares in by_judge.items()
    ]
    per = "\n\n".join(
        table(accuracy[k], [[percent(v) for v in accuracy[k].values()]])
        for k in ("by_digit", "by_colour")
    )
    return (
        "## Accuracy\n\nSamples in which a judge reads what was asked for, in percent with 95 % "
        f"interval; {n:,} samples, {steps} steps. `{REFEREE}` is the referee; the judges' own "
        "errors are in their cards.\n\n"
        f"{table(['guidance', 'judge', *names], rows)}\n\nAll, by the referee, at guidance "
        f"{subject.guidances[0]:g}:\n\n{per}"
    )


def _distances(r: Mapping[str, Any], subject: Subject) -> str:
    rows = [[k, f"{v['frechet']:.3f}", f"{v['kid']:.1f}"] for k, v in r["distances"].items()]
    guided = f", guidance {subject.guidances[0]:g}" if subject.asked else ""
    return (
        f"## Distance to real ones\n\nFrechet and kernel distance of the referee's features to "
        f"held-out real samples, {r['protocol']['samples']:,} each{guided}. The real rows are the "
        "floor; the kernel distance is unbiased, so it may be below zero.\n\n"
        f"{table(['samples', 'Frechet', 'KID'], rows)}"
    )


def _movement(r: Mapping[str, Any]) -> str:
    rows = [
        [k, f"{v['flicker']:.5f}", f"{v['motion']:.2f}", f"{v['least motion']:.2f}"]
        for k, v in r["movement"].items()
    ]
    head = ["videos", "flicker at the border", "motion, mean", "motion, least"]
    return (
        "## Movement\n\nFlicker: mean change from frame to frame where nothing moves, of 1. "
        f"Motion: `accel.metrics.video.motion`; a frozen video has 0.\n\n{table(head, rows)}"
    )


def _brightness(r: Mapping[str, Any]) -> str:
    flaw = r["brightness"]
    asked = [[name, f"{v['real']:.3f}", f"{v['samples']:.3f}"] for name, v in flaw["asked"].items()]
    unasked = [
        [name, percent(v["real"]), percent(v["samples"])] for name, v in flaw["unasked"].items()
    ]
    leaked = [[shift, f"{level:.3f}"] for shift, level in flaw["leaked"].items()]
    return (
        "## The brightness flaw\n\nTrained with the usual scaled-linear schedule, whose last step "
        "still carries some of the picture (no zero terminal SNR), but sampling starts from pure "
        "noise: the mean of the noise leaks into the brightness. With an empty prompt and noise "
        "whose mean is shifted along the brightness axis, in standard deviations of an honest "
        f"draw's mean, mean of {flaw['samples']} samples, 0 black to 1 white:\n\n"
        f"{table(['shift', 'level of the background'], leaked)}\n\n"
        "Where a prompt names no background, share of pictures nearest to each, of "
        f"{flaw['unasked_samples']}:\n\n{table(['background', 'real', 'samples'], unasked)}\n\n"
        "A background that is asked for comes out right all the same; mean level of "
        f"{flaw['samples']} samples each:\n\n{table(['background', 'real', 'samples'], asked)}"
    )


def _evaluated(name: str, report: Mapping[str, Any] | None) -> str:
    """What the evaluation commands say of the model: alone, and under each recipe."""
    title = "## What accelerating it costs"
    if report is None:
        return (
            f"{title}\n\nNot evaluated yet: `accel evaluate all --model zoo:{name} "
            "--recipe RECIPE`."
        )
    rows, where, protocol = report["recipes"], report["environment"], report["protocol"]
    kind = report["kinds"][0] if len(report["kinds"]) == 1 else "all"
    asked = f"{protocol['steps']} steps"
    if protocol.get("guidance") is not None:
        asked += f", guidance {protocol['guidance']:g}"
    measured: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        measured |= {k: f for k, f in row["figures"].items() if k not in measured}
    alone = [
        [f["label"], said(f["baseline"], f["unit"]), _floor(f)]
        for f in measured.values()
        if f.get("baseline") is not None
    ]
    paired = [name for name in ("right_all", "frechet") if name in measured]
    head = ["recipe", "speed-up", "PSNR", "SSIM", *(measured[k]["label"] for k in paired)]
    costs = [
        [f"[{row['label']}](../../../recipes/README.md#{row['label']})", *_cost(row, paired)]
        for row in rows
    ]
    notes = [line for line in report["warnings"] if line.startswith("The machine was busy")]
    return "\n\n".join([
        f"{title}\n\nBy `accel evaluate {kind}`: {report['samples']:,} samples ({asked}) with the "
        f"same seeds on every side, read by the referee; {where['hardware']}, {where['threads']} "
        f"thread(s), {where['date']}, protocol `{protocol['sha256'][:12]}`; 95 % intervals. "
        "Without a recipe:",
        table(["figure", "value", "other real samples"], alone),
        "With one, against that (last columns: the change):",
        table(head, costs),
        *filter(None, (unrelated(dict(report), row) for row in rows)),
        *notes,
    ])  # fmt: skip


def _floor(figure: Mapping[str, Any]) -> str:
    return "-" if figure.get("floor") is None else number(figure["floor"])


def _cost(row: Mapping[str, Any], paired: Iterable[str]) -> list[str]:
    """Speed, fidelity and changes of one recipe."""
    figures = row["figures"]
    cells = [said(row["speedup"], "x")]
    for name in ("psnr", "ssim"):
        figure = figures.get(name)
        cells.append("-" if figure is None else said(figure["value"], figure["unit"]))
    for name in paired:
        figure = figures.get(name, {})
        unit = "points" if figure.get("unit") == "%" else figure.get("unit", "")
        cells.append(said(figure.get("difference"), unit, signed=True))
    return cells


def _training(r: Mapping[str, Any]) -> str:
    t = r["training"]
    rows = [
        [
            name,
            f"{s['step']:,}",
            s["batch"],
            f"{s['seconds'] / 60:.0f}",
            f"{s['curve'][-1][1]:.4f}" if s["curve"] else "-",
        ]
        for name, s in t["stages"].items()
    ]
    pool = f"; {t['pool']:,} pictures" if t["pool"] else ""
    return (
        f"## Training\n\n`python -m accel.zoo.train {t['model']} --preset {t['preset']} "
        f"--out OUT`, {_legs(t)}seed {t['seed']}, {t['hardware']}, {t['threads']} "
        f"thread(s){pool}.\n\n"
        f"{table(['stage', 'steps', 'batch', 'minutes', 'last loss'], rows)}\n\n![loss](loss.png)"
        "\n\n`training.json` holds the settings, the data position and the whole curve; "
        "`--start shipped` goes on from these weights."
    )


def _legs(training: Mapping[str, Any]) -> str:
    """Nothing for a training in one go."""
    return "" if training["start"] == "scratch" else "in several legs (`--start shipped`), "


def _neighbours(r: Mapping[str, Any]) -> str:
    n = r["neighbours"]
    d = n["median_distance"]
    return (
        f"## Not a copy machine\n\nThe nearest of {n['draws']:,} training pictures of the same "
        "digit and colour (fresh jitter; root mean square distance of the strokes, backgrounds "
        f"ignored), median over {n['compared']}: samples {d['samples']:.3f}, real held-out "
        f"pictures {d['heldout']:.3f}, pictures of training scans {d['train']:.3f}.\n\n"
        "![samples and their nearest training pictures](neighbours.png)"
    )
