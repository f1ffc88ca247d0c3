"""Every kernel of dense attention that works here, on ``zoo:digits-dit``, which has none by name.

    python -m benchmarks.bench_backend [--samples 60] [--rounds 5] [--fresh] [--device cuda]

Each row gives all attention to one of diffusers' kernels and is paired with the unmodified
pipeline, as in ``bench_native``: same seeds, same inputs, timed in turn, judged. The model's
processors call torch's attention themselves, so calls are rerouted one by one, which is in the
times. What does not work here is named with its reason. A model of 16 tokens says what a kernel
costs and whether it is right, not how fast it is on long sequences: ``bench_sparse`` has those.
Rows are written as they are measured, and a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
from typing import Any

from accel import compat
from accel.measure import environment, load_average, pipeline_samples
from accel.method import Recipe, attached
from benchmarks.digits_study import head, row, study
from benchmarks.kept import kept_rows, stays
from benchmarks.results_file import DEVICES, add_fresh, read, write
from sparse_attn.backend import AttentionBackend

OWN = "native"  # what the model's processors call; a row of it would be the same on both sides


def usable(pipe: Any, call: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Names of what attends in a call of two steps, but the pipeline's own; why others do not."""
    works, refused = [], {}
    for name in sorted(compat.attention_kernels().keys() - {OWN}):
        try:
            with attached(AttentionBackend((name,)), pipe) as live:
                pipeline_samples(pipe, {**call, "num_inference_steps": 2}, 0)
                (run,) = live.report()["runs"]
        except ValueError as error:
            refused[name] = str(error)
            continue
        if run["detail"]["attended"]:
            works.append(name)
        else:
            refused[name] = "; ".join(run["fallbacks"])
    return works, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    add_fresh(parser)
    given = parser.parse_args()
    load = load_average()
    bench = study(given.samples, given.device)
    old = None if given.fresh else read("attention_backend", given.device)
    there = kept_rows(old, bench.protocol(), environment(given.device, load))
    works, refused = usable(bench.pipe, bench.inputs[0])
    rows: dict[str, Any] = {name: there[name] for name in works if name in there}
    before = old and (old["rows"], old["refused"])

    def keep() -> None:
        content = head(bench, given.samples, environment(given.device, load))
        shown = {name: rows[name] for name in works if name in rows}
        write("attention_backend", given.device, {**content, "rows": shown, "refused": refused})

    for name in works:
        recipe = Recipe((AttentionBackend((name,)),))
        if stays(rows.get(name), recipe):
            continue
        try:
            result = bench.compare(recipe, rounds=given.rounds)
        except ValueError as error:  # flex, off accelerators: not while operations are counted
            rows.pop(name, None)
            refused[name] = str(error)
            continue
        rows[name] = row(recipe, result)
        rows[name]["kernels"] = kernels(result.report)
        print(name, rows[name]["speedup"], rows[name]["kernels"], flush=True)
        keep()
    if (rows, refused) != before:
        keep()


def kernels(report: dict[str, Any]) -> list[str]:
    """Names of the operators that attended, as the report of a row's first run has them."""
    (member,) = report["members"]
    return sorted(member["runs"][0]["detail"].get("kernels", {}))


if __name__ == "__main__":
    main()
