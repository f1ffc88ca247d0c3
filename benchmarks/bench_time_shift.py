"""Time-shift and its baselines on ``zoo:digits-ddpm``: Frechet distance at few steps.

    python -m benchmarks.bench_time_shift [--samples 2000] [--sets 3] [--only DDIM] [--steps 10]
                                          [--fresh]

What is adopted (window, cutoff and variant; the constant offset; the scale of epsilon scaling) is
chosen on other seeds with the other judge, ``digits-judge``, then measured with the referee: each
set has its own seeds, and is compared with as many real pictures. Beside it stands the exposure
bias itself, that of which time-shift is the cure: how samples on their way differ from noised real
pictures of the same time. Rows are written as they are measured, and a run that was cut off goes
on; all of them take two hours of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DModel,
)

from accel import zoo
from accel.loading import zoo_path
from accel.measure import environment, load_average, paired_time
from accel.method import Method, attached
from accel.metrics.distribution import frechet
from accel.metrics.protocol import Protocol
from accel.zoo.judge import AttributeJudge, judge, to_tensor
from accel.zoo.world import DigitWorld
from benchmarks.digits_study import weights_sha256
from benchmarks.kept import kept_rows
from benchmarks.results_file import add_fresh, read, write
from samplers.epsilon_scaling import EpsilonScaling
from samplers.shifted_time import TimeShiftPNDMScheduler
from samplers.time_shift import TimeShift

MODEL = "zoo:digits-ddpm"
CHOOSER, REFEREE = "digits-judge", "digits-judge-b"
BATCH = 50
CHOOSING = 400  # samples for every candidate
CHOOSING_SEED, SEED = 7_000_000, 1_000_000
STEPS = 10
OTHER_STEPS = (5, 20, 50)
SCALES = (1.0025, 1.005, 1.01, 1.02, 1.04)
WINDOWS, CUTOFFS = (0.1, 0.2, 0.4, 0.8), (200, 400, 600)
SAMPLERS = ("DDIM", "F-PNDM", "S-PNDM", "DDPM")
CHOSEN_FOR = ("DDIM", "F-PNDM")
SEVERAL = ("base", "time-shift", "constant", "epsilon scaling")  # with several sets, at STEPS

Key = tuple[str, int, str]  # sampler, steps, setting
Row = dict[str, Any]


def pipeline(sampler: str) -> Any:
    """The shipped network under a sampler, as diffusers has it."""
    folder = zoo.path("digits-ddpm")
    unet = UNet2DModel.from_pretrained(folder / "unet")
    given = DDPMScheduler.from_pretrained(folder / "scheduler").config
    settings = {k: v for k, v in given.items() if k[0] != "_"}
    shared = {k: settings[k] for k in ("beta_schedule", "beta_start", "beta_end")}
    if sampler == "DDPM":
        pipe = DDPMPipeline(unet, DDPMScheduler.from_config(settings))
    elif sampler == "DDIM":
        clip = {"clip_sample": settings["clip_sample"], "set_alpha_to_one": False}
        pipe = DDIMPipeline(unet, DDIMScheduler(**shared, **clip))
    else:
        pipe = PNDMPipeline(unet, PNDMScheduler(**shared))
        if sampler == "S-PNDM":
            two = {"skip_prk_steps": True, "history": 2}
            pipe.scheduler = TimeShiftPNDMScheduler(**shared, **two)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(samples: int, steps: int) -> list[dict[str, Any]]:
    """Calls that draw as many samples."""
    call = {"batch_size": BATCH, "num_inference_steps": steps}
    return [call] * (samples // BATCH)


def candidates(steps: int, v0: float) -> list[Callable[[TimeShift], tuple[TimeShift, ...]]]:
    """What is chosen in turn, each with what was chosen before: variant, window, cutoff.

    Windows are shares of the stride between steps; cutoffs the paper's and higher ones.
    """
    stride = 1000 // steps
    windows = sorted({max(2, round(share * stride)) for share in WINDOWS})

    def variants(best: TimeShift) -> tuple[TimeShift, ...]:
        kinds = (("paper", "signal"), ("paper", "noise"), ("pnm", "noise"))
        return tuple(
            TimeShift(best.window, best.cutoff, variant, model, v0 if model == "signal" else None)
            for variant, model in kinds
        )

    return [
        variants,
        lambda best: tuple(dataclasses.replace(best, window=w) for w in windows),
        lambda best: tuple(dataclasses.replace(best, cutoff=c) for c in CUTOFFS),
    ]


def constants(steps: int) -> tuple[TimeShift, ...]:
    """The control: always half a window, whatever the sample's variance."""
    stride = 1000 // steps
    return tuple(
        TimeShift(max(2, round(share * stride)), cutoff, "constant")
        for share in WINDOWS
        for cutoff in CUTOFFS[:2]
    )


