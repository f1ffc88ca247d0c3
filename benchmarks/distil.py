"""Distils the embedded models: `python -m benchmarks.distil digits-dit-4-steps --out OUT`.

Trains below OUT, goes on where a killed run stopped, and at the end writes the student and its
recipe to `recipes/`, or OUT where it is none to ship. `benchmarks.bench_tdm` measures it. A GPU
wants a larger batch and is limited by time: `--device cuda --batch 32 --minutes 10`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import accel
from accel.method import Recipe
from accel.settings import Settings
from accel.zoo.wan import SHORT
from accel.zoo.world import NULL_CLASS, VIDEO_CANVAS, DigitWorld
from benchmarks.results_file import DEVICES
from samplers.distilled import Distilled
from samplers.tdm import NO_RECIPE, TDM, even_anchors
from sparse_attn.subblock_lse import SubblockLSE

LONG = 512  # text tokens, the pipeline's own
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
OUT = Path("out")
NEVER = 1_000_000  # updates


def classes(batches: int, batch: int) -> list[dict[str, Any]]:
    """Calls of digits-dit for random classes."""
    labels = np.random.default_rng(0).integers(0, 100, (batches, batch))
    return [{"class_labels": row.tolist(), "num_inference_steps": 2} for row in labels]


def captions(batches: int, batch: int) -> list[dict[str, Any]]:
    """Calls of digits-sd with the captions it was trained on."""
    world = DigitWorld("train", 0)
    calls = []
    for number in range(batches):
        what = world.attributes(np.arange(number * batch, (number + 1) * batch))
        calls.append({"prompt": what.captions(), "num_inference_steps": 2})
    return calls


def video_captions(batches: int, batch: int) -> list[dict[str, Any]]:
    """Calls of digits-wan with the captions it was trained on.

    As in its training, the text is padded to what the pipeline pads it to in every fourth alone:
    the other three cost a fifth less.
    """
    world = DigitWorld("train", 0, canvas=VIDEO_CANVAS)
    call = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2}
    calls = []
    for number in range(batches):
        what = world.video_attributes(np.arange(number * batch, (number + 1) * batch))
        length = LONG if number % 4 == 0 else SHORT
        calls.append({"prompt": what.captions(), **call, "max_sequence_length": length})
    return calls


@dataclass(frozen=True)
class Student:
    """What is distilled, on which calls and how, and what the student runs under for good."""

    model: str
    inputs: Callable[[int, int], list[dict[str, Any]]]
    trainer: TDM
    batch: int = 64
    batches: int = 64
    recipe: Recipe = NO_RECIPE
    shipped: bool = True  # others fall too far behind their teacher; their recipe stays in OUT


NO_CLASS, NO_TEXT = Settings(class_labels=NULL_CLASS), Settings(prompt="")
# Flow matching's noise levels as the model's scheduler shifts them: 1, 0.9, 0.75, 0.5.
WAN = TDM(
    (1000.0, 900.0, 750.0, 500.0), 4.0, NO_TEXT, rank=16, updates=200, fake_updates=3, warmup=60,
    lr=5e-4, fake_lr=2e-3, precision="bf16",
)  # fmt: skip
# Twenty by forty blocks of 1,280 tokens; every step and layer is sparse.
SPARSE = SubblockLSE(blocks=(64, 32), density=0.2, dense=(0.0, 0.0), guard=False)
STUDENTS = {
    "digits-dit-4-steps": Student(
        "zoo:digits-dit",
        classes,
        TDM(even_anchors(4, 900), 4.0, NO_CLASS, rank=32, updates=400, lr=5e-4, fake_lr=2e-3),
    ),
    "digits-dit-1-step": Student(
        "zoo:digits-dit",
        classes,
        # At the last times a clean sample is a difference of two noises, 100 times enlarged; one
        # step has no later one to put that right, so it is taken at an earlier time.
        TDM((649,), 4.0, NO_CLASS, updates=500, lr=3e-4, fake_lr=1e-3),
    ),
    "digits-sd-4-steps": Student(
        "zoo:digits-sd",
        captions,
        TDM(even_anchors(4, 900), 4.0, NO_TEXT, rank=16, updates=200, lr=5e-4, fake_lr=2e-3),
        batch=24,
    ),
    "digits-wan-4-steps": Student("zoo:digits-wan", video_captions, WAN, batch=4, shipped=False),
    "digits-wan-4-steps-sparse": Student(
        "zoo:digits-wan", video_captions, WAN, batch=4, recipe=Recipe((SPARSE,)), shipped=False
    ),
}


def students_of(model: str) -> list[str]:
    """Names of the students of a model."""
    return [name for name, student in STUDENTS.items() if student.model == model]


def recipe_file(name: str, out: Path | None = None) -> Path:
    """Where a student's recipe is; `out`: where it was trained."""
    if STUDENTS[name].shipped:
        return RECIPES / f"{name}.yaml"
    return (out or OUT / name) / f"{name}.yaml"


def limited(trainer: TDM, updates: int | None, minutes: float | None) -> TDM:
    """The trainer with other ends; minutes alone are the only end."""
    if updates is None:
        updates = trainer.updates if minutes is None else NEVER
    return dataclasses.replace(trainer, updates=updates, minutes=minutes)


def distil(name: str, out: Path, student: Student, device: str = "cpu") -> Recipe:
    """Train one student and write its recipe."""
    pipe = accel.load(student.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    inputs = student.inputs(student.batches, student.batch)
    trainer = student.trainer
    if trainer.compile:  # for one length of the text
        inputs = [{k: v for k, v in call.items() if k != "max_sequence_length"} for call in inputs]
    artifact = trainer.fit(pipe, inputs, str(out), student.recipe)
    distilled = Distilled(artifact.save(out / f"{name}.safetensors"))
    recipe = Recipe((distilled, *student.recipe.methods))
    steps = len(trainer.anchors)
    accel.write_recipe(
        recipe_file(name, out),
        recipe,
        name=name,
        description=f"{student.model} in {steps} step{'s' if steps > 1 else ''} without guidance.",
    )
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("name", choices=sorted(STUDENTS))
    parser.add_argument("--out", type=Path, help="default: out/NAME")
    parser.add_argument("--updates", type=int, help="of the student")
    parser.add_argument("--minutes", type=float, help="of training; with no --updates its only end")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", action="store_true", help="the network's blocks")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: there is no CUDA device here; leave it out to train on a CPU"
        )
    torch.set_num_threads(1)
    if given.device == "cuda":  # in TensorFloat-32
        torch.set_float32_matmul_precision("high")
    student = STUDENTS[given.name]
    trainer = limited(student.trainer, given.updates, given.minutes)
    trainer = dataclasses.replace(trainer, compile=given.compile)
    student = dataclasses.replace(student, trainer=trainer, batch=given.batch or student.batch)
    distil(given.name, given.out or OUT / given.name, student, given.device)


if __name__ == "__main__":
    main()
