"""diffusers' own caches, a shorter solver and cache-dit on ``zoo:digits-dit``.

    python -m benchmarks.bench_native [--samples 200] [--only NAME] [--fresh] [--device cuda]

Speed, work and quality; each row is paired with the unmodified pipeline: same seeds, same inputs,
timed in turn, judged by the referee. The controls do the same work without what the method adds,
and must score worse: a first-order solver with as few steps, a cache that repeats its last output
where the method extrapolates. cache-dit needs the ``peers`` extra. One row has its own default
threshold, one the best settings found for this model; its default of 8 computed blocks is more than
there are. Rows are written as they are measured, and a run that was cut off goes on.
"""

from __future__ import annotations

import functools
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accel
from accel.artifact import ArtifactRef
from accel.measure import environment, load_average
from accel.method import Method, Recipe
from accel.settings import Settings
from benchmarks.digits_study import BATCH, DDIM, DPM, MODEL, command_line, head, inputs, study
from benchmarks.distil import RECIPES, students_of
from benchmarks.kept import Calibrated, Planned, due, kept_rows, measured
from benchmarks.peers import CacheDit
from benchmarks.results_file import add_fresh, read, write
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from samplers.swap import SwapScheduler


def rows(pipe: Any, folder: Path) -> dict[str, Planned]:
    """What is measured: one method each, then combinations, peers and controls."""

    @functools.cache
    def ratios() -> ArtifactRef:
        calls = [{**x, "output_type": "np"} for x in inputs(BATCH)]
        return MagCache.calibrate(pipe, calls).save(folder / "mag.safetensors")

    def magnitudes(threshold: float) -> Calibrated:
        settings = {"threshold": threshold, "samples": BATCH}
        return Calibrated(lambda: MagCache(threshold, artifact=ratios()), settings)

    every_fourth = Settings(
        Fn_compute_blocks=1,
        max_warmup_steps=5,
        residual_diff_threshold=0.24,
        max_continuous_cached_steps=3,
    )
    methods: dict[str, tuple[Method, ...] | Calibrated] = {
        "TaylorSeer(4, lite)": (TaylorSeer(interval=4, warmup=5, modules="lite"),),
        "TaylorSeer(3)": (TaylorSeer(interval=3),),
        "TaylorSeer(5)": (TaylorSeer(interval=5),),
        "FirstBlockCache(0.05)": (FirstBlockCache(0.05),),
        "FirstBlockCache(0.1)": (FirstBlockCache(0.1),),
        "MagCache(0.06)": magnitudes(0.06),
        "MagCache(0.12)": magnitudes(0.12),
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
        "control: TaylorSeer(5), order 0": (TaylorSeer(5, max_order=0),),
    }
    for name in students_of(MODEL):
        methods[name] = accel.read_recipe(RECIPES / f"{name}.yaml").recipe.methods
    return {k: m if isinstance(m, Calibrated) else Recipe(m) for k, m in methods.items()}


def here(device: str, load_before: float | None) -> dict[str, Any]:
    """The environment block, with the peer's version."""
    block = environment(device, load_before)
    return {**block, "versions": {**block["versions"], "cache-dit": version("cache-dit")}}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this; the others stay")
    add_fresh(parser)
    given = parser.parse_args()
    load = load_average()
    bench = study(given.samples, given.device, given.referee)
    old = None if given.fresh and not given.only else read("native", given.device)
    there = dict(kept_rows(old, bench.protocol(), here(given.device, load)))
    with tempfile.TemporaryDirectory() as folder:
        plans, folders = rows(bench.pipe, Path(folder)), (folder, str(RECIPES))
        for name in due(plans, there, given.fresh, *folders):
            if given.only not in name:
                continue
            there[name] = measured(bench, plans[name], given.rounds, *folders)
            print(name, *(there[name][k] for k in ("speedup", "psnr", "judged")), flush=True)
            there = {name: there[name] for name in plans if name in there}
            content = head(bench, given.samples, here(given.device, load))
            write("native", given.device, {**content, "rows": there})


if __name__ == "__main__":
    main()
