"""Baseline, then one method more per bar: speed beside quality, as figures and as a picture.

    python -m benchmarks.waterfall [--samples 200] [--rounds 9] [--device cuda] [--fresh | --draw]

Every bar is timed in turn with the unmodified pipeline, and in turn with the bar before it. The
quantised layers are those that 8 bits make faster on this machine, each timed alone; calibrated
under the bar before.
The last bar is a control: the same methods, but the cache repeats its last output from the first
step on and extrapolates nothing. It must look worse, or the quality beside the speeds proves
nothing. Bars that the file has already are not measured again, so a stopped run goes on;
``--fresh`` measures all. ``--draw`` only draws again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.measure import environment, load_average
from accel.method import Method, Recipe
from benchmarks.bench_native import kept_rows
from benchmarks.digits_study import BATCH, DPM, command_line, head, inputs, row, study
from benchmarks.results_file import add_fresh, path, read, write
from benchmarks.waterfall_picture import PICTURE, draw
from caches.native import TaylorSeer
from quant.calibrate import TFMQCalibration
from quant.tfmq import TFMQ
from samplers.swap import SwapScheduler

FEW = 12  # steps
LITE = TaylorSeer(interval=2, warmup=6, modules="lite")
REPEATS = replace(LITE, warmup=1, max_order=0)
QUANTISED = TFMQCalibration(bits=8, only_faster=True)
CONTROL = "control: repeats, from step 1"


def bars(pipe: Any, samples: int, folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Names and recipes, each but the control a method more than the one before."""
    yield "DPM-Solver++, 20 steps", Recipe((SwapScheduler(*DPM, steps=20),))
    yield "+ TaylorSeer", Recipe((SwapScheduler(*DPM, steps=20), LITE))
    few = SwapScheduler(*DPM, steps=FEW)
    yield f"+ {FEW} steps, not 20", Recipe((few, LITE))
    eight = quantised(pipe, samples, Recipe((few, LITE)), folder)
    if eight:
        yield "+ 8 bits, where faster alone", Recipe((few, LITE, *eight))
    yield CONTROL, Recipe((few, REPEATS, *eight))


def quantised(pipe: Any, samples: int, under: Recipe, folder: Path) -> tuple[Method, ...]:
    """The layers that integers make faster, if there are any, for use under a recipe."""
    calls = inputs(samples + BATCH, FEW)[-1:]  # none of the samples
    try:
        made = QUANTISED.fit(pipe, calls, str(folder / "parts"), under, say=lambda _: None)
    except ValueError as error:
        print(f"+ 8 bits: left out, {error}", flush=True)
        return ()
    return (TFMQ(made.save(folder / "faster-layers.safetensors")),)


def measure(given: argparse.Namespace, folder: Path) -> None:
    """All bars that are not there yet, written one by one as ``schema.Waterfall`` wants them."""
    load = load_average()
    bench = study(given.samples, given.device, given.referee)
    block = environment(given.device, load)
    old = None if given.fresh else read("waterfall", given.device)
    kept = kept_rows(old, bench.protocol(), block)
    measured: dict[str, Any] = {}
    previous: Recipe | None = None
    for name, recipe in bars(bench.pipe, given.samples, folder):
        if name in kept:
            measured[name] = kept[name]
        else:
            result = bench.compare(recipe, rounds=given.rounds)
            over = None
            if previous is not None and name != CONTROL:
                paired = bench.paired_time(previous, recipe, rounds=given.rounds)
                over = paired.speedup.as_json()
            measured[name] = {**row(recipe, result, str(folder)), "over_previous": over}
            shown = (measured[name][k] for k in ("speedup", "over_previous", "judged"))
            print(name, *shown, flush=True)
            block = environment(given.device, load)
            content = {**head(bench, given.samples, block), "rows": measured}
            write("waterfall", given.device, content)
        previous = recipe


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    add_fresh(parser)
    parser.add_argument("--draw", action="store_true", help="only draw the picture again")
    given = parser.parse_args()
    if not given.draw:
        with tempfile.TemporaryDirectory() as folder:
            measure(given, Path(folder))
    source = path("waterfall", given.device)
    if not source.is_file():
        raise SystemExit("waterfall: nothing measured yet; leave --draw out")
    draw(source, PICTURE[given.device])
    print(f"drew {PICTURE[given.device].name}")


if __name__ == "__main__":
    main()
