"""Baseline, then one method more per bar: speed beside quality, as figures and as a picture.

    python -m benchmarks.waterfall [--samples 200] [--rounds 9] [--device cuda] [--fresh | --draw]

Every bar is timed in turn with the unmodified pipeline, and in turn with the bar before it. The
quantised layers are those that 8 bits make faster on this machine, each timed alone; calibrated
under the bar before. The cache repeats, it does not extrapolate: behind a solver of few steps that
is nearer. The last bar is a control: the solver alone, in as many steps as the bar before computes.
Bars that the file has already with the same settings are not
measured again, so a stopped run goes on (the last two go together: other timings choose other
layers); ``--fresh`` measures all. ``--draw`` only draws again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from accel.measure import environment, load_average
from accel.method import Method, Recipe
from accel.settings import settings_json
from benchmarks.digits_study import BATCH, DPM, command_line, head, inputs, row, study
from benchmarks.kept import kept_rows, stays
from benchmarks.results_file import add_fresh, path, read, write
from benchmarks.waterfall_picture import PICTURE, draw
from caches.native import TaylorSeer
from quant.calibrate import TFMQCalibration
from quant.tfmq import TFMQ
from samplers.swap import SwapScheduler

FEW = 12  # steps
REPEATS = TaylorSeer(interval=2, warmup=6, max_order=0, modules="lite")
COMPUTED = REPEATS.warmup + (FEW - REPEATS.warmup) // REPEATS.interval
QUANTISED = TFMQCalibration(bits=8, only_faster=True)
EIGHT = "+ 8 bits, where faster alone"
CONTROL = f"control: {COMPUTED} steps, all computed"


def first_bars() -> dict[str, Recipe]:
    """Names and recipes, each a method more than the one before."""
    dpm, few = (SwapScheduler(*DPM, steps=steps) for steps in (20, FEW))
    return {
        "DPM-Solver++, 20 steps": Recipe((dpm,)),
        "+ every second step repeated": Recipe((dpm, REPEATS)),
        f"+ {FEW} steps, not 20": Recipe((few, REPEATS)),
    }


def last_bars(pipe: Any, samples: int, folder: Path) -> dict[str, Recipe]:
    """The same in 8 bits where that is faster, and the control, of the same layers."""
    few, computed = (SwapScheduler(*DPM, steps=steps) for steps in (FEW, COMPUTED))
    eight = quantised(pipe, samples, Recipe((few, REPEATS)), folder)
    bar = {EIGHT: Recipe((few, REPEATS, *eight))} if eight else {}
    return bar | {CONTROL: Recipe((computed, *eight))}


def calibration() -> dict[str, Any]:
    """What the last two bars depend on."""
    methods = (SwapScheduler(*DPM, steps=FEW), REPEATS)
    return {"how": settings_json(QUANTISED), "methods": [m.to_json() for m in methods]}


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
    old = None if given.fresh else read("waterfall", given.device)
    there = dict(kept_rows(old, bench.protocol(), environment(given.device, load)))
    names = (*first_bars(), EIGHT, CONTROL)
    previous: Recipe | None = None

    def add(name: str, recipe: Recipe, more: dict[str, Any]) -> None:
        result = bench.compare(recipe, rounds=given.rounds)
        over = None
        if previous is not None and name != CONTROL:
            paired = bench.paired_time(previous, recipe, rounds=given.rounds)
            over = paired.speedup.as_json()
        there[name] = {**row(recipe, result, str(folder)), "over_previous": over, **more}
        print(name, *(there[name][k] for k in ("speedup", "over_previous", "judged")), flush=True)
        content = head(bench, given.samples, environment(given.device, load))
        rows = {name: there[name] for name in names if name in there}
        write("waterfall", given.device, {**content, "rows": rows})

    for name, recipe in first_bars().items():
        if not stays(there.get(name), recipe):
            add(name, recipe, {})
        previous = recipe
    settings = calibration()
    if stays(there.get(CONTROL), settings):  # it comes last, so what is before it is there
        return
    there.pop(EIGHT, None)
    for name, recipe in last_bars(bench.pipe, given.samples, folder).items():
        add(name, recipe, {"calibration": settings})


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
