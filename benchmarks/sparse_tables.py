"""Tables of sparse attention for ``benchmarks/README.md``."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.results_file import read
from benchmarks.spans import span


def measured_by_psnr(name: str) -> dict[str, Any] | None:
    """A policy's first row of ``sparse_quality``: no speed, its blocks are too small."""
    result = read("sparse_quality") or {}
    for label, row in result.get("rows", {}).items():
        if [m["method"] for m in row["methods"]] == [name] and not label.startswith("control"):
            verdict = result["judged"].get(label)
            return {
                "study": "sparse_quality",
                "setting": label,
                "model": result["model"],
                "hardware": result["environment"]["hardware"],
                "threads": result["environment"]["threads"],
                "protocol": result["protocol"]["sha256"],
                "speedup": None,
                "psnr": row["psnr"],
                "judged": verdict["judged"] if verdict else None,
            }
    return None


def best_policy(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Rows of methods, of sparse policies only the best, and a sentence about the others."""
    policies = [row for row in rows if row["measured"]["study"] == "sparse_quality"]
    policies.sort(key=lambda row: row["measured"]["psnr"]["estimate"], reverse=True)
    if len(policies) < 2:
        return rows, ""
    others = [
        f"{row['name'].rpartition(':')[2]} {row['measured']['psnr']['estimate']:.1f} dB"
        for row in policies[1:]
    ]
    said = f" Other sparse policies at as many blocks: {', '.join(others)}."
    return [row for row in rows if row not in policies[1:]], said


def speed(result: dict[str, Any]) -> str:
    """Attention alone, then whole blocks."""
    env = result["environment"]
    where = f"{env['hardware']}, {env['threads']} thread(s)"
    lines = [
        f"Random q, k and v; medians of rounds in turn ({where}). Kept: density that was executed. "
        "Selection: share of the time that choosing the blocks takes. At most: how much faster "
        "than FlexAttention the same products are at the rate of torch's own matrix product.",
        "",
        "| tokens | heads | kept | over dense | with means for the rest | over FlexAttention | "
        "at most | selection |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["attention"]:
        ratios = ("speedup", "speedup_pooled", "over_flex", "most_over_flex")
        spans = (span(row[k], unit="x") for k in ratios)
        lines.append(
            f"| {row['tokens']:,} | {row['heads']} x {row['head_dim']} | {row['executed']:.2f} | "
            f"{' | '.join(spans)} | {row['selection_share']:.1%} |"
        )
    if result["model"]:
        first = result["model"][0]
        share = attention_share(result)
        said = f"; attention is {share:.0%} of the dense time" if share else ""
        lines += [
            "",
            f"Blocks of Wan 2.1 1.3B's shape, {first['tokens']:,} tokens, {first['layers']} "
            f"layer(s), random weights, means for the rest{said}:",
            "",
            "| density | kept | speed-up of the whole |",
            "|---|---|---|",
        ]
        for row in result["model"]:
            lines.append(
                f"| {row['density']:g} | {row['executed']:.2f} | {span(row['speedup'], unit='x')} |"
            )
    return "\n".join(lines)


def attention_share(result: dict[str, Any]) -> float | None:
    """Of the whole that self-attention takes, by extrapolating the speed-ups to no attention."""
    dense = [statistics.median(row["seconds"][0]) for row in result["model"]]
    sparse = [statistics.median(row["seconds"][1]) for row in result["model"]]
    kept = [row["executed"] for row in result["model"]]
    if len(kept) < 2:
        return None
    slope = (sparse[0] - sparse[-1]) / (kept[0] - kept[-1])
    rest = sparse[-1] - slope * kept[-1]
    return max(0.0, min(1.0, 1 - rest / statistics.median(dense)))


def quality(result: dict[str, Any]) -> str:
    """PSNR against density by policy, then what the referee says."""
    names: dict[str, dict[str, Any]] = {}
    for label, row in result["rows"].items():
        name, _, density = label.partition(" @ ")
        names.setdefault(name, {})[density] = row
    densities = sorted({d for rows in names.values() for d in rows}, key=float)
    head = " | ".join(f"density {d}" for d in densities)
    dense = next(iter(result["rows"].values()))["methods"][0]["settings"]["dense"][0]
    lines = [
        f"{result['model']}, {result['steps']} steps of which the first {dense:.0%} are dense, "
        f"guidance {result['guidance']:g}, {result['videos']} videos: PSNR against dense "
        "attention, same seeds, mean with interval (density kept where it is another; what the "
        "calibration expected).",
        "",
        f"| policy | {head} |",
        f"|---|{'---|' * len(densities)}",
    ]
    for name, rows in names.items():
        cells = [_psnr(rows.get(d), float(d)) for d in densities]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if result["judged"]:
        lines += [
            "",
            "| policy | videos | PSNR | judged right | change in points |",
            "|---|---|---|---|---|",
        ]
    for label, row in result["judged"].items():
        accuracy = row["judged"]["accuracy"]
        points = {k: 100 * v for k, v in accuracy["difference"].items()}
        lines.append(
            f"| {label} | {row['videos']} | {row['psnr']['estimate']:.1f} dB | "
            f"{accuracy['after']['estimate']:.1%} (dense {accuracy['before']['estimate']:.1%}) | "
            f"{points['low']:+.1f} to {points['high']:+.1f} |"
        )
    return "\n".join(lines)


def _psnr(row: dict[str, Any] | None, asked: float) -> str:
    if row is None:
        return "-"
    other = f" (kept {row['density']:.2f})" if abs(row["density"] - asked) > 0.02 else ""
    if row.get("expected") is not None:
        other += f" (expected {row['expected']:.1f}"
        if row.get("expected_extremes"):
            other += ", {:.1f} to {:.1f} between inputs".format(*row["expected_extremes"])
        other += ")"
    return span(row["psnr"], "{:.1f}") + other


def backends(result: dict[str, Any]) -> str:
    """Kernels of dense attention, in turn with the pipeline's own."""
    env = result["environment"]
    lines = [
        f"{result['model']}, {result['steps']} steps, {result['samples']} samples "
        f"({env['hardware']}, {env['threads']} thread(s)): against the pipeline's own kernel, "
        "timed in turn.",
        "",
        "| kernel | operators that ran | speed-up | PSNR |",
        "|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ran = ", ".join(f"`{kernel}`" for kernel in row["kernels"])
        psnr = row["psnr"]["estimate"]
        lines.append(f"| {name} | {ran} | {span(row['speedup'], unit='x')} | {psnr:.1f} dB |")
    return "\n".join([*lines, "", f"Refused there: {', '.join(result['refused'])}."])
