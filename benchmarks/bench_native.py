"""diffusers' own caches, a shorter solver and cache-dit on ``zoo:digits-dit``.

    python -m benchmarks.bench_native [--samples 200] [--rounds 7] [--only NAME] [--device cuda]

Speed, work and quality; each row is paired with the unmodified pipeline: same seeds, same inputs,
timed in turn, judged by the referee. The controls do the same work without what the method adds,
and must score worse: a first-order solver with as few steps, a cache that repeats its last output
from the first step on. cache-dit needs the ``peers`` extra. One row has its own default threshold,
one the best settings found for this model; its default of 8 computed blocks is more than there are.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accel
from accel.measure import environment, load_average
from accel.method import Method, Recipe
from accel.metrics.protocol import Protocol, require_same
from accel.settings import Settings
from benchmarks.digits_study import BATCH, DDIM, DPM, MODEL, command_line, head, inputs, row, study
from benchmarks.distil import RECIPES, students_of
from benchmarks.peers import CacheDit
from benchmarks.results_file import read, require_machine, write
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from samplers.swap import SwapScheduler


def rows(pipe: Any, folder: Path) -> dict[str, Recipe]:
    """What is measured: one method each, then combinations, peers and controls."""
    calibration = [{**x, "output_type": "np"} for x in inputs(BATCH)]
    ratios = MagCache.calibrate(pipe, calibration).save(folder / "mag.safetensors")
    every_fourth = Settings(
        Fn_compute_blocks=1,
        max_warmup_steps=5,
        residual_diff_threshold=0.24,
        max_continuous_cached_steps=3,
    )
    methods: dict[str, tuple[Method, ...]] = {
        "TaylorSeer(4, lite)": (TaylorSeer(interval=4, warmup=5, modules="lite"),),
        "TaylorSeer(3)": (TaylorSeer(interval=3),),
        "TaylorSeer(5)": (TaylorSeer(interval=5),),
        "FirstBlockCache(0.05)": (FirstBlockCache(0.05),),
        "FirstBlockCache(0.1)": (FirstBlockCache(0.1),),
        "MagCache(0.06)": (MagCache(0.06, artifact=ratios),),
        "MagCache(0.12)": (MagCache(0.12, artifact=ratios),),
        "DPM-Solver++ 20 steps": (SwapScheduler(*DPM, steps=20),),
        "DPM-Solver++ 10 steps": (SwapScheduler(*DPM, steps=10),),
        "DPM-Solver++ 20 steps + TaylorSeer(2, lite)": (
            SwapScheduler(*DPM, steps=20),
            TaylorSeer(interval=2, warmup=6, modules="lite"),
        ),
        "cache-dit DBCache F1B0, 0.08": (CacheDit(Settings(Fn_compute_blocks=1)),),
        "cache-dit DBCache + TaylorSeer": (CacheDit(every_fourth, taylor_order=1),),
        "control: DDIM 10 steps": (SwapScheduler(*DDIM, steps=10),),
        "control: DDIM 20 steps": (SwapScheduler(*DDIM, steps=20),),
        "control: TaylorSeer(5), order 0, warmup 1": (TaylorSeer(5, 1, 0),),
    }
    for name in students_of(MODEL):
        methods[name] = accel.read_recipe(RECIPES / f"{name}.yaml").recipe.methods
    return {name: Recipe(m) for name, m in methods.items()}


def kept_rows(old: dict[str, Any] | None, protocol: Protocol, here: dict[str, Any]) -> dict:
    """Rows of an earlier run that new ones may stand beside.

    Raises:
        ValueError: they are of another protocol, machine or number of threads.
    """
    if old is None:
        return {}
    if old["protocol"] is None:
        raise ValueError("the rows in the file have no protocol; measure all of them again")
    require_same(Protocol.read(old["protocol"]), protocol)
    require_machine(old["environment"], here)
    return old["rows"]


def here(device: str, load_before: float | None) -> dict[str, Any]:
    """The environment block, with the peer's version."""
    block = environment(device, load_before)
    return {**block, "versions": {**block["versions"], "cache-dit": version("cache-dit")}}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this; the others stay")
    given = parser.parse_args()
    load = load_average()
    bench = study(given.samples, given.device, given.referee)
    block = here(given.device, load)
    old = read("native", given.device) if given.only else None
    kept = kept_rows(old, bench.protocol(), block)
    with tempfile.TemporaryDirectory() as folder:
        planned = rows(bench.pipe, Path(folder))
        for name, recipe in planned.items():
            if given.only not in name:
                continue
            result = bench.compare(recipe, rounds=given.rounds)
            kept[name] = row(recipe, result, folder, str(RECIPES))
            print(name, *(kept[name][k] for k in ("speedup", "psnr", "judged")), flush=True)
            measured = {name: kept[name] for name in planned if name in kept}
            content = head(bench, given.samples, here(given.device, load))
            write("native", given.device, {**content, "rows": measured})


if __name__ == "__main__":
    main()
