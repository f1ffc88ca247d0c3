"""The waterfall as a picture: what each bar gains, and beside it what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel.metrics.protocol import file_sha256

ROOT = Path(__file__).resolve().parents[1]
PICTURE = {
    "cpu": ROOT / "examples" / "waterfall.png",
    "cuda": ROOT / "examples" / "waterfall_cuda.png",
}
SOURCE = "Source"  # text chunk of the picture: SHA-256 of the results it was drawn from
# Okabe and Ito 2008, for every kind of colour vision; place and text say the same
BASE, METHOD, CONTROL = "#777777", "#0072B2", "#D55E00"
WIDTH, DPI = 9.0, 110  # inches; README shows at most 1,000 pixels
TEXT = 9  # points

Interval = dict[str, float]


def draw(source: Path, path: Path) -> None:
    """Draw a waterfall's results file: one line a bar, speed-up, PSNR and the referee's verdict.

    The same file gives the same bytes.
    """
    from matplotlib.figure import Figure

    result = json.loads(source.read_text("utf-8"))
    rows = list(result["rows"].values())
    names = [f"unmodified,\n{result['steps']} steps", *(_broken(n) for n in result["rows"])]
    colours = [BASE, *(CONTROL if n.startswith("control") else METHOD for n in result["rows"])]
    figure = Figure(figsize=(WIDTH, 0.62 * len(names) + 1.3), dpi=DPI, layout="constrained")
    speed, psnr, judged = figure.subplots(1, 3, sharey=True, width_ratios=(1.55, 1, 1.1))
    _speeds(speed, rows, colours)
    _psnr(psnr, rows, colours)
    _judged(judged, rows, colours)
    speed.set_yticks(range(len(names)), names)
    speed.set_ylim(len(names) - 0.5, -0.6)
    for axes in (speed, psnr, judged):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="both", left=False, labelsize=TEXT)
    figure.supxlabel(caption(result), fontsize=TEXT - 1, color="#444444")
    figure.savefig(path, metadata={"Software": None, SOURCE: file_sha256(source)})


def drawn_from(picture: Path, source: Path) -> bool:
    """Whether ``picture`` was drawn from ``source`` as it is now."""
    from PIL import Image

    if not picture.is_file():
        return False
    with Image.open(picture) as image:
        return image.info.get(SOURCE) == file_sha256(source)


def _speeds(axes: Any, rows: list[dict[str, Any]], colours: list[str]) -> None:
    speeds = [{"estimate": 1.0, "low": 1.0, "high": 1.0}, *(r["speedup"] for r in rows)]
    values, errors = [s["estimate"] for s in speeds], [_errors(s) for s in speeds]
    bars = axes.barh(range(len(values)), values, 0.6, color=colours)
    axes.errorbar(
        values[1:], range(1, len(values)), xerr=list(zip(*errors[1:], strict=True)),
        fmt="none", ecolor="black", capsize=3,
    )  # fmt: skip
    texts = ["1.00x", *(_speed_text(r) for r in rows)]
    for bar, (_, above), text in zip(bars, errors, texts, strict=True):
        place = (bar.get_width() + above, bar.get_y() + bar.get_height() / 2)
        axes.annotate(text, place, (5, 0), textcoords="offset points", va="center", fontsize=TEXT)
    axes.set_xlim(0, max(s["high"] for s in speeds) * 1.6)
    axes.set_title("speed-up", fontsize=TEXT + 1, loc="left")


def _speed_text(row: dict[str, Any]) -> str:
    over = row["over_previous"]
    text = f"{row['speedup']['estimate']:.2f}x"
    return text if over is None else f"{text}\n{over['estimate']:.2f}x the bar above"


def _psnr(axes: Any, rows: list[dict[str, Any]], colours: list[str]) -> None:
    for i, row in enumerate(rows, 1):
        _point(axes, i, row["psnr"], colours[i], f"{row['psnr']['estimate']:.1f} dB")
    axes.annotate(
        "the reference", (0.5, 0), xycoords=("axes fraction", "data"), ha="center", va="center",
        fontsize=TEXT, color=BASE,
    )  # fmt: skip
    axes.margins(x=0.3)
    axes.set_title("PSNR to unmodified", fontsize=TEXT + 1, loc="left")


def _judged(axes: Any, rows: list[dict[str, Any]], colours: list[str]) -> None:
    verdicts = [row["judged"] for row in rows]
    axes.set_title("judged right in %; FD", fontsize=TEXT + 1, loc="left")
    if not verdicts or None in verdicts:
        return
    shares = [verdicts[0]["accuracy"]["before"], *(v["accuracy"]["after"] for v in verdicts)]
    distances = [_distance(verdicts[0], "before"), *(_distance(v, "after") for v in verdicts)]
    for i, (share, distance) in enumerate(zip(shares, distances, strict=True)):
        percent = {k: 100 * v for k, v in share.items()}
        _point(axes, i, percent, colours[i], f"{percent['estimate']:.1f} %{distance}")
    axes.margins(x=0.3)


def _distance(verdict: dict[str, Any], side: str) -> str:
    return f"; {verdict['frechet'][side]:.1f}" if verdict["frechet"] else ""


def _point(axes: Any, i: int, interval: Interval, colour: str, text: str) -> None:
    errors = [[e] for e in _errors(interval)]
    axes.errorbar(interval["estimate"], i, xerr=errors, fmt="o", color=colour, capsize=3)
    axes.annotate(
        text, (interval["estimate"], i), (0, 6), textcoords="offset points", ha="center",
        fontsize=TEXT,
    )  # fmt: skip


def _errors(interval: Interval) -> tuple[float, float]:
    estimate = interval["estimate"]
    return max(0.0, estimate - interval["low"]), max(0.0, interval["high"] - estimate)


def _broken(name: str) -> str:
    """A name on two lines: after "control:", else after a comma."""
    mark = ": " if ": " in name else ", "
    return name.replace(mark, mark.strip() + "\n", 1)


def caption(result: dict[str, Any]) -> str:
    """What was measured, where and with which code."""
    where = result["environment"]
    judged = next(iter(result["rows"].values()))["judged"]
    text = (
        f"{result['model']}, {result['samples']} samples in batches of {result['batch']}, "
        f"95 % intervals; commit {where['commit']}, {where['date']}.\n"
        f"{where['hardware']}, {where['threads']} thread(s), torch {where['versions']['torch']}, "
        f"diffusers {where['versions']['diffusers']}."
    )
    if judged and judged["frechet"]:
        floor = judged["frechet"]["floor"]
        text += (
            f"\nRight: digit and colour as asked, says {judged['referee']}. "
            f"FD: Frechet distance to real samples (real to other real: {floor:.1f})."
        )
    return text
