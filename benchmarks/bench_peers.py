"""Every method in turn, the best recipes, and peers, in one table: ``peers.json``.

    python -m benchmarks.bench_peers [--samples 200] [--rounds 7] [--only NAME ...] [--fresh]

One model (``zoo:digits-dit``), one protocol, one machine: each row is paired with the unmodified
pipeline, timed in turn with it, and judged by the referee. Rows are written as they are measured;
the same command goes on where it stopped, and refuses rows of another machine, other versions or
another protocol (then, and after a change of code: ``--fresh``). What is calibrated is calibrated
on other noise. Peers have the setting that was best for them here. Methods for other models
(encoder propagation, One More Step, sparse video attention) have studies of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accel
from accel.measure import environment, load_average
from accel.method import Method, Recipe
from accel.settings import Settings, settings_json
from benchmarks.bench_caches import learned
from benchmarks.digits_study import BATCH, DDIM, DPM, command_line, head, inputs, study
from benchmarks.distil import RECIPES
from benchmarks.kept import Calibrated, due, kept_rows, measured
from benchmarks.peers import CacheDit
from benchmarks.quant_peers import Quanto, TorchAO
from benchmarks.results_file import add_fresh, read, write
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from caches.residual_gate import ResidualGate
from quant.calibrate import TFMQCalibration
from quant.temporal_cache import TemporalCache
from quant.tfmq import TFMQ
from samplers.epsilon_scaling import EpsilonScaling
from samplers.leap import Leap
from samplers.swap import SwapScheduler
from samplers.time_shift import TimeShift

ASKED = 40  # dB of PSNR that the residual gate is calibrated for
PEERS = ("cache-dit", "torchao", "optimum-quanto")
INTEGERS = TFMQCalibration(bits=8, steps=100, calls=5, rounding="gptq")
Methods = tuple[Method, ...]
Made = Callable[[], Methods] | Calibrated


@dataclass(frozen=True)
class Planned:
    """A row before it is measured. ``whose``: ours, diffusers', another project's, a control."""

    whose: str
    made: Made

    def recipe(self) -> Recipe | Calibrated:
        """As ``kept.measured`` wants it; nothing is calibrated."""
        return self.made if isinstance(self.made, Calibrated) else Recipe(self.made())


def rows(pipe: Any, folder: Path) -> dict[str, Planned]:
    """All rows by name. Nothing is read or calibrated before a row's turn."""
    dpm20, dpm12 = (SwapScheduler(*DPM, steps=n) for n in (20, 12))
    lite = TaylorSeer(interval=2, warmup=6, modules="lite")
    every_fourth = Settings(
        Fn_compute_blocks=1,
        max_warmup_steps=5,
        residual_diff_threshold=0.24,
        max_continuous_cached_steps=3,
    )
    forecast = CacheDit(every_fourth, taylor_order=1)
    ratios = {"threshold": 0.06, "samples": BATCH}
    asked = {"quality": ASKED, "samples": 2 * BATCH}
    plans: dict[str, tuple[str, Made | Method | Methods]] = {
        "DPM-Solver++ 20 steps": ("diffusers", dpm20),
        "TaylorSeer: 4, lite": ("diffusers", TaylorSeer(interval=4, warmup=5, modules="lite")),
        "FirstBlockCache: 0.05": ("diffusers", FirstBlockCache(0.05)),
        "MagCache: 0.06": ("diffusers", Calibrated(lambda: _ratios(pipe, folder), ratios)),
        "interval, output: 5": ("ours", IntervalCache(5, 2, 0, "output", 1)),
        "interval, blocks: 3": ("ours", IntervalCache(3, 3, 0, "blocks", 1)),
        "evolution, as shipped": ("ours", lambda: _shipped("digits-dit-evolution")),
        "router, learned for 20 steps": ("ours", lambda: _router(pipe, folder)),
        f"residual gate: {ASKED} dB asked": (
            "ours",
            Calibrated(lambda: _gate(pipe, folder), asked),
        ),
        "temporal cache": ("ours", TemporalCache()),
        "leap": ("ours", Leap()),
        "epsilon scaling": ("ours", EpsilonScaling()),
        "DDIM 10 steps + time shift": ("ours", (SwapScheduler(*DDIM, steps=10), TimeShift())),
        "student, 4 steps": ("ours", lambda: _shipped("digits-dit-4-steps")),
        "student, 1 step": ("ours", lambda: _shipped("digits-dit-1-step")),
        "recipe dpm-cache": ("recipe", lambda: _shipped("dpm-cache")),
        "recipe dpm-cache, extrapolated": ("recipe", (dpm20, lite)),
        "recipe dpm-cache, extrapolated, 12 steps": ("recipe", (dpm12, lite)),
        "DBCache F1B0, 0.08": ("cache-dit", CacheDit(Settings(Fn_compute_blocks=1))),
        "DBCache + TaylorSeer": ("cache-dit", forecast),
        "DPM-Solver++ 20 steps + DBCache + TaylorSeer": ("cache-dit", (dpm20, forecast)),
        "DDIM 10 steps": ("control", SwapScheduler(*DDIM, steps=10)),
        "DDIM 20 steps": ("control", SwapScheduler(*DDIM, steps=20)),
        "TaylorSeer: 5, order 0, warmup 1": ("control", TaylorSeer(5, 1, 0)),
        "TFMQ W8A8, GPTQ": (
            "ours",
            Calibrated(lambda: _integers(pipe, folder), settings_json(INTEGERS)),
        ),
        "int8 dynamic": ("torchao", TorchAO("int8 dynamic")),
        "int8 weight-only": ("torchao", TorchAO("int8 weight-only")),
        "int8 weights": ("quanto", Quanto(8)),
    }
    return {name: Planned(whose, _later(made)) for name, (whose, made) in plans.items()}


