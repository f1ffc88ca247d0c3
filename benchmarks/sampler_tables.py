"""The tables of samplers, from their results: time-shift, One More Step."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.results_file import read
from benchmarks.spans import span
from samplers.one_more_step import OneMoreStep
from samplers.time_shift import TimeShift

SHOWN = ("DDIM", 10)  # of time-shift: what stands in the list of methods
SHOWN_STEPS = 20  # of One More Step
SHIPPED = "mean, spread"


def measured_by_distance(name: str) -> dict[str, Any] | None:
    """A method that is measured by distances to real samples: its best-known row."""
    if name == TimeShift.name():
        return of_time_shift("time-shift")
    return _of_one_more_step() if name == OneMoreStep.name() else None


def of_time_shift(setting: str) -> dict[str, Any] | None:
    """A setting of time-shift beside the plain sampler, as `SHOWN`; None: nothing is measured."""
    result = read("time_shift")
    if result is None:
        return None
    sampler, steps = SHOWN
    rows = {
        r["setting"]: r for r in result["rows"] if (r["sampler"], r["steps"]) == (sampler, steps)
    }
    shown = {"setting": f"{sampler} {steps} steps, {setting}", "frechet": None}
    if "base" in rows and setting in rows:
        pair = (mean(rows[k]["frechet"]) for k in ("base", setting))
        shown["frechet"] = dict(zip(("before", "after"), pair, strict=True))
    return _conditions("time_shift", result) | shown


def _of_one_more_step() -> dict[str, Any] | None:
    result = read("one_more_step")
    if result is None:
        return None
    rows = {r["setting"]: r for r in result["rows"] if r["steps"] == SHOWN_STEPS}
    distances = {
        "before": rows["base"]["frechet"],
        "after": rows[SHIPPED]["frechet"],
    }
    setting = f"{SHIPPED}, {SHOWN_STEPS} steps"
    return _conditions("one_more_step", result) | {"setting": setting, "frechet": distances}


def _conditions(study: str, result: dict[str, Any]) -> dict[str, Any]:
    cost = result["overhead"]  # seconds with over seconds without
    speedup = {"estimate": cost["estimate"], "low": cost["high"], "high": cost["low"]}
    return {
        "study": study,
        "model": result["model"],
        "hardware": result["environment"]["hardware"],
        "threads": result["environment"]["threads"],
        "protocol": result["protocol"]["sha256"],
        "speedup": {k: round(1 / v, 4) for k, v in speedup.items()},
    }


def time_shift(result: dict[str, Any]) -> str:
    """Frechet distances by sampler, steps and setting; then the exposure bias."""
    cost = {k: 100 * (v - 1) for k, v in result["overhead"].items()}
    lines = [
        f"Frechet distance to real pictures on {result['model']} (features of the referee; several "
        "sets: mean and range). What is adopted was chosen with another judge on other seeds; "
        "`none` means that nothing offered beat the plain sampler there. A step costs "
        f"{span(cost, '{:.1f}', ' %')} more with time-shift.",
        "",
        "| sampler | steps | samples | setting | adopted | Frechet |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        values = row["frechet"]
        around = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        samples = f"{len(values)} x {row['samples']}" if len(values) > 1 else str(row["samples"])
        adopted = "" if row["setting"] == "base" else _adopted(row["methods"])
        cells = (row["sampler"], row["steps"], samples, row["setting"], adopted)
        lines.append(f"| {' | '.join(map(str, cells))} | {mean(values):.2f}{around} |")
    lines += [
        "",
        "The exposure bias itself: samples on their way beside noised real pictures, call by call.",
        "",
        "| sampler | time | error of noise | its size, real | sampled | variance, real | sampled |",
        "|---|---|---|---|---|---|---|",
    ]
    for sampler, calls in result["exposure"].items():
        for row in calls:
            pairs = [f"{x:.4f}" for x in (row["error"], *row["rms"], *row["variance"])]
            lines.append(f"| {sampler} | {row['time']} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _adopted(methods: list[dict[str, Any]]) -> str:
    if not methods:
        return "none"
    settings = methods[0]["settings"]
    kept = ("window", "cutoff", "variant", "variance_model", "scale")
    return ", ".join(f"{k} {settings[k]}" for k in kept if settings.get(k) is not None)


def one_more_step(result: dict[str, Any]) -> str:
    """How bright pictures are, and whether a background that is asked for comes out."""
    cost = {k: 100 * (v - 1) for k, v in result["overhead"].items()}
    real = result["real"]["brightness"]
    lines = [
        f"One More Step on {result['model']}, {result['samples']} prompts. Where the prompt names "
        "the background: judged right. Where it does not: backgrounds beside real ones, whose "
        f"deviation is {real['deviation']:.3f} and of which {100 * real['black_or_white']:.1f} % "
        "are black or white; image means as Wasserstein distance to real ones (0 to 255). A run of "
        f"10 steps costs {span(cost, '{:.1f}', ' %')} more.",
        "",
        "| steps | setting | background named: right | deviation | black or white | image means | "
        "Frechet |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        b = row["brightness"]
        lines.append(
            f"| {row['steps']} | {row['setting']} | {100 * row['named_right']['background']:.1f} % "
            f"| {b['deviation']:.3f} | {100 * b['black_or_white']:.1f} % "
            f"| {row['image_mean_distance']:.1f} | {row['frechet']:.2f} |"
        )
    return "\n".join([*lines, "", "![without, with the mean, with the spread, real]"
                      "(pictures/one_more_step.png)"])  # fmt: skip
