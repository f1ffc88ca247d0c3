"""Distilled students against their teacher, 50 steps with guidance.

    python -m benchmarks.bench_tdm [--samples 1000] [--rounds 7] [--draw] [--model zoo:digits-sd]

Judged accuracy, Frechet distance and speed, as everywhere. The controls are the teacher itself in
as few steps, guided and with the best solver at hand: what a student has to beat. ``--draw`` only
draws ``benchmarks/pictures/students.png``: teacher, students, teacher in as few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import accel
from accel.measure import Study, environment, load_average
from accel.method import Recipe
from benchmarks.digits_study import DDIM, DPM, MODEL, SD, head, row, study
from benchmarks.distil import RECIPES
from benchmarks.results_file import DEVICES, RESULTS, write
from samplers.swap import SwapScheduler

SAMPLES = 1000  # ten of each class
IN_PICTURE = 20
PICTURE = RESULTS.parent / "pictures" / "students.png"
STUDENTS = ("digits-dit-4-steps", "digits-dit-1-step")
SD_STUDENTS = ("digits-sd-4-steps",)
RESULT = {MODEL: "tdm", SD: "tdm_sd"}  # by model


def rows(names: tuple[str, ...] = STUDENTS) -> dict[str, Recipe]:
    """What is measured."""
    made = {name: accel.read_recipe(RECIPES / f"{name}.yaml").recipe for name in names}
    for steps in (4, 1):
        made[f"control: teacher, DDIM {steps}"] = Recipe((SwapScheduler(*DDIM, steps=steps),))
    made["control: teacher, DPM-Solver++ 4"] = Recipe((SwapScheduler(*DPM, steps=4),))
    made["control: teacher, DPM-Solver++ 20"] = Recipe((SwapScheduler(*DPM, steps=20),))
    return made


def draw(study: Study) -> None:
    """The first batch: the teacher, then every student and the teacher in as many steps."""
    made = rows()
    names = (STUDENTS[0], "control: teacher, DDIM 4", STUDENTS[1], "control: teacher, DDIM 1")
    strips = [study.run().samples, *(study.run(made[name]).samples for name in names)]
    sheet = torch.cat([torch.cat(list(s[:IN_PICTURE]), dim=2) for s in strips], dim=1)
    pixels = (255 * sheet).round().to(torch.uint8).movedim(0, -1).numpy()
    size = (2 * pixels.shape[1], 2 * pixels.shape[0])
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(PICTURE)
    print(f"wrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--model", default=MODEL, choices=sorted(RESULT))
    parser.add_argument("--draw", action="store_true", help="only the picture")
    given = parser.parse_args()
    if given.draw:
        draw(study(IN_PICTURE, given.device))
        return
    load = load_average()
    bench = study(given.samples, given.device, model=given.model)
    measured = {}
    names = STUDENTS if given.model == MODEL else SD_STUDENTS
    for name, recipe in rows(names).items():
        result = bench.compare(recipe, rounds=given.rounds)
        measured[name] = row(recipe, result, str(Path(RECIPES)))
        print(name, *(measured[name][k] for k in ("speedup", "judged")), flush=True)
    block = environment(given.device, load)
    write(
        RESULT[given.model], given.device, {**head(bench, given.samples, block), "rows": measured}
    )


if __name__ == "__main__":
    main()
