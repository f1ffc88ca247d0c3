"""A card for each shipped recipe, from reports of `accel evaluate all`.

    python -m benchmarks.recipe_cards REPORT [REPORT ...]

keeps each report's figures as ``results/report_MODEL.json`` (without those of each sample) and
draws the worst cases of each recipe into ``recipes/pictures``. The cards' text is a generated block
of ``recipes/README.md``, renewed by `python -m benchmarks.tables`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

from accel.files import write_atomically
from apps.evaluate import RENDERS, report
from apps.evaluation.figures import ARTICLES
from apps.evaluation.page import interval, number, verdict
from apps.evaluation.pictures import difference, frame
from benchmarks.results_file import RESULTS, read, write

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PICTURES = RECIPES / "pictures"
NEAR = 3.0  # dB above unrelated outputs up to which nothing is left of the baseline's
SHOWN, ZOOM, GAP = 6, 2, 4  # worst cases, pixels of a pixel, pixels between
# What a card shows, in this order.
LINES = ("psnr", "ssim", "right_all", "frechet", "looks", "kid", "precision", "recall", "coverage")


def keep(folder: Path) -> list[str]:
    """Keep one report's figures and draw its worst cases; the recipes that it was about."""
    found = report(folder)
    model = found["model"]["name"].removeprefix("zoo:")
    rows = [{k: v for k, v in row.items() if k != "per_sample"} for row in found["recipes"]]
    base = {k: v for k, v in found["baseline"].items() if k != "per_sample"}
    request = {k: v for k, v in found["request"].items() if k != "recipes"}
    write(f"report_{model}", "cpu", {
        **found, "recipes": rows, "baseline": base, "request": request,
        "command": _relative(found["command"]),
    })  # fmt: skip
    PICTURES.mkdir(exist_ok=True)
    for row in found["recipes"]:
        write_atomically(PICTURES / _picture(found, row), worst_cases(row, folder / RENDERS))
    return [row["label"] for row in found["recipes"]]


def worst_cases(row: dict[str, Any], folder: Path) -> bytes:
    """One PNG: a column for each case; baseline, accelerated and their difference below."""
    from PIL import Image

    columns = []
    for case in row["worst"][:SHOWN]:
        curve = case.get("frame_psnr")
        at = int(np.argmin(curve)) if curve else None
        a, b = (frame(folder, stem, case["within"], at) for stem in case["files"])
        tiles = [
            np.kron(x, np.ones((ZOOM, ZOOM, 1), np.uint8)) for x in (a, b, difference(a, b)[0])
        ]
        white = np.full((GAP, tiles[0].shape[1], 3), 255, np.uint8)
        columns.append(np.concatenate([tiles[0], white, tiles[1], white, tiles[2]]))
    between = np.full((columns[0].shape[0], GAP, 3), 255, np.uint8)
    joined = [x for column in columns for x in (column, between)][:-1]
    target = io.BytesIO()
    Image.fromarray(np.concatenate(joined, axis=1)).save(target, format="PNG", optimize=True)
    return target.getvalue()


def cards() -> str:
    """Every recipe file of the project with its report, as Markdown."""
    reports = [read(path.stem) for path in sorted(RESULTS.glob("report_*.json"))]
    reports.sort(key=lambda found: "judge" not in found["kinds"] if found else True)
    known: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for found in reports:
        for row in found["recipes"] if found else ():
            known.setdefault(row["recipe"], []).append((found, row))
    parts = []
    for path in sorted(RECIPES.glob("*.yaml")):
        if path.name not in known:
            parts.append(f"## {path.stem}\n\nNot evaluated yet: `accel evaluate all --recipe "
                         f"recipes/{path.name} --model MODEL`.")  # fmt: skip
            continue
        on_models = known[path.name]
        parts.append(f"## {path.stem}\n\n{on_models[0][1]['description']}")
        parts += [_card(path, found, row) for found, row in on_models]
    return "\n\n".join(parts)


