"""Tables of the quantisation wing for ``benchmarks/README.md``."""

from __future__ import annotations

from typing import Any

HOLDS = ("timestep", "pooled", "text")


def temporal_cache(result: dict[str, Any]) -> str:
    """What leaves each architecture, and what the table takes instead."""
    equal = result["bit_equal"]
    spans = [
        f"{s['estimate']:.3f}x ({s['low']:.3f} to {s['high']:.3f}) {case}"
        for case, s in result["times"]["speedup"].items()
    ]
    env, times = result["times"]["environment"], result["times"]
    lines = [
        f"Output bit-equal with the weights gone, in {sum(equal.values())} of {len(equal)} tiny "
        f"pipelines ({', '.join(equal)}). Time, {times['model']}, {times['steps']} steps, "
        f"{env['hardware']}, {env['threads']} thread(s), with the table {'; '.join(spans)}. "
        f"Share of all weights that leave (bfloat16; table of one condition, {result['grid']} "
        "steps), by what is taken to be fixed in a run:",
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
