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


def kernels(result: dict[str, Any]) -> str:
    """Speed-ups of integer layers by shape."""
    env = result["environment"]
    names = list(dict.fromkeys(k for row in result["layers"].values() for k in row))
    lines = [
        "Speed-up over the float32 layer, quantising the input included "
        f"({env['hardware']}, {env['threads']} thread(s), torchao {env['versions']['torchao']}):",
        "",
        f"| layer | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    rows = result["layers"] | {"DiT-XL/2 256, whole transformer": result["dit_xl_256"]}
    for label, row in rows.items():
        cells = [_speed(row[n]) if n in row else "-" for n in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(span: dict[str, float]) -> str:
    return f"{span['estimate']:.2f}x ({span['low']:.2f} to {span['high']:.2f})"


def facts(result: dict[str, Any]) -> str:
    """What is beside a study's rows: time to calibrate, sizes, error of temporal modules."""
    lines = [
        "| what is on | layers | calibration | error of temporal features | weights on disk |",
        "|---|---|---|---|---|",
    ]
    for label, row in result["rows"].items():
        own = row["facts"]
        if own.get("calibration_seconds") is None:
            continue
        whole, packed = own["bytes_on_disk"]
        lines.append(
            f"| {label} | {own['quantised_layers']} | {own['calibration_seconds']:.0f} s | "
            f"{own['temporal_error']:.4f} | {packed / whole:.0%} |"
        )
    return "\n".join(lines)