def _card(path: Path, found: dict[str, Any], row: dict[str, Any]) -> str:
    """What one recipe does to one model."""
    where = found["environment"]
    stale = _changed(path, row)
    lines = [f"**{verdict(row)}**", ""]
    if stale:
        lines += ["The recipe was changed after this was measured.", ""]
    lines += [
        f"On `{found['model']['name']}`, {found['samples']} samples with the same seeds, "
        f"{where['hardware']}, {where['threads']} thread(s), {where['date']}, protocol "
        f"`{found['protocol']['sha256'][:12]}`.",
        "",
        "| figure | without | with | change |",
        "|---|---|---|---|",
    ]
    lines += [_line(row["figures"][name]) for name in LINES if name in row["figures"]]
    flops, nfe = row["flops"], row["nfe"]
    lines.append(f"| operations | 1 | {flops[1] / flops[0]:.2f} | |")
    lines.append(f"| network evaluations of the timed call | {nfe[0]} | {nfe[1]} | |")
    if unrelated(found, row):
        lines += ["", unrelated(found, row)]
    weak = [w for w in row["by_word"] if w["strength"] < -2 and w["word"] not in ARTICLES][:3]
    if weak:
        words = ", ".join(f"{w['word']} ({w['difference']:+.1f} dB)" for w in weak)
        lines += ["", f"Worst at: {words}."]
    lines += [
        "",
        f"Where it hurts most (baseline, accelerated, difference; {_said(row)}):",
        "",
        f"![worst cases](pictures/{_picture(found, row)})",
    ]
    told = (f"{row['label']}:", "The machine was busy")
    lines += [f"\nNote: {line}" for line in found["warnings"] if line.startswith(told)]
    return "\n".join(lines)


def unrelated(found: dict[str, Any], row: dict[str, Any]) -> str:
    """A sentence on fidelity where there is none left; else nothing."""
    psnr, scale = row["figures"].get("psnr"), found["unrelated_psnr"]
    if psnr is None or scale is None or psnr["value"]["estimate"] > scale + NEAR:
        return ""
    return (
        f"{row['label']}: a PSNR as of unrelated outputs ({number(scale)} dB). These are other "
        "samples, as from another seed; only what compares with real ones says how good they are."
    )


def _line(figure: dict[str, Any]) -> str:
    unit = figure["unit"]
    change = figure.get("difference")
    points = "points" if unit == "%" else unit
    name = figure["label"]
    if figure.get("floor") is not None:
        name += f" (other real samples: {number(figure['floor'])})"
    cells = [
        name,
        interval(figure.get("baseline"), unit),
        interval(figure["value"], unit),
        "-" if change is None else interval(change, points, signed=True),
    ]
    return f"| {' | '.join(cells)} |"


def _said(row: dict[str, Any]) -> str:
    return ", ".join(f"{c['label']} {number(c['psnr'])} dB" for c in row["worst"][:SHOWN])


def _changed(path: Path, row: dict[str, Any]) -> bool:
    import accel

    return accel.read_recipe(path).sha256 != row["sha256"]


def _picture(found: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{Path(row['recipe']).stem}.{found['model']['name'].removeprefix('zoo:')}.png"


def _relative(command: str) -> str:
    return command.replace(f"{ROOT}/", "")


def evaluation(result: dict[str, Any]) -> str:
    """What `bench_evaluate` found, as Markdown."""
    env, whole = result["environment"], result["whole"]
    versions = ", ".join(
        f"{p} {v}" for p, v in env["versions"].items() if p in ("torchmetrics", "prdc")
    )
    lines = [
        f"Agreement on the same features or files ({versions}):",
        "",
        "| figure | of | ours | theirs | relative difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['figure']} | {r['of']} | {r['ours']:.6g} | {r['theirs']:.6g} | {r['relative']:.1e} |"
        for r in result["agreement"]
    ]
    lines += [
        "",
        f"Two sets of {result['samples']:,} samples ({env['hardware']}, one thread; streamed: with "
        "interval; memory beyond the imports):",
        "",
        "| features | how | processor time | peak memory |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {c['features']} | {c['how'].replace('_', ' ')} | {c['cpu_seconds']:.1f} s | "
        f"{c['peak_mb']:.0f} MB |"
        for c in result["costs"]
    ]
    lines += [
        "",
        f"`accel evaluate fidelity --recipe recipes/taylor.yaml` on {whole['model']}, "
        f"{whole['samples']} samples and {whole['rounds']} rounds of paired timing: "
        f"{whole['cpu_seconds'] / 60:.1f} minutes of processor time ({whole['seconds'] / 60:.1f} "
        f"on the clock, load {env['load'][0]}), a page of {whole['page_kb']} kB.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    for folder in parser.parse_args().reports:
        print(f"{folder}: {', '.join(keep(folder))}")


if __name__ == "__main__":
    main()
