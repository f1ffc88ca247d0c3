"""Tables of the quantisation wing for ``benchmarks/README.md``."""

from __future__ import annotations

from typing import Any

from accel.metrics.statistics import paired_test
from benchmarks.spans import span

HOLDS = ("timestep", "pooled", "text")


def temporal_times(result: dict[str, Any]) -> str:
    """Speed-ups in one sentence."""
    env = result["environment"]
    spans = [
        f"{span(s, '{:.3f}', 'x')} with the table {case}" for case, s in result["speedup"].items()
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
    if "gpu" in result:
        return "\n\n".join(_on_gpu(part, env) for part in result["gpu"].values())
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
        cells = [span(row[n], unit="x") if n in row else "-" for n in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _on_gpu(part: dict[str, Any], env: dict[str, Any]) -> str:
    """Layers or a whole transformer: speed-up, time and relative error, a row for each kernel."""
    versions = ", ".join(f"{p} {env['versions'][p]}" for p in ("torch", "triton", "torchao"))
    settings = "torchao's settings of the compiler" if part["search"] else "default settings"
    lines = [
        f"Speed-up over bfloat16 ({env['hardware']}, {versions}; {settings}); models against the "
        "bfloat16 model compiled in the same way, eager ones against the eager one:",
        "",
        "| what | kernel | speed-up | milliseconds, before and after | error of the output |",
        "|---|---|---|---|---|",
    ]
    for what, kinds in part["speedups"].items():
        for kind, speedup in kinds.items():
            (own, time), error = part["milliseconds"][what][kind], part["errors"][what][kind]
            told = f"{span(speedup, unit='x')} | {own:.3f}, {time:.3f} | {error:.1%}"
            lines.append(f"| {what} | {kind} | {told} |")
    failed = [f"`{what}`: {why}" for what, why in part["failed"].items()]
    return "\n".join([*lines, *(["", f"Failed: {'; '.join(failed)}"] if failed else [])])


# What a part changes: (what, the row without it, the row with it).
PARTS = (
    ("temporal modules whole", "{w}: plain", "{w}: + temporal whole"),
    ("static scales by timestep", "{w}: + temporal whole", "{w}: + scales by timestep"),
    ("scheme chosen by layer", "{w}: + scales by timestep", "{w}: + scheme by layer"),
    ("GPTQ for rounding to the nearest", "{w}: + scheme by layer", "{w}: GPTQ"),
    ("AdaRound for rounding to the nearest", "{w}: plain", "{w}: AdaRound, one scale"),
    ("TIAR", "{w}: AdaRound, one scale", "{w}: AdaRound, + TIAR"),
    (
        "static scales by timestep, after TIAR",
        "{w}: AdaRound, + TIAR",
        "{w}: AdaRound, + TIAR, by timestep",
    ),
    ("AdaRound for GPTQ", "{w}: GPTQ", "{w}: AdaRound, temporal whole, by layer"),
    (
        "twenty times the iterations of AdaRound",
        "{w}: AdaRound, temporal whole, by layer",
        "{w}: AdaRound, many iterations",
    ),
    ("many iterations of AdaRound for GPTQ", "{w}: GPTQ", "{w}: AdaRound, many iterations"),
    ("skips split", "{w}: plain, skips not split", "{w}: plain"),
    ("skips split, with GPTQ", "{w}: GPTQ, skips not split", "{w}: GPTQ"),
    ("skips whole instead of split", "{w}: GPTQ", "{w}: GPTQ, skips whole"),
    ("4, 8 and 16 bits for 4 (6 on average)", "{w}: GPTQ", "mixed: 6 bits on average"),
)


def parts(result: dict[str, Any]) -> str:
    """Whether each part earns its place: PSNR with it less PSNR without, paired by sample."""
    lines = [
        "| part | width | PSNR | its change, paired | p | earns its place |",
        "|---|---|---|---|---|---|",
    ]
    for width in ("W8A8", "W4A8", "W4A16"):
        for what, *labels in PARTS:
            rows = [result["rows"].get(label.format(w=width)) for label in labels]
            if None in rows or (width != "W4A8" and "mixed" in labels[1]):
                continue
            without, with_it = (row["per_sample"]["psnr"] for row in rows)
            test = paired_test(with_it, without)
            span, low = test.difference, test.difference.low
            verdict = "yes" if low > 0 else "harms" if span.high < 0 else "no"
            lines.append(
                f"| {what} | {width} | {rows[0]['psnr']['estimate']:.1f} to "
                f"{rows[1]['psnr']['estimate']:.1f} dB | {span.estimate:+.2f} dB ({low:+.2f} to "
                f"{span.high:+.2f}) | {test.p:.1g} | {verdict} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def facts(result: dict[str, Any]) -> str:
    """What is beside a study's rows: time to calibrate, sizes, error of temporal modules."""
    lines = [
        "| what is on | layers (by bits) | calibration | error of temporal features | weights on "
        "disk | fallbacks |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in result["rows"].items():
        own = row["facts"]
        if own.get("calibration_seconds") is None:
            continue
        whole, packed = own["bytes_on_disk"]
        bits = ", ".join(f"{n} in {b}" for b, n in (own.get("layers_by_bits") or {}).items())
        lines.append(
            f"| {label} | {own['quantised_layers']} ({bits}) | {own['calibration_seconds']:.0f} s "
            f"| {own['temporal_error']:.4f} | {packed / whole:.0%} | {own.get('fallbacks') or 0} |"
        )
    return "\n".join(lines)


def study(result: dict[str, Any], rows: str) -> str:
    """All that is said of a model; ``rows``: the table of its rows."""
    told = [rows, parts(result), facts(result), cost(result)]
    return "\n\n".join(text for text in told if text)


FAST = "W4A8: GPTQ"
SLOW = {
    "W4A8: AdaRound, one scale": "which reconstructs everything in few iterations",
    "W4A8: AdaRound, many iterations": "all but what the timestep alone decides, in many",
}


def cost(result: dict[str, Any]) -> str:
    """How much time not reconstructing saves."""
    seconds = {
        label: result["rows"][label]["facts"]["calibration_seconds"]
        for label in (FAST, *SLOW)
        if label in result["rows"]
    }
    if FAST not in seconds or len(seconds) < 2:
        return ""
    slower = [
        f"`{label}`, {SLOW[label]}, {taken:.0f} s: {taken / seconds[FAST]:.1f}x"
        for label, taken in seconds.items()
        if label in SLOW
    ]
    return f"Calibrating `{FAST}` takes {seconds[FAST]:.0f} s; {'; '.join(slower)}."