class Draws:
    """Samples of one sampler, and their distance to real pictures."""

    def __init__(self, sampler: str):
        self.sampler, self.pipe = sampler, pipeline(sampler)
        self.known: dict[tuple, list[float]] = {}  # distances of what was drawn already

    def pictures(self, method: Method | None, samples: int, steps: int, seed: int) -> np.ndarray:
        """(n, 32, 32, 3) uint8; seeds of batches follow from `seed`."""
        made = []
        with attached(method or (), self.pipe):
            for number, call in enumerate(inputs(samples, steps)):
                generator = torch.Generator().manual_seed(seed + number)
                output = self.pipe(**call, generator=generator, output_type="np")[0]
                made.append(as_bytes(output))
        return np.concatenate(made)

    def row(self, name: str, method: Method | None, steps: int, samples: int, sets: int) -> Row:
        """One row of the results."""
        seeds = [SEED + 10_000 * number for number in range(sets)]
        key = (method, steps, samples, sets)
        if key not in self.known:
            self.known[key] = self.distances(method, steps, samples, seeds)
        distances = self.known[key]
        print(self.sampler, steps, name, method, [round(d, 2) for d in distances], flush=True)
        return {
            "sampler": self.sampler,
            "steps": steps,
            "setting": name,
            "methods": [] if method is None else [method.to_json()],
            "calls": self.calls(steps),
            "samples": samples,
            "seeds": seeds,
            "frechet": distances,
        }

    def distances(
        self, method: Method | None, steps: int, samples: int, seeds: list[int]
    ) -> list[float]:
        """Frechet distance to as many real pictures, for every set."""
        reader, found = judge(REFEREE), []
        for number, seed in enumerate(seeds):
            real = real_features(reader, samples, number)
            made = self.pictures(method, samples, steps, seed)
            found.append(frechet(real, reader.features_of(made)))
        return found

    def calls(self, steps: int) -> int:
        """Network evaluations of one sample."""
        self.pipe.scheduler.set_timesteps(steps)
        return len(self.pipe.scheduler.timesteps)

    def choose_shift(self, steps: int, v0: float) -> Method | None:
        """Variant, window and cutoff, one after the other; None where nothing beats none."""
        stride = 1000 // steps
        best = TimeShift(max(2, round(0.4 * stride)), 400)
        found: Method | None = None
        for offered in candidates(steps, v0):
            chosen = self.choose(steps, offered(best))
            if isinstance(chosen, TimeShift):
                best = found = chosen
        return found

    def choose(self, steps: int, offered: tuple[Any, ...]) -> Method | None:
        """The best of those offered on the choosing seeds, if any beats none in both halves."""
        reader = judge(CHOOSER)
        real = real_features(reader, CHOOSING // 2, 0, "train")

        def score(outputs: np.ndarray) -> float:
            return frechet(real, reader.features_of(as_bytes(outputs)))

        calls = inputs(CHOOSING, steps)
        seeds = [CHOOSING_SEED + number for number in range(len(calls))]
        if isinstance(offered[0], TimeShift):
            artifact = TimeShift.calibrate(self.pipe, calls, seeds, score, offered)
            best = TimeShift.calibrated(artifact, self.pipe)
            return best if best.window else None
        halves = []
        for method in (None, *offered):
            made = self.pictures(method, CHOOSING, steps, CHOOSING_SEED)
            both = made[: len(made) // 2], made[len(made) // 2 :]
            halves.append([frechet(real, reader.features_of(half)) for half in both])
        table = np.array(halves)
        fair = [i for i in range(1, len(table)) if (table[i] < table[0]).all()]
        return offered[min(fair, key=lambda i: table[i].sum()) - 1] if fair else None


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in 0..1 -> uint8."""
    return np.round(images * 255).astype(np.uint8)


def real_features(
    reader: AttributeJudge, count: int, seed: int, split: str = "heldout"
) -> np.ndarray:
    """Of as many real pictures of the model's world."""
    return reader.features_of(DigitWorld(split, seed, plain=True).batch(np.arange(count))[0])


def clean_variance(count: int = 256) -> float:
    """Mean variance of one clean picture over all its numbers."""
    pictures = to_tensor(DigitWorld("train", 1, plain=True).batch(np.arange(count))[0])
    return float(pictures.flatten(1).var(dim=1).mean())


@contextmanager
def heard(pipe: Any) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """(time, input, predicted noise) of every call of the network."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def listen(module: Any, args: tuple, output: Any) -> None:
        seen.append((int(args[1]), args[0], output[0]))

    hook = pipe.unet.register_forward_hook(listen)
    try:
        yield seen
    finally:
        hook.remove()


@torch.inference_mode()
def exposure(sampler: str, steps: int, samples: int = 200) -> list[Row]:
    """Samples on their way against noised real pictures, call by call.

    rms: of the predicted noise; error: of the noise predicted for the real ones; variance: of one
    sample over all its numbers. Each [real, sampled].
    """
    pipe = pipeline(sampler)
    with heard(pipe) as seen:
        pipe(batch_size=samples, num_inference_steps=steps,
             generator=torch.Generator().manual_seed(SEED), output_type="np")  # fmt: skip
    pictures = to_tensor(DigitWorld("train", 2, plain=True).batch(np.arange(samples))[0])
    generator, rows = torch.Generator().manual_seed(SEED), []
    for time, sampled, predicted in seen:
        level = pipe.scheduler.alphas_cumprod[time]
        noise = torch.randn(pictures.shape, generator=generator)
        noised = level.sqrt() * pictures + (1 - level).sqrt() * noise
        found = pipe.unet(noised, time).sample
        rows.append(
            {
                "time": time,
                "error": float((found - noise).square().mean().sqrt()),
                "rms": [
                    float(found.square().mean().sqrt()),
                    float(predicted.square().mean().sqrt()),
                ],
                "variance": [float(x.flatten(1).var(dim=1).mean()) for x in (noised, sampled)],
            }
        )
    return rows


def overhead(method: Method, rounds: int) -> dict[str, float]:
    """Seconds with time-shift over seconds without, of ten steps at batch 16."""
    pipe = pipeline("DDIM")

    def draw(under: tuple[Method, ...]) -> None:
        with attached(under, pipe):
            pipe(batch_size=16, num_inference_steps=STEPS, output_type="np")

    ratio = paired_time(lambda: draw((method,)), lambda: draw(()), rounds=rounds).speedup
    return ratio.as_json()


def protocol(samples: int, sets: int) -> dict[str, Any]:
    """How every row was made and read."""
    return Protocol(
        model={"name": MODEL, "weights_sha256": weights_sha256(zoo_path(MODEL))},
        inputs="unconditional",
        samples=samples,
        seeds=f"{SEED} + 10000 set + batch of {BATCH}, {sets} sets",
        features=REFEREE,
        size=(32, 32),
        quantise="rounded to 8 bits",
        more={"chosen_by": CHOOSER, "chosen_with": CHOOSING, "real": "heldout, another each set"},
    ).as_json()


def settings(draws: Draws, steps: int, v0: float) -> dict[str, Callable[[], Method | None]]:
    """What is measured, and how its method is found."""
    made: dict[str, Callable[[], Method | None]] = {
        "base": lambda: None,
        "time-shift": lambda: draws.choose_shift(steps, v0),
    }
    if draws.sampler in CHOSEN_FOR and steps == STEPS:
        scales = tuple(EpsilonScaling(scale) for scale in SCALES)
        made["constant"] = lambda: draws.choose(steps, constants(steps))
        made["epsilon scaling"] = lambda: draws.choose(steps, scales)
    if (draws.sampler, steps) == ("DDIM", STEPS):
        for variant in ("paper", "pnm", "adm", "constant"):
            made[f"{variant} 40, 200"] = partial(TimeShift, 40, 200, variant)  # type: ignore[arg-type]
    return made


def measure(
    samples: int, sets: int, only: str, at: list[int], done: frozenset[Key] = frozenset()
) -> Iterator[Row]:
    """Rows that are not done; `only`: of samplers whose name holds this; `at`: numbers of steps."""
    v0 = clean_variance()
    for sampler in (name for name in SAMPLERS if only in name):
        draws = Draws(sampler)
        steps_list = (STEPS, *OTHER_STEPS) if sampler in CHOSEN_FOR else (STEPS, 20)
        for steps in (s for s in steps_list if not at or s in at):
            main = sampler in CHOSEN_FOR and steps == STEPS
            for setting, choose in settings(draws, steps, v0).items():
                if (sampler, steps, setting) not in done:
                    size = (samples, sets) if main and setting in SEVERAL else (samples // 2, 1)
                    yield draws.row(setting, choose(), steps, *size)


def key_of(row: Row) -> Key:
    """What tells a row from the others."""
    return row["sampler"], row["steps"], row["setting"]


def joined(kept: list[Row], rows: list[Row]) -> list[Row]:
    """New rows, and those that they do not replace, in order."""
    made = {key_of(row) for row in rows}
    order = {name: i for i, name in enumerate((*SAMPLERS, *SEVERAL))}
    kept = [row for row in kept if key_of(row) not in made]

    def place(row: Row) -> tuple[int, ...]:
        return order[row["sampler"]], row["steps"], order.get(row["setting"], len(order))

    return sorted([*kept, *rows], key=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="samplers whose name holds this")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="only these")
    add_fresh(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load, own = load_average(), protocol(given.samples, given.sets)
    part = bool(given.only or given.steps)
    old = None if given.fresh and not part else read("time_shift")
    kept, rows = list(kept_rows(old, Protocol.read(own), environment("cpu"))), []
    if old:  # rows without an environment of their own have the file's, which is renewed below
        kept = [{**row, "environment": row.get("environment", old["environment"])} for row in kept]
    content = {
        "protocol": own,
        "model": MODEL,
        "clean_variance": clean_variance(),
        "rows": kept,
        "exposure": old["exposure"] if old else {s: exposure(s, STEPS) for s in CHOSEN_FOR},
        "overhead": old["overhead"] if old else overhead(TimeShift(40, 200), given.rounds),
    }
    done = frozenset() if given.fresh else frozenset(map(key_of, kept))
    for row in measure(given.samples, given.sets, given.only, given.steps, done):
        block = environment("cpu", load)
        rows.append({**row, "environment": block})
        write("time_shift", "cpu", {"environment": block, **content, "rows": joined(kept, rows)})


if __name__ == "__main__":
    main()
