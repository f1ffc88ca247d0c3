"""Feature caches on a video model: curves of speed against fidelity on ``zoo:digits-wan``.

    python -m benchmarks.bench_caches_video [--videos 6] [--rounds 3] [--only CURVE ...] [--fresh]

As ``bench_caches``: every row is timed in turn with the unmodified pipeline and paired with it
video by video, and the referee judges digit, colour, background and motion. Guidance asks the
network twice a step, each branch in a call of its own. Gate and ratios are calibrated on one other
video with other noise, and ``benchmarks.search_schedules`` searched on three; no router is trained,
which takes hundreds of videos. A minute of one core a row; rows are written as they are measured,
and a run that was cut off goes on. Controls: as many steps as the searched schedule computes, at
random; and fewer steps of the same sampler.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accel.artifact import ArtifactRef
from accel.measure import Study, load_average
from accel.method import Method, Recipe
from accel.settings import Settings
from benchmarks.bench_caches import magnitudes
from benchmarks.bench_native import here
from benchmarks.density_rows import density
from benchmarks.digits_study import UNIPC, WAN, head, loaded, study_of, videos
from benchmarks.kept import Calibrated, due, kept_rows, measured
from benchmarks.peers import CacheDit
from benchmarks.results_file import DEVICES, add_fresh, read, write
from benchmarks.search_schedules import front
from caches.evolution import EvolutionCache
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from caches.residual_gate import ResidualGate
from caches.schedule import causal
from caches.token_merge import TokenMerge
from samplers.swap import SwapScheduler

MODEL, RESULT = WAN, "caches_wan"
STEPS, SEED = 20, 1000
OTHER = 77  # place of the calibration's prompt in the order of prompts
QUALITIES = (35, 30, 25)  # dB that searched schedule and gate are asked for
CONTROLLED = 30
MARGIN = 1.0  # dB more on the calibration videos

Made = Callable[[], Method] | Calibrated


def rows(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Made]]:
    """What is measured, by worth; what needs a calibration is made when it is asked for."""
    for interval in (2, 3):
        yield f"FORA: {interval}", partial(IntervalCache, interval, 1, 0, "modules", 0)
        yield f"interval, modules: {interval}", partial(IntervalCache, interval, 2, 0, "modules", 1)
        yield f"interval, output: {interval}", partial(IntervalCache, interval, 2, 0, "output", 1)
        repeat = partial(IntervalCache, interval, 3, 0, "output", 0)
        yield f"interval, output, repeated: {interval}", repeat
    yield "interval, blocks: 2", partial(IntervalCache, 2, 3, 0, "blocks", 1)
    for interval in (2, 3):
        yield f"TaylorSeer, lite: {interval}", partial(TaylorSeer, interval, 3, modules="lite")
    for threshold in (0.1, 0.2):
        yield f"FirstBlockCache: {threshold}", partial(FirstBlockCache, threshold)
    for most, name in ((0, "DBCache"), (3, "DBCache + TaylorSeer")):
        cache = {
            "Fn_compute_blocks": 1,
            "max_warmup_steps": 4,
            "residual_diff_threshold": 1.0 if most else 0.12,
            **({"max_continuous_cached_steps": most} if most else {}),
        }
        setting = most or 0.12
        yield f"cache-dit {name}: {setting}", partial(CacheDit, Settings(cache), min(most, 1))
    for until in (0.5, 1.0):
        yield f"token merge: first {until:.0%} of the steps", partial(TokenMerge, until)
    yield from density(pipe, steps, folder, (0.25, 0.5), 0.5)
    calls = [{**call, "output_type": "np"} for call in videos(OTHER + 1, steps)[OTHER:]]
    for quality in QUALITIES:
        yield (
            f"evolution: {quality} dB asked",
            partial(searched, pipe, steps, folder, quality, shuffle=False),
        )
    yield (
        f"control: random steps, as many as evolution at {CONTROLLED} dB",
        partial(searched, pipe, steps, folder, CONTROLLED, shuffle=True),
    )
    for fewer in (10, 12):
        yield f"control: {fewer} steps", partial(SwapScheduler, *UNIPC, steps=fewer)
    yield "MagCache: 0.06", magnitudes(0.06, partial(_ratios, pipe, calls, folder))
    for quality in QUALITIES:
        settings = {"quality": quality + MARGIN, "other": OTHER}
        made = partial(gate, pipe, calls, folder, quality)
        yield f"residual gate: {quality} dB asked", Calibrated(made, settings)


def searched(
    pipe: Any, steps: int, folder: Path, quality: float, *, shuffle: bool
) -> EvolutionCache:
    """The fastest schedule that was found with so many dB; shuffled, its steps at random."""
    found = front(steps, "video").candidates
    good = [c for c in found if c.quality >= quality + MARGIN]
    schedule = max(good, key=lambda c: c.speedup).schedule
    if shuffle:
        later = list(schedule.rows[1:])
        random.Random(0).shuffle(later)
        schedule = causal(replace(schedule, rows=(schedule.rows[0], *later)))
    return EvolutionCache.of(schedule, pipe, folder / f"{quality:g}-{shuffle}.safetensors")


def gate(pipe: Any, calls: list[dict[str, Any]], folder: Path, quality: float) -> ResidualGate:
    """The gate for so many dB on the calibration's video."""
    found = ResidualGate.calibrate(pipe, calls, quality=quality + MARGIN)
    return ResidualGate(found.save(folder / f"gate-{quality:g}.safetensors"))


def _ratios(pipe: Any, calls: list[dict[str, Any]], folder: Path) -> ArtifactRef:
    return MagCache.calibrate(pipe, calls).save(folder / "mag.safetensors")


def study(given: argparse.Namespace) -> Study:
    """The pipeline, one thread, a video a call; the first is timed."""
    calls = videos(given.videos, given.steps)
    return study_of(loaded(given.model, given.device), calls, seed=SEED, model=given.model)


def content(bench: Study, block: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """As ``schema.Caches`` has it."""
    return {**head(bench, len(bench.inputs), block, batch=1), "rows": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="a folder is a trial, not kept")
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of rows to measure")
    add_fresh(parser)
    given = parser.parse_args()
    load = load_average()
    bench = study(given)
    block = here(given.device, load)
    trial = given.model != MODEL
    old = None if trial or (given.fresh and not given.only) else read(RESULT, given.device)
    there: dict[str, Any] = dict(kept_rows(old, bench.protocol(), block))
    with tempfile.TemporaryDirectory() as folder:
        found = dict(rows(bench.pipe, given.steps, Path(folder)))
        for label, make in found.items():
            if given.only and not label.startswith(tuple(given.only)):
                continue
            try:
                planned = make if isinstance(make, Calibrated) else Recipe((make(),))
                if not due({label: planned}, there, given.fresh, folder):
                    continue
                there[label] = measured(bench, planned, given.rounds, folder)
            except ValueError as error:  # nothing was found for so many dB
                print(f"{label}: left out, {error}", flush=True)
                continue
            print(label, *(there[label][k] for k in ("speedup", "psnr", "judged")), flush=True)
            there = {name: there[name] for name in found if name in there}
            if not trial:
                write(RESULT, given.device, content(bench, here(given.device, load), there))


if __name__ == "__main__":
    main()