def _later(made: Made | Method | Methods) -> Made:
    if isinstance(made, Method):
        return lambda: (made,)
    if isinstance(made, tuple):
        return lambda: made
    return made


def _shipped(name: str) -> Methods:
    return accel.read_recipe(RECIPES / f"{name}.yaml").recipe.methods


def _calls(samples: int) -> list[dict[str, Any]]:
    return [{**call, "output_type": "np"} for call in inputs(samples)]


def _ratios(pipe: Any, folder: Path) -> Method:
    found = MagCache.calibrate(pipe, _calls(BATCH))
    return MagCache(0.06, artifact=found.save(folder / "mag.safetensors"))


def _gate(pipe: Any, folder: Path) -> Method:
    found = ResidualGate.calibrate(pipe, _calls(2 * BATCH), quality=ASKED)
    return ResidualGate(found.save(folder / "gate.safetensors"))


def _router(pipe: Any, folder: Path) -> Methods:
    """The most careful schedule, whose grid is stretched to the study's."""
    _, method = next(learned(pipe, 20, folder))
    return (method,)


def _integers(pipe: Any, folder: Path) -> Method:
    made = INTEGERS.fit(pipe, inputs(BATCH), str(folder / "tfmq"), say=lambda _: None)
    return TFMQ(made.save(folder / "tfmq.safetensors"))


def here(device: str, load: float | None) -> dict[str, Any]:
    """The environment block, with the peers' versions."""
    block = environment(device, load)
    return {**block, "versions": {**block["versions"], **{p: version(p) for p in PEERS}}}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure (again)")
    add_fresh(parser)
    given = parser.parse_args()
    bench = study(given.samples, given.device, given.referee)
    now = here(given.device, load_average())
    old = None if given.fresh and not given.only else read("peers", given.device)
    there: dict[str, Any] = dict(kept_rows(old, bench.protocol(), now))
    left_out = dict(old["left_out"]) if old else {}  # what this model cannot have, with why
    own = old["environment"] if old else now
    with tempfile.TemporaryDirectory() as folder:
        plans, folders = rows(bench.pipe, Path(folder)), (folder, str(RECIPES))
        for name, plan in plans.items():
            if given.only and name not in given.only:
                continue
            load = load_average()
            try:
                recipe = plan.recipe()
                if not due({name: recipe}, there, bool(given.only), *folders):
                    continue
                made = measured(bench, recipe, given.rounds, *folders)
                own = here(given.device, load)
                there[name] = {**made, "environment": own, "whose": plan.whose}
                left_out.pop(name, None)
                print(name, *(made[k] for k in ("speedup", "psnr", "judged")), flush=True)
            except (ValueError, ImportError) as error:
                there.pop(name, None)
                left_out[name] = " ".join(str(error).split())
                print(f"{name}: left out: {left_out[name]}", flush=True)
            there = {k: there[k] for k in plans if k in there}
            content = {
                **head(bench, given.samples, own),
                "rows": there,
                "left_out": {k: left_out[k] for k in plans if k in left_out},
                "waiting": [k for k in plans if k not in there and k not in left_out],
            }
            write("peers", given.device, content)  # after each: a stopped run was not for nothing


if __name__ == "__main__":
    main()
