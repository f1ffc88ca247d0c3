"""Tables of the quantisation wing for ``benchmarks/README.md``."""

from __future__ import annotations

from typing import Any

HOLDS = ("timestep", "pooled", "text")


def temporal_times(result: dict[str, Any]) -> str:
    """Speed-ups in one sentence."""
    env = result["environment"]
    spans = [
        f"{s['estimate']:.3f}x ({s['low']:.3f} to {s['high']:.3f}) with the table {case}"
        for case, s in result["speedup"].items()
    ]
    where = f"{result['steps']} steps, {env['hardware']}, {env['threads']} thread(s)"
    return f"{result['model']}, {where}: {', '.join(spans)}."


def temporal_counts(result: dict[str, Any]) -> str:
    """What leaves each architecture, and what the table takes instead."""
    equal = result["bit_equal"]
    lines = [
        f"Output bit-equal with the weights gone, in {sum(equal.values())} of {len(equal)} tiny "
        f"pipelines ({', '.join(equal)}). Share of all weights that leave (bfloat16; table of one "
        f"condition, {result['grid']} steps), by what is taken to be fixed in a run:",
        "",
        "| architecture | parameters | timestep alone | + class, guidance, pooled text | + text | "
        "weights that go | table |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["counts"].items():
        shares = " | ".join(f"{row[h]['parameters'] / row['parameters']:.1%}" for h in HOLDS)
        most = row["text"]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.0f} M | {shares} | "
            f"{most['weights_bytes'] / 2**20:,.0f} MiB | {most['table_bytes'] / 2**20:,.1f} MiB |"
        )
    return "\n".join(lines)
