"""What ``quant.temporal_cache`` removes, counted, and what it saves, timed; all of it bit-equal.

    python -m benchmarks.bench_temporal_cache [--parts counts times rows] [--device cuda]

Counts: public architectures at their released sizes on the meta device, in bfloat16, a grid of 50
steps. Bit-equality: every tiny pipeline, weights gone. Times: random weights in the shape of public
models, runs of as many steps, whose table is filled in the run or was filled by an earlier one.
Rows: embedded models with the referee, paired as every other method.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

import accel
from accel.measure import environment, load_average, paired_time
from accel.method import Recipe
from accel.testing import TINY_NAMES, tiny
from apps.digits_referee import NAME
from benchmarks.bench_overhead import TYPES, dit_xl
from benchmarks.digits_study import head, row, study
from benchmarks.public_models import PUBLIC, PublicModel
from benchmarks.results_file import DEVICES, write
from quant._dataflow import watch
from quant._program import program, small_enough, table_bytes
from quant.temporal_cache import MOST_DIMENSIONS, TemporalCache

STEPS = 50
TIMED_STEPS = {"cpu": 3, "cuda": 20}  # a card's run of 3 is over too soon to be timed


def counts(model: PublicModel) -> dict[str, Any]:
    """Parameters, and by what is held fixed: weights that go and the table that comes, in bytes."""
    module, call = model.model(), model.call()
    names = list(inspect.signature(type(module).forward).parameters)
    assert set(call) <= set(names), set(call) - set(names)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters())}
    for hold, most in MOST_DIMENSIONS.items():
        sources = {
            name + keystr(where): leaf
            for name, value in call.items()
            for where, leaf in tree_flatten_with_path(value)[0]
            if isinstance(leaf, torch.Tensor)
            and (name == "timestep" or (name not in model.sample and leaf.ndim <= most))
        }
        with torch.no_grad():
            seen = watch(module, lambda: module(**call), sources)
        assert not seen.read_by_python
        plan = program(seen, module, small_enough(module, STEPS, 1.0))
        prefixes = tuple(f"{path}." for path in plan.served)
        gone = [p for n, p in module.named_parameters() if n.startswith(prefixes)]
        found[hold] = {
            "modules": len(plan.served),
            "parameters": sum(p.numel() for p in gone),
            "weights_bytes": sum(p.nbytes for p in gone),
            "table_bytes": sum(table_bytes(plan.served[p], STEPS) for p in plan.needed),
        }
    return found


def bit_equal(name: str) -> bool:
    """A watched and a served run of a tiny pipeline against the plain one, weights on disk."""
    host = tiny(name)
    plain = host.run()
    with accel.attached(TemporalCache(weights="disk"), host.pipe):
        runs = [host.run(), host.run()]
    return all(torch.equal(plain, x) for x in (*runs, host.run()))


def times(device: str, rounds: int) -> dict[str, Any]:
    """Speed-ups of DiT-XL/2-shaped runs: with a table from an earlier run, and without."""
    pipe, steps = dit_xl(device), TIMED_STEPS[device]
    labels = iter(range(2, 1000))

    def run(label: int) -> None:
        pipe(
            [label],
            guidance_scale=1.0,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        )

    @contextmanager
    def filled() -> Iterator[None]:
        with accel.attached(TemporalCache(), pipe):
            run(1)  # not timed
            yield

    cases = {"filled before": lambda: run(1), "filled in the run": lambda: run(next(labels))}
    found = {}
    for case, served in cases.items():
        pair = (nullcontext, filled)
        timed = paired_time(lambda: run(1), served, rounds=rounds, around=pair)
        found[case] = timed.speedup.as_json()
        print(case, found[case], flush=True)
    kind = str(TYPES[device]).removeprefix("torch.")
    model = f"DiT-XL/2 at 256 pixels, random {kind} weights, one sample"
    return {"model": model, "steps": steps, "speedup": found}


def rows(device: str, samples: int, rounds: int) -> dict[str, Any]:
    """A study of digits-dit with one row."""
    load = load_average()
    bench, method = study(samples, device, NAME), Recipe((TemporalCache(),))
    measured = {"temporal cache": row(method, bench.compare(method, rounds=rounds))}
    return {**head(bench, samples, environment(device, load)), "rows": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="*", default=["counts", "times", "rows"])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device, load = given.device, load_average()
    if "counts" in given.parts:
        counted = {name: counts(model) for name, model in PUBLIC.items()}
        equal = {name: bit_equal(name) for name in TINY_NAMES}
        block = environment(device, load)
        found = {"environment": block, "grid": STEPS, "counts": counted, "bit_equal": equal}
        write("temporal_counts", device, found)
    if "times" in given.parts:
        timed = times(device, given.rounds)
        write("temporal_times", device, {"environment": environment(device, load), **timed})
    if "rows" in given.parts:
        write("temporal_cache", device, rows(device, given.samples, given.rounds))


if __name__ == "__main__":
    main()
