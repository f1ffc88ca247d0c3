"""Feature caches against each other: curves of speed against fidelity, ours beside the peers'.

    python -m benchmarks.bench_caches [--model zoo:digits-sd] [--steps 20] [--samples 500]
                                      [--curves CURVE ...] [--fresh]

Every row is timed in turn with the unmodified pipeline and paired with it sample by sample. A row's
name is its curve, then the setting. Peers: diffusers' own caches, and cache-dit (the ``peers``
extra) with its caches alone and with its forecasts. The searched and learned schedules come from
``benchmarks.search_schedules``, made on other noise. Controls compute as much at random steps. Rows
are written as they are measured, and a run that was cut off goes on.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.artifact import Artifact, ArtifactRef
from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.measure import load_average
from accel.method import Method, Recipe
from accel.settings import Settings
from benchmarks.bench_native import here
from benchmarks.density_rows import density
from benchmarks.digits_study import BATCH, MODEL, SD, command_line, head, inputs, study
from benchmarks.kept import Calibrated, Planned, due, kept_rows, measured
from benchmarks.peers import CacheDit
from benchmarks.results_file import add_fresh, read, write
from benchmarks.search_schedules import HEADS, SCHEDULES, front
from caches.early_exit import EarlyExit
from caches.encoder_propagation import EncoderPropagation
from caches.evolution import EvolutionCache
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from caches.residual_gate import ResidualGate
from caches.router import RouterCache
from caches.schedule import Schedule, causal, to_artifact

SAMPLES = 500
QUALITIES = (40, 35, 30, 25)  # dB that the searched front is asked for
MARGIN = 1.0  # dB more on the calibration inputs
STEPS = {"caches": 50, "caches_20": 20, "caches_sd": 50}


Made = Method | functools.partial[Any] | Calibrated


def transformer_rows(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Made]]:
    """Curves on a transformer."""
    yield from searched(pipe, steps, folder)
    yield from learned(pipe, steps, folder)
    yield from gates(pipe, steps, folder)
    yield from exits(pipe, steps, folder)
    yield from density(pipe, steps, folder, (0.1, 0.25, 0.5), 0.25)
    for interval in (3, 5, 6, 7, 8):
        yield f"interval, output: {interval}", IntervalCache(interval, 2, 0, "output", 1)
    for interval in (2, 3):
        yield f"interval, blocks: {interval}", IntervalCache(interval, 3, 0, "blocks", 1)
        yield f"FORA: {interval}", IntervalCache(interval, 1, 0, "modules", 0)
    for interval in (4, 5, 6, 7, 8, 9):
        yield f"TaylorSeer, lite: {interval}", TaylorSeer(interval, 3, modules="lite")
    for interval in (3, 5, 7):
        yield f"TaylorSeer: {interval}", TaylorSeer(interval, 3)
    for threshold in (0.05, 0.1, 0.2, 0.3):
        yield f"FirstBlockCache: {threshold}", FirstBlockCache(threshold)
    ratios = functools.cache(functools.partial(_magnitudes, pipe, steps, folder))
    for threshold in (0.03, 0.06, 0.12):
        yield f"MagCache: {threshold}", magnitudes(threshold, ratios)
    for threshold in (0.08, 0.16, 0.24):
        cache = {
            "Fn_compute_blocks": 1,
            "max_warmup_steps": 4,
            "residual_diff_threshold": threshold,
        }
        yield f"cache-dit DBCache: {threshold}", CacheDit(Settings(cache))
    for most in (3, 5, 7, 9):
        cache = {
            "Fn_compute_blocks": 1,
            "max_warmup_steps": 4,
            "residual_diff_threshold": 1.0,
            "max_continuous_cached_steps": most,
        }
        yield f"cache-dit DBCache + TaylorSeer: {most}", CacheDit(Settings(cache), taylor_order=1)


def unet_rows(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Method]]:
    """Curves on a UNet."""
    encoder = EncoderPropagation()
    yield "encoder propagation: keys", encoder
    yield "encoder propagation, batched: keys", replace(encoder, parallel=True)
    yield "encoder propagation: keys, no noise", replace(encoder, noise=0.0)
    yield "encoder propagation: every 2", replace(encoder, every=2)
    for interval in (2, 3, 5):
        yield f"interval, deep: {interval}", IntervalCache(interval, 1, 0, "deep", 0)
    for interval in (3, 5):
        yield f"interval, deep, order 1: {interval}", IntervalCache(interval, 2, 0, "deep", 1)
    for interval in (5, 9, 12):
        yield f"interval, output: {interval}", IntervalCache(interval, 2, 0, "output", 1)


def searched(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Method]]:
    """Schedules of the searched front for rising boldness, and random ones of equal work.

    None where there was no search for so many steps.
    """
    if not (SCHEDULES / f"evolution-{steps}").is_dir():
        return
    found = front(steps)

    def method(schedule: Schedule, name: str) -> EvolutionCache:
        return EvolutionCache.of(schedule, pipe, folder / f"{name}.safetensors")

    rng = random.Random(0)
    for quality in QUALITIES:
        good = [c for c in found.candidates if c.quality >= quality + MARGIN]
        schedule = max(good, key=lambda c: c.speedup).schedule
        yield f"evolution: {quality} dB asked", method(schedule, f"evolution-{quality}")
        rows = list(schedule.rows[1:])
        rng.shuffle(rows)
        shuffled = causal(replace(schedule, rows=(schedule.rows[0], *rows)))
        name = f"control: random steps, as many as evolution at {quality} dB"
        yield name, method(shuffled, f"random-{quality}")


def gates(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Calibrated]]:
    """Gates calibrated on other noise for rising boldness."""
    calls = [{**x, "output_type": "np"} for x in inputs(2 * BATCH, steps)]

    def gate(quality: float) -> ResidualGate:
        found = ResidualGate.calibrate(pipe, calls, quality=quality)
        return ResidualGate(found.save(folder / f"gate-{quality}.safetensors"))

    for quality in QUALITIES:
        settings = {"quality": quality, "samples": 2 * BATCH}
        made = functools.partial(gate, quality)
        yield f"residual gate: {quality} dB asked", Calibrated(made, settings)


def exits(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Method]]:
    """Early exits from careful to bold, and those at 30 dB in random order.

    None where none were calibrated for so many steps.
    """
    file = SCHEDULES / f"exits-{steps}" / "exits.json"
    if not file.is_file():
        return
    found, heads = json.loads(file.read_text()), Artifact.load(file.with_name(HEADS))
    (denoiser,) = denoisers(pipe)
    rng = random.Random(0)

    def method(rest: str, rows: list[str], name: str) -> EarlyExit:
        made = to_artifact(
            Schedule(tuple(found["columns"]), tuple(rows)),
            denoiser,
            method=EarlyExit.name(),
            grid=heads.grid,
            settings={"rest": rest, "exits": heads.settings["exits"]},
        )
        made.tensors |= {k: v for k, v in heads.tensors.items() if rest == "heads" and "heads" in k}
        return EarlyExit(made.save(folder / f"exit-{rest}-{name}.safetensors"))

    for schedule in found["schedules"]:
        rest, quality, rows = (schedule[k] for k in ("rest", "quality", "rows"))
        yield f"early exit, {rest}: {quality} dB asked", method(rest, rows, str(quality))
        if quality == 30:
            later = rows[2:]  # lines begin with two full steps
            rng.shuffle(later)
            name = f"control: random steps, as many as early exit, {rest}: {quality} dB"
            yield name, method(rest, [*rows[:2], *later], "random")


def learned(pipe: Any, steps: int, folder: Path) -> Iterator[tuple[str, Method]]:
    """The router's schedules, from careful to bold; none where none was trained."""
    file = SCHEDULES / f"router-{steps}" / "router.json"
    if not file.is_file():
        return
    (denoiser,) = denoisers(pipe)
    pipe.scheduler.set_timesteps(steps)
    grid = sampling_grid(pipe.scheduler)[1]
    for found in json.loads(file.read_text())["schedules"]:
        schedule = Schedule(tuple(found["columns"]), tuple(found["rows"]))
        made: Artifact = to_artifact(schedule, denoiser, method=RouterCache.name(), grid=grid)
        name = f"router-{found['beta']:g}"
        reused = 1 - schedule.share()
        yield (
            f"router: {reused:.0%} reused",
            RouterCache(made.save(folder / f"{name}.safetensors")),
        )


