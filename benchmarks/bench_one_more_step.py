"""One More Step on ``zoo:digits-sd``: how bright are the pictures, with it and without?

    python -m benchmarks.bench_one_more_step [--samples 300]

Calibrated on real pictures of the training scans, half of them with captions that name no
background. Measured on held-out ones: prompts that name the background (does it come out right?)
and prompts that do not (are the backgrounds as bright as real ones?). A picture goes to
``benchmarks/pictures/one_more_step.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import wasserstein_distance

import accel
from accel.loading import zoo_path
from accel.measure import environment, load_average, paired_time
from accel.method import Method, Recipe, attached
from accel.metrics.distribution import frechet
from accel.metrics.protocol import Protocol
from accel.zoo import sd
from accel.zoo.judge import AttributeJudge, judge, to_tensor
from accel.zoo.world import Attributes, DigitWorld
from benchmarks.digits_study import weights_sha256, without_folder
from benchmarks.distil import RECIPES
from benchmarks.results_file import RESULTS, write
from samplers.one_more_step import OneMoreStep

MODEL, REFEREE = "zoo:digits-sd", "digits-judge-b"
NAME = "digits-sd-one-more-step"
GUIDANCE = 4.0
STEPS = (10, 20)
MANY_STEPS, SHIPPED = 50, "mean, spread"  # of which only this is measured there
CALIBRATED_ON = 1024
BATCH = 64
SEED = 0
PICTURE = RESULTS.parent / "pictures" / "one_more_step.png"
IN_PICTURE = 20


def artifact(pipe: Any, kind: Any) -> Any:
    """Fitted on real pictures; every second caption names no background."""
    world, inputs, pictures = DigitWorld("train", 7), [], []
    for start in range(0, CALIBRATED_ON, BATCH):
        images, what = world.batch(np.arange(start, start + BATCH))
        named, bare = what.captions(), unnamed(what)
        prompts = [bare[i] if i % 2 else named[i] for i in range(BATCH)]
        inputs.append({"prompt": prompts, "num_inference_steps": 2})
        pictures.append(to_tensor(images))
    return OneMoreStep.calibrate(pipe, inputs, pictures, kind=kind)


def unnamed(what: Attributes) -> list[str]:
    """Captions without a background."""
    return [sd.phrase(d, c) for d, c in zip(what.digit, what.colour, strict=True)]


def settings(pipe: Any, folder: Any) -> dict[str, Method | None]:
    """What is measured. The recipe that is shipped is among it."""
    refs = {k: artifact(pipe, k).save(folder / f"{k}.safetensors") for k in ("mean", "network")}
    return {
        "base": None,
        "mean": OneMoreStep(refs["mean"]),
        "network": OneMoreStep(refs["network"]),
        "network, as the authors' code": OneMoreStep(refs["network"], official=True),
        "mean, spread": OneMoreStep(refs["mean"], spread=1.0),
        "network, spread": OneMoreStep(refs["network"], spread=1.0),
    }


class Sets:
    """Real pictures, and samples for their captions with and without the background."""

    def __init__(self, pipe: Any, samples: int):
        self.pipe, self.reader = pipe, judge(REFEREE)
        self.real, self.what = DigitWorld("heldout", SEED).batch(np.arange(samples))
        self.features = self.reader.features_of(self.real)
        self.noise = torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))

    def draw(self, method: Method | None, prompts: list[str], steps: int) -> np.ndarray:
        options = {"guidance_scale": GUIDANCE, "num_inference_steps": steps}
        with attached(method or (), self.pipe):
            return sd.draw(self.pipe, prompts, self.noise, **options)

    def row(self, name: str, method: Method | None, steps: int) -> dict[str, Any]:
        """One row of the results."""
        named = self.draw(method, self.what.captions(), steps)
        bare = self.draw(method, unnamed(self.what), steps)
        right = right_shares(self.reader, named, self.what)
        levels, real = sd.background_level(bare), sd.background_level(self.real)
        row = {
            "setting": name,
            "steps": steps,
            "methods": [] if method is None else [without_folder(method)],
            "named_right": right,
            "brightness": spread_of(levels),
            "image_mean_distance": float(
                wasserstein_distance(bare.mean((1, 2, 3)), self.real.mean((1, 2, 3)))
            ),
            "background_distance": float(wasserstein_distance(levels, real)),
            "frechet": frechet(self.features, self.reader.features_of(bare)),
        }
        print(row, flush=True)
        return row


def right_shares(reader: AttributeJudge, images: np.ndarray, what: Attributes) -> dict[str, float]:
    """Share judged right in each attribute."""
    found = reader.answers(images)
    return {k: float((found[k] == getattr(what, k)).mean()) for k in sorted(found)}


def spread_of(levels: np.ndarray) -> dict[str, float]:
    """Of background levels in 0..1: mean, deviation, share nearest to black or white."""
    ends = (levels < 0.13) | (levels > 0.87)  # half way to the next level
    found = {"mean": levels.mean(), "deviation": levels.std(), "black_or_white": ends.mean()}
    return {name: float(value) for name, value in found.items()}


def protocol(samples: int) -> dict[str, Any]:
    """How every row was made and read."""
    return Protocol(
        model={"name": MODEL, "weights_sha256": weights_sha256(zoo_path(MODEL))},
        inputs="captions of held-out pictures, with and without their background",
        samples=samples,
        seeds=str(SEED),
        guidance=GUIDANCE,
        features=REFEREE,
        size=(32, 32),
        quantise="rounded to 8 bits",
        more={"calibrated_on": CALIBRATED_ON},
    ).as_json()


def overhead(pipe: Any, method: Method, rounds: int) -> dict[str, float]:
    """Seconds with it over seconds without, ten steps at batch 16."""
    prompts, noise = ["a red three"] * 16, torch.randn(16, 4, 8, 8)

    def run(under: tuple[Method, ...]) -> None:
        with attached(under, pipe):
            sd.draw(pipe, prompts, noise, guidance_scale=GUIDANCE, num_inference_steps=10)

    return paired_time(lambda: run((method,)), lambda: run(()), rounds=rounds).speedup.as_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = load_average()
    pipe = accel.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    sets = Sets(pipe, given.samples)
    made = settings(pipe, RECIPES.parent / "out" / "one_more_step")
    rows = [sets.row(name, method, steps) for steps in STEPS for name, method in made.items()]
    rows += [sets.row(name, made[name], MANY_STEPS) for name in ("base", SHIPPED)]
    shipped = made[SHIPPED]
    assert shipped is not None
    ship(Recipe((shipped,)), RECIPES / f"{NAME}.yaml")
    draw_picture(sets, made)
    real = {
        "brightness": spread_of(sd.background_level(sets.real)),
        "named_right": right_shares(sets.reader, sets.real, sets.what),
    }
    content = {
        "environment": environment("cpu", load),
        "protocol": protocol(given.samples),
        "model": MODEL,
        "samples": given.samples,
        "rows": rows,
        "real": real,
        "overhead": overhead(pipe, shipped, given.rounds),
    }
    write("one_more_step", "cpu", content)


def ship(recipe: Recipe, path: Path) -> None:
    """Write the recipe; what was measured of the very same stays in it."""
    old = accel.read_recipe(path) if path.is_file() else None
    accel.write_recipe(
        path,
        recipe,
        name=NAME,
        description="Backgrounds that no prompt names come out as bright as real ones.",
        measured=old.measured if old is not None and old.sha256 == recipe.digest() else None,
    )


def draw_picture(sets: Sets, made: dict[str, Method | None]) -> None:
    """The same noise without it, with the mean and with the spread; at last real pictures."""
    prompts = unnamed(sets.what)
    rows = [
        sets.draw(made[name], prompts, STEPS[0])[:IN_PICTURE]
        for name in ("base", "network", SHIPPED)
    ]
    strips = [np.concatenate(list(images), axis=1) for images in (*rows, sets.real[:IN_PICTURE])]
    sheet = np.concatenate(strips, axis=0)
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(PICTURE)


if __name__ == "__main__":
    main()
