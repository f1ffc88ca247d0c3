"""Everything that is generated from results: the method index and the figures in README.md.

    python -m benchmarks.tables [--check]

Writes ``methods.json`` into each package of methods and the blocks of README.md between
``<!-- generated: NAME -->`` and ``<!-- end -->``. ``--check`` only says what is out of date. A
method without a measured row is not listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel.method import Method, Recipe
from accel.methods import INDEX_FILE, packages
from benchmarks.results_file import read

ROOT = Path(__file__).resolve().parents[1]
OWN = ("samplers", "caches", "quant", "sparse_attn")
RESULTS_WITH_METHODS = ("native",)
DEVICES = ("cpu", "cuda")


def method_classes(package: str) -> list[type[Method]]:
    """Public method classes in the public modules of a package, by name."""
    found = []
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        for name, cls in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(cls) and cls.__module__ == info.name
            if own and issubclass(cls, Method) and cls is not Recipe and not name.startswith("_"):
                found.append(cls)
    return sorted(found, key=lambda cls: cls.name())


def measured_row(cls: type[Method]) -> dict[str, Any] | None:
    """The first measured row that holds this method alone, with its conditions."""
    for name in RESULTS_WITH_METHODS:
        result = read(name) or {}
        for label, row in result.get("rows", {}).items():
            alone = [m["method"] for m in row["methods"]] == [cls.name()]
            if alone and not label.startswith("control"):
                figures = {k: row[k] for k in ("speedup", "flops", "nfe", "psnr", "ssim")}
                return {
                    "setting": label,
                    "model": result["model"],
                    "hardware": result["hardware"],
                    "threads": result["threads"],
                    **figures,
                }
    return None


def index_rows(package: str) -> list[dict[str, Any]]:
    """``methods.json`` of one package."""
    rows = []
    for cls in method_classes(package):
        measured = measured_row(cls)
        if measured is not None:
            rows.append(
                {
                    "name": cls.name(),
                    "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
                    "paper": cls.PAPER,
                    "slots": sorted(cls.SLOTS),
                    "fields": [f.name for f in dataclasses.fields(cls)],
                    "measured": measured,
                }
            )
    return rows


# -- README ----------------------------------------------------------------------------------


def _interval(value: dict[str, float] | None, form: str, unit: str) -> str:
    if value is None:
        return "-"
    low, high = (form.format(value[k]) for k in ("low", "high"))
    return f"{form.format(value['estimate'])}{unit} ({low} to {high})"


def _methods() -> str:
    lines = [
        "| method | slots | source | setting | speed-up | work | PSNR | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    conditions = set()
    for package in OWN:
        for row in index_rows(package):
            m = row["measured"]
            conditions.add((m["model"], m["hardware"], m["threads"]))
            lines.append(
                f"| `{row['name']}` | {', '.join(row['slots'])} | {row['paper']} | {m['setting']} "
                f"| {_interval(m['speedup'], '{:.2f}', 'x')} | {_work(m)} "
                f"| {_interval(m['psnr'], '{:.1f}', ' dB')} "
                f"| {_interval(m['ssim'], '{:.3f}', '')} |"
            )
    where = "; ".join(f"{m}, {h}, {t} thread(s)" for m, h, t in sorted(conditions))
    return "\n".join([*lines, "", f"Measured on: {where}. {_CAPTION}"])


_CAPTION = (
    "Speed-up: median of paired runs with a 95 % bootstrap interval. Work: floating-point "
    "operations relative to the unmodified pipeline. PSNR, SSIM: against the unmodified pipeline's "
    "output for the same seeds, mean with interval; a toy model, no claim about others."
)


def _work(row: dict[str, Any]) -> str:
    return f"{row['flops'][1] / row['flops'][0]:.2f}"


def _every_device(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    """``table`` of each device's result, the CPU's first."""
    results = [read(name, device) for device in DEVICES]
    return "\n\n".join(table(r) for r in results if r is not None) or "Not measured yet."


def _combinations_on(result: dict[str, Any]) -> str:
    where = f"{result['model']}, {result['hardware']}, {result['threads']} thread(s)"
    head = ["| what is on | speed-up | work | PSNR | SSIM |", "|---|---|---|---|---|"]
    lines = [f"{where}, batches of {result['batch']}, {result['steps']} steps asked:", "", *head]
    above = {row["measured"]["setting"] for package in OWN for row in index_rows(package)}
    for label, row in result["rows"].items():
        if label in above:
            continue
        lines.append(
            f"| {label} | {_interval(row['speedup'], '{:.2f}', 'x')} | {_work(row)} "
            f"| {_interval(row['psnr'], '{:.1f}', ' dB')} "
            f"| {_interval(row['ssim'], '{:.3f}', '')} |"
        )
    return "\n".join(lines)


def _overhead_on(result: dict[str, Any]) -> str:
    per_call = result["microseconds_per_wrapped_call"]
    lines = [
        f"A wrapped call costs {per_call['1_layers']:.2f} µs more than a bare one "
        f"({per_call['3_layers']:.2f} µs with three layers). Share of a DiT-XL/2-shaped step at "
        f"256 pixels ({result['hardware']}, {result['threads']} threads, random weights):",
        "",
        "| attached | wrapped calls a step | their cost by count | overhead, paired |",
        "|---|---|---|---|",
    ]
    for name, row in result["dit_xl_256"].items():
        span = f"{row['low']:.2f} to {row['high']:.2f}"
        counted = f"{row['wrapped_calls_per_step']} | {row['counted_percent']:.3f} %"
        lines.append(f"| {name} | {counted} | {row['overhead_percent']:.1f} % ({span}) |")
    return "\n".join(lines)


def _kills() -> str:
    result = read("kill")
    if result is None:
        return "Not measured yet."
    return (
        f"Killed with `kill -9` at {result['tried']} random moments and resumed: "
        f"{result['survived']} of {result['tried']} times every job was done exactly once, with no "
        "partial file and a consistent ledger (`benchmarks/bench_kill.py`)."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": _methods,
    "combinations": lambda: _every_device("native", _combinations_on),
    "overhead": lambda: _every_device("overhead", _overhead_on),
    "kills": _kills,
}


def render_readme(text: str) -> str:
    """README with every generated block renewed. Raises ``KeyError`` for an unknown block."""

    def renew(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, renew, text, flags=re.DOTALL)


def outputs() -> dict[Path, str]:
    """Every generated file with its content."""
    files = {ROOT / "README.md": render_readme((ROOT / "README.md").read_text("utf-8"))}
    for package in OWN:
        rows = index_rows(package)
        files[ROOT / package / INDEX_FILE] = json.dumps(rows, indent=1) + "\n"
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args().check
    assert set(OWN) <= set(packages()), "install the project first"
    stale = []
    for path, content in outputs().items():
        if not path.is_file() or path.read_text("utf-8") != content:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(content, "utf-8")
    print("\n".join(f"{'out of date' if check else 'wrote'}: {p}" for p in stale) or "up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
