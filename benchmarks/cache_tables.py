"""The tables of ``bench_caches``: every row, and how fast each curve is at a fidelity."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.spans import span

TARGETS = (25.0, 30.0, 35.0, 40.0)  # dB
PEERS = ("TaylorSeer", "FirstBlockCache", "MagCache", "cache-dit")


def curves(rows: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(speed-up, dB) of each curve's settings; controls are no curves."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for label, row in rows.items():
        name = label.rpartition(":")[0]
        if not label.startswith("control"):
            found[name].append((row["speedup"]["estimate"], row["psnr"]["estimate"]))
    return dict(found)


def speed_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The largest speed-up at no less than a PSNR, on straight lines between settings.

    None where no setting is so good: nothing is read off beyond the settings.
    """
    line = sorted(points, key=lambda p: p[1])
    speeds = [speed for speed, quality in line if quality >= target]
    for (s0, q0), (s1, q1) in itertools.pairwise(line):
        if q0 < target < q1:
            speeds.append(s0 + (s1 - s0) * (target - q0) / (q1 - q0))
    return max(speeds, default=None)


def matched(result: dict[str, Any]) -> str:
    """Speed-ups of all curves at equal fidelity, and ours over the best peer's."""
    found = curves(result["rows"])
    lines = [
        "| curve | " + " | ".join(f"{t:g} dB or more" for t in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    best: dict[bool, dict[float, float]] = {True: {}, False: {}}
    for name, points in found.items():
        cells = []
        for target in TARGETS:
            speed = speed_at(points, target)
            cells.append("-" if speed is None else f"{speed:.2f}x")
            side = best[name.startswith(PEERS)]
            if speed is not None:
                side[target] = max(side.get(target, 0.0), speed)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if best[True]:
        cells = [
            f"{best[False][t] / best[True][t]:.2f}" if t in best[True] and t in best[False] else "-"
            for t in TARGETS
        ]
        lines.append(f"| **best of ours over best peer** | {' | '.join(cells)} |")
    return "\n".join(lines)


def robustness(result: dict[str, Any]) -> str:
    """What happens in daily use, a column a cache."""
    names = list(result["rows"])
    scenarios = list(next(iter(result["rows"].values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for what in scenarios:
        cells = (result["rows"][name][what] for name in names)
        lines.append(f"| {what} | {' | '.join(c if c == 'right' else f'**{c}**' for c in cells)} |")
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    """Time saved beside work saved, a table for all models."""
    env = result["environment"]
    sizes = "; ".join(
        f"{model}: {found.get('size') or str(found['blocks']) + ' blocks'}"
        for model, found in result["models"].items()
    )
    lines = [
        f"{env['hardware']}, {env['threads']} thread(s), {result['protocol']['steps']} steps, "
        f'random weights ({sizes}). "If work were time": what the saved operations '
        "alone would give. With compiled blocks: against the compiled blocks alone, these against "
        "the same ones uncompiled.",
        "",
        "| model | what is on | speed-up | if work were time |",
        "|---|---|---|---|",
    ]
    for model, found in result["models"].items():
        for name, row in found["rows"].items():
            (before, after), time = row["flops"], row["speedup"]
            cells = f"{span(time, unit='x')} | {before / after:.2f}x"
            lines.append(f"| {model} | {name} | {cells} |")
    return "\n".join(lines)
