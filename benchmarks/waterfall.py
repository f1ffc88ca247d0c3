"""Baseline, then one method more per bar: speed beside quality, as figures and as a picture.

    python -m benchmarks.waterfall [--samples 200] [--rounds 9] [--device cuda] [--draw]

Every bar is timed in turn with the unmodified pipeline, and in turn with the bar before it. The
last bar is a control: the same methods, but the cache repeats its last output from the first step
on and extrapolates nothing. It must look worse, or the quality beside the speeds proves nothing.
``--draw`` only draws again.
"""

from __future__ import annotations

from typing import Any

from accel.measure import environment, load_average
from accel.method import Recipe
from benchmarks.digits_study import DPM, command_line, head, row, study
from benchmarks.results_file import path, write
from benchmarks.waterfall_picture import PICTURE, draw
from caches.native import TaylorSeer
from samplers.swap import SwapScheduler

BARS = {
    "DPM-Solver++, 20 steps": Recipe((SwapScheduler(*DPM, steps=20),)),
    "+ TaylorSeer": Recipe(
        (
            SwapScheduler(*DPM, steps=20),
            TaylorSeer(interval=2, warmup=6, modules="lite"),
        )
    ),
    "+ 12 steps, not 20": Recipe(
        (
            SwapScheduler(*DPM, steps=12),
            TaylorSeer(interval=2, warmup=6, modules="lite"),
        )
    ),
    "control: repeats, from step 1": Recipe(
        (
            SwapScheduler(*DPM, steps=12),
            TaylorSeer(interval=2, warmup=1, max_order=0, modules="lite"),
        )
    ),
}


def bars(samples: int, rounds: int, device: str, referee: str) -> dict[str, Any]:
    """All bars, measured, as ``schema.Waterfall`` wants them."""
    load = load_average()
    bench = study(samples, device, referee)
    rows: dict[str, Any] = {}
    previous: Recipe | None = None
    for name, recipe in BARS.items():
        result = bench.compare(recipe, rounds=rounds)
        over = None
        if previous is not None and not name.startswith("control"):
            over = bench.paired_time(previous, recipe, rounds=rounds).speedup.as_json()
        rows[name] = {**row(recipe, result), "over_previous": over}
        previous = recipe
        print(name, *(rows[name][k] for k in ("speedup", "over_previous", "judged")), flush=True)
    return {**head(bench, samples, environment(device, load)), "rows": rows}


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--draw", action="store_true", help="only draw the picture again")
    given = parser.parse_args()
    if not given.draw:
        result = bars(given.samples, given.rounds, given.device, given.referee)
        write("waterfall", given.device, result)
    source = path("waterfall", given.device)
    if not source.is_file():
        raise SystemExit("waterfall: nothing measured yet; leave --draw out")
    draw(source, PICTURE[given.device])
    print(f"drew {PICTURE[given.device].name}")


if __name__ == "__main__":
    main()
