"""What the core costs: microseconds per wrapped call, and its share of a DiT-XL-shaped step.

    python -m benchmarks.bench_overhead [--device cuda] [--rounds 7]

Paired in one process: the bare pipeline against the same pipeline with neutral methods attached;
attaching is not timed. Random weights in the shape of DiT-XL/2 at 256 pixels (28 blocks, width
1152, 256 tokens, guidance); on a card bfloat16, where Python hides behind no arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import accel
from accel.measure import environment, load_average, paired_time
from accel.method import Recipe
from accel.metrics.protocol import Protocol
from accel.patch import Patch
from accel.testing import spy
from benchmarks.results_file import DEVICES, write
from caches.native import FirstBlockCache

CALLS = 20_000
REPEATS = 9  # of those calls, bare and wrapped in turn
STEPS = {"cpu": 1, "cuda": 20}  # a card's step is over too soon to be timed alone
TYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
GUIDANCE = 4.0


def microseconds_per_wrapped_call() -> dict[str, float]:
    """Extra time of one call through a trampoline with one, and with three, pass-through layers."""

    class Nothing(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        return call_next(*args, **kwargs)

    def loop(module: torch.nn.Module) -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            module(None)
        return (time.perf_counter() - begin) / CALLS * 1e6

    extra = {}
    for layers in (1, 3):
        module, patch, differences = Nothing(), Patch(), []
        for _ in range(REPEATS):
            bare = loop(module)
            for _ in range(layers):
                patch.around_call(module, layer)
            differences.append(loop(module) - bare)
            patch.undo()
        extra[f"{layers}_layers"] = round(statistics.median(differences), 3)
    return extra


def dit_xl(device: str) -> DiTPipeline:
    """A random DiT-XL/2 with the smallest autoencoder that fits behind it."""
    with torch.device(device):
        transformer = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=4,
            num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler()).to(TYPES[device])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def share_of_a_step(device: str, rounds: int, per_call: float) -> dict[str, dict[str, float]]:
    """Relative extra time of a run with each neutral recipe attached, paired with the bare run.

    ``counted_percent`` is the number of wrapped calls times ``per_call`` (microseconds): what the
    trampolines cost by count, where the paired time is lost in the machine's noise.
    """
    pipe, steps = dit_xl(device), STEPS[device]

    def run() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe(
            [1],
            guidance_scale=GUIDANCE,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
        )

    neutral = Recipe((FirstBlockCache().neutral(),))
    recipes = {"a neutral cache": neutral, "every module wrapped": spy()}
    rows = {}
    for name, recipe in recipes.items():
        calls = 0

        @contextmanager
        def under(recipe: Recipe = recipe) -> Iterator[None]:
            nonlocal calls
            with accel.attached(recipe, pipe) as live:
                yield
            calls = sum(m["runs"][0]["computed"] for m in live.report()["members"])

        times = paired_time(run, run, rounds=rounds, around=(nullcontext, under))
        speedup, step = times.speedup, statistics.median(times.seconds_a) / steps
        rows[name] = {
            "overhead_percent": round(100 * (1 / speedup.estimate - 1), 3),
            "low": round(100 * (1 / speedup.high - 1), 3),
            "high": round(100 * (1 / speedup.low - 1), 3),
            "wrapped_calls_per_step": calls // steps,
            "counted_percent": round(calls / steps * per_call * 1e-4 / step, 4),
            "bare_seconds_per_step": round(step, 6),
        }
        print(name, rows[name], flush=True)
    return rows


def protocol(device: str, rounds: int) -> Protocol:
    """What is timed."""
    return Protocol(
        model="DiT-XL/2 in shape, random weights",
        inputs={"class_labels": [1]},
        samples=1,
        seeds=[0],
        steps=STEPS[device],
        guidance=GUIDANCE,
        scheduler="DDIMScheduler",
        size=[256, 256],
        more={
            "rounds": rounds,
            "wrapped_calls": CALLS,
            "repeats": REPEATS,
            "dtype": str(TYPES[device]),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    load = load_average()
    per_call = microseconds_per_wrapped_call()
    print(per_call, flush=True)
    rows = share_of_a_step(arguments.device, arguments.rounds, per_call["1_layers"])
    result = {
        "environment": environment(arguments.device, load),
        "protocol": protocol(arguments.device, arguments.rounds).as_json(),
        "microseconds_per_wrapped_call": per_call,
        "dit_xl_256": rows,
    }
    write("overhead", arguments.device, result)


if __name__ == "__main__":
    main()
