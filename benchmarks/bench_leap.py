"""Linear proportional leap on ``zoo:digits-wan``: evaluations saved against quality.

    python -m benchmarks.bench_leap [--samples 16] [--rounds 3]

Euler's method in 30 steps, as in the paper, is what is compared with; leaps after shares of those
steps, and the two triggers. The controls take as many steps, evenly: what a leap has to beat.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from accel.measure import environment, load_average
from accel.method import Method, Recipe
from accel.zoo.world import caption
from apps.digits_referee import STRIDE, VIDEO_FRAMES
from benchmarks.digits_study import command_line, head, loaded, row, study_of
from benchmarks.results_file import write
from samplers.host import carried
from samplers.leap import Leap
from samplers.swap import SwapScheduler

MODEL = "zoo:digits-wan"
EULER = FlowMatchEulerDiscreteScheduler
STEPS, GUIDANCE, BATCH, SEED = 30, 3.0, 2, 3000
SHARES = (0.2, 0.3, 0.4, 16 / 30, 0.7, 0.85)  # 16 of 30: what the authors' app does


def inputs(samples: int) -> list[dict[str, Any]]:
    """Calls of the pipeline that go round digits, colours, backgrounds and directions."""
    size = {"height": 64, "width": 64, "num_frames": VIDEO_FRAMES}
    rows = [(i * STRIDE) % 100 for i in range(samples)]
    prompts = [caption(c % 10, c // 10, c % 5, c % 4) for c in rows]
    return [
        {
            "prompt": prompts[i : i + BATCH],
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            **size,
        }
        for i in range(0, samples, BATCH)
    ]


def rows() -> dict[str, Recipe]:
    """What is measured: the method alone first, on the pipeline that has Euler's scheduler."""
    made: dict[str, Method] = {f"Leap({share:.2f})": Leap(after=share) for share in SHARES}
    made["Leap(steady)"] = Leap()
    made["Leap(steady, official cosine)"] = Leap(scope="official")
    for share in SHARES:
        count = round(share * STEPS)
        made[f"control: {count} steps"] = SwapScheduler(EULER.__name__, steps=count)
    return {name: Recipe((method,)) for name, method in made.items()}


def main() -> None:
    given = command_line(__doc__, samples=16, rounds=3).parse_args()
    load = load_average()
    pipe = loaded(MODEL, given.device)
    pipe.scheduler = EULER.from_config(carried(pipe.scheduler, EULER))
    calls = inputs(given.samples)
    bench = study_of(pipe, calls, seed=SEED, model=MODEL, referee=given.referee)
    measured = {}
    for name, recipe in rows().items():
        result = bench.compare(recipe, rounds=given.rounds)
        measured[name] = row(recipe, result)
        print(name, *(measured[name][k] for k in ("speedup", "psnr", "judged")), flush=True)
    block = environment(given.device, load)
    write("leap", given.device, {**head(bench, given.samples, block, BATCH), "rows": measured})


if __name__ == "__main__":
    main()
