"""diffusers' own caches and a shorter solver on ``zoo:digits-dit``: speed, work, fidelity.

    python -m benchmarks.bench_native [--samples 32] [--rounds 5] [--only NAME]

Each row is paired with the unmodified pipeline: same seeds, same inputs, timed in turn. The
controls do the same work without what the method adds, and must score worse: a first-order solver
with as few steps, and a cache that repeats its last output from the first step on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import accel
from accel.measure import compare, environment
from accel.method import Method, Recipe
from accel.settings import Settings
from benchmarks.results_file import read, write
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from samplers.swap import SwapScheduler

STEPS, GUIDANCE, BATCH = 50, 3.0, 8
SEED = 1000
# a grid that starts at full noise, whatever the number of steps; DDIM's "leading" one does not
DPM = ("DPMSolverMultistepScheduler", Settings(timestep_spacing="trailing"))
DDIM = ("DDIMScheduler", Settings(timestep_spacing="trailing"))


def inputs(samples: int) -> list[dict[str, Any]]:
    """Batches of class labels that go round all classes, as pipeline-call arguments."""
    labels = [(i * 37) % 100 for i in range(samples)]
    return [
        {
            "class_labels": labels[i : i + BATCH],
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
        }
        for i in range(0, samples, BATCH)
    ]


def rows(pipe: Any, folder: Path) -> dict[str, Recipe]:
    """What is measured: one method each, then combinations."""
    calibration = [{**x, "output_type": "np"} for x in inputs(BATCH)]
    ratios = MagCache.calibrate(pipe, calibration).save(folder / "mag.safetensors")
    methods: dict[str, tuple[Method, ...]] = {
        "FirstBlockCache(0.05)": (FirstBlockCache(0.05),),
        "FirstBlockCache(0.1)": (FirstBlockCache(0.1),),
        "TaylorSeer(3)": (TaylorSeer(interval=3),),
        "TaylorSeer(5)": (TaylorSeer(interval=5),),
        "TaylorSeer(4, lite)": (TaylorSeer(interval=4, warmup=5, modules="lite"),),
        "MagCache(0.06)": (MagCache(0.06, artifact=ratios),),
        "MagCache(0.12)": (MagCache(0.12, artifact=ratios),),
        "DPM-Solver++ 20 steps": (SwapScheduler(*DPM, steps=20),),
        "DPM-Solver++ 10 steps": (SwapScheduler(*DPM, steps=10),),
        "DPM-Solver++ 20 steps + TaylorSeer(2, lite)": (
            SwapScheduler(*DPM, steps=20),
            TaylorSeer(interval=2, warmup=6, modules="lite"),
        ),
        "control: DDIM 10 steps": (SwapScheduler(*DDIM, steps=10),),
        "control: DDIM 20 steps": (SwapScheduler(*DDIM, steps=20),),
        "control: TaylorSeer(5), order 0, warmup 1": (TaylorSeer(5, 1, 0),),
    }
    return {name: Recipe(m) for name, m in methods.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:digits-dit")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="rows whose name holds this; the others stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = accel.load(arguments.model, device=arguments.device)
    pipe.set_progress_bar_config(disable=True)
    old = (read("native", arguments.device) or {}).get("rows", {}) if arguments.only else {}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in rows(pipe, Path(folder)).items():
            if arguments.only not in name:
                measured |= {name: old[name]} if name in old else {}
                continue
            calls = inputs(arguments.samples)
            seeds = [SEED + i for i in range(len(calls))]
            result = compare(pipe, recipe, calls, seeds=seeds, rounds=arguments.rounds)
            row = {k: result.measured()[k] for k in ("speedup", "flops", "nfe", "psnr", "ssim")}
            placeless = json.dumps([m.to_json() for m in recipe.methods]).replace(folder + "/", "")
            row["methods"] = json.loads(placeless)
            row["effect"] = [m["effect"] for m in result.report["members"]]
            measured[name] = row
            print(name, row["speedup"], row["psnr"], row["ssim"], flush=True)
    setting = {"model": arguments.model, "steps": STEPS, "guidance": GUIDANCE, "batch": BATCH}
    content = {**setting, "samples": arguments.samples, "rows": measured, **environment()}
    write("native", arguments.device, content)


if __name__ == "__main__":
    main()