def magnitudes(threshold: float, ratios: Callable[[], ArtifactRef]) -> Calibrated:
    """MagCache with ratios that are calibrated once for all thresholds."""
    settings = {"threshold": threshold, "samples": BATCH}
    return Calibrated(lambda: MagCache(threshold, artifact=ratios()), settings)


def _magnitudes(pipe: Any, steps: int, folder: Path) -> ArtifactRef:
    calibration = [{**x, "output_type": "np"} for x in inputs(BATCH, steps)]
    return MagCache.calibrate(pipe, calibration).save(folder / "mag.safetensors")


def planned(made: Made) -> Planned:
    """A row's recipe, or what is calibrated for it."""
    if isinstance(made, Calibrated):
        return made
    return Recipe((made if isinstance(made, Method) else made(),))


def main() -> None:
    parser = command_line(__doc__, samples=SAMPLES)
    parser.add_argument("--model", default=MODEL, choices=(MODEL, SD))
    parser.add_argument("--steps", type=int, default=50, choices=(20, 50))
    parser.add_argument(
        "--curves", nargs="*", default=[], help="beginnings of rows to measure; the others stay"
    )
    add_fresh(parser)
    given = parser.parse_args()
    load = load_average()
    bench = study(given.samples, given.device, given.referee, given.model, given.steps)
    rows = transformer_rows if given.model == MODEL else unet_rows
    name = "caches_sd" if given.model == SD else "caches" if given.steps == 50 else "caches_20"
    old = None if given.fresh and not given.curves else read(name, given.device)
    there = dict(kept_rows(old, bench.protocol(), here(given.device, load)))
    with tempfile.TemporaryDirectory() as folder:
        made = rows(bench.pipe, given.steps, Path(folder))
        plans = {label: planned(method) for label, method in made}
        for label in due(plans, there, given.fresh, folder):
            if given.curves and not label.startswith(tuple(given.curves)):
                continue
            there[label] = measured(bench, plans[label], given.rounds, folder)
            print(label, *(there[label][k] for k in ("speedup", "psnr", "judged")), flush=True)
            there = {label: there[label] for label in plans if label in there}
            content = head(bench, given.samples, here(given.device, load))
            write(name, given.device, {**content, "rows": there})


if __name__ == "__main__":
    main()
