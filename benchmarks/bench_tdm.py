"""Distilled students against their teacher, 50 steps with guidance.

    python -m benchmarks.bench_tdm [--samples 1000] [--rounds 7] [--draw] [--model zoo:digits-sd]
    python -m benchmarks.bench_tdm --model zoo:digits-wan --samples 32 --rounds 3 [--fresh]

Judged accuracy, Frechet distance and speed, as everywhere. The controls are the teacher itself in
as few steps, guided and with the best solver at hand: what a student has to beat. That of the
student with sparse attention is the dense student under it: what it costs without training for it.
A student that is not shipped is measured where it was trained, if it was. Rows are written as they
are measured; a run that was cut off goes on (after a change of code: ``--fresh``). ``--draw`` only
draws ``benchmarks/pictures/students.png``: teacher, students, teacher in as few steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image

import accel
from accel.measure import Study, environment, load_average
from accel.method import Recipe
from benchmarks.digits_study import (
    BATCH,
    DDIM,
    DPM,
    MODEL,
    SD,
    UNIPC,
    WAN,
    head,
    row,
    study,
)
from benchmarks.distil import SPARSE, STUDENTS, recipe_file, students_of
from benchmarks.kept import kept_rows, stays
from benchmarks.results_file import DEVICES, RESULTS, add_fresh, read, write
from samplers.swap import SwapScheduler

SAMPLES = 1000  # ten of each class
IN_PICTURE = 20
PICTURE = RESULTS.parent / "pictures" / "students.png"
AFTERWARDS = "control: digits-wan-4-steps, sparse"
RESULT = {MODEL: "tdm", SD: "tdm_sd", WAN: "tdm_wan"}


def rows(model: str = MODEL) -> dict[str, Recipe]:
    """What is measured."""
    files = {name: recipe_file(name) for name in students_of(model)}
    made = {
        name: accel.read_recipe(file).recipe
        for name, file in files.items()
        if STUDENTS[name].shipped or file.is_file()
    }
    if model == WAN:
        return made | video_controls(made.get("digits-wan-4-steps"))
    for steps in (4, 1):
        made[f"control: teacher, DDIM {steps}"] = Recipe((SwapScheduler(*DDIM, steps=steps),))
    made["control: teacher, DPM-Solver++ 4"] = Recipe((SwapScheduler(*DPM, steps=4),))
    made["control: teacher, DPM-Solver++ 20"] = Recipe((SwapScheduler(*DPM, steps=20),))
    return made


def video_controls(dense: Recipe | None) -> dict[str, Recipe]:
    """The dense student of digits-wan under sparse attention, and the teacher in few steps."""
    few, more = (SwapScheduler(*UNIPC, steps=steps) for steps in (4, 20))
    made = {} if dense is None else {AFTERWARDS: Recipe((*dense.methods, SPARSE))}
    return made | {
        "control: teacher, UniPC 4": Recipe((few,)),
        "control: teacher, UniPC 4, sparse": Recipe((few, SPARSE)),
        "control: teacher, UniPC 20": Recipe((more,)),
    }


def draw(study: Study) -> None:
    """The first batch: the teacher, then every student and the teacher in as many steps."""
    made = rows()
    four, one = students_of(MODEL)
    names = (four, "control: teacher, DDIM 4", one, "control: teacher, DDIM 1")
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
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of rows to measure")
    add_fresh(parser)
    parser.add_argument("--draw", action="store_true", help="only the picture")
    given = parser.parse_args()
    if given.draw:
        draw(study(IN_PICTURE, given.device))
        return
    load = load_average()
    bench = study(given.samples, given.device, model=given.model)
    block = environment(given.device, load)
    name = RESULT[given.model]
    old = None if given.fresh and not given.only else read(name, given.device)
    measured: dict[str, Any] = dict(kept_rows(old, bench.protocol(), block))
    made = rows(given.model)
    # rows of students that were trained elsewhere stay
    labels = dict.fromkeys((*students_of(given.model), AFTERWARDS, *made))
    # of artifacts, also of students that are not shipped
    folders = sorted({str(recipe_file(name).resolve().parent) for name in students_of(given.model)})
    for label, recipe in made.items():
        wanted = not given.only or label.startswith(tuple(given.only))
        if not wanted or (stays(measured.get(label), recipe, *folders) and not given.fresh):
            continue
        result = bench.compare(recipe, rounds=given.rounds)
        measured[label] = row(recipe, result, *folders)
        print(label, *(measured[label][k] for k in ("speedup", "judged")), flush=True)
        measured = {label: measured[label] for label in labels if label in measured}
        shown = head(bench, given.samples, block, 1 if given.model == WAN else BATCH)
        write(name, given.device, {**shown, "rows": measured})


if __name__ == "__main__":
    main()
