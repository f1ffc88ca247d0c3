"""Measures an embedded pipeline and writes its model card: `python -m benchmarks.bench_zoo`.

Results go to `benchmarks/results/zoo_digits-dit.json`; the card, the sheet of samples beside real
pictures and the nearest training neighbours go into the model's own folder. `--card` only writes
the card again from the JSON. Every figure in the card comes from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from matplotlib.figure import Figure

from accel import zoo
from accel.measure import environment
from accel.zoo.judge import HEADS, Judge, accuracy
from accel.zoo.world import COLOURS, DIGITS, DigitWorld, class_label
from benchmarks import results_file

NAME = "digits-dit"
RESULT = f"zoo_{NAME}"  # in benchmarks/results/
CLASSES = len(DIGITS) * len(COLOURS)
STEPS = 50
GUIDANCES = (1.0, 1.5, 2.0, 4.0)
NEIGHBOUR_DRAWS = 1000


def load() -> diffusers.DiTPipeline:
    """The shipped pipeline, in float32."""
    pipe = diffusers.DiTPipeline.from_pretrained(zoo.path(NAME), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, class_ids, guidance: float, seed: int, batch: int = 50) -> np.ndarray:
    """(n, 32, 32, 3) uint8, one generator per sample: picture i depends on (seed, i) only."""
    images = []
    for start in range(0, len(class_ids), batch):
        ids = [int(i) for i in class_ids[start : start + batch]]
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(ids))
        ]
        out = pipe(
            class_labels=ids,
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            generator=generators,
            output_type="np",
        ).images
        images.append(np.round(out * 255).astype(np.uint8))
    return np.concatenate(images)


def judged(judge: Judge, images: np.ndarray, class_ids: np.ndarray) -> dict:
    """Share judged right: digit, colour, both; and both by digit and by colour."""
    answers = judge.answers(images)
    digit = answers["digit"] == class_ids % 10
    colour = answers["colour"] == class_ids // 10
    both = digit & colour
    return {
        "samples": len(images),
        "digit": float(digit.mean()),
        "colour": float(colour.mean()),
        "both": float(both.mean()),
        "both_by_digit": {
            name: float(both[class_ids % 10 == i].mean()) for i, name in enumerate(DIGITS)
        },
        "both_by_colour": {
            name: float(both[class_ids // 10 == i].mean()) for i, name in enumerate(COLOURS)
        },
        "backgrounds": np.bincount(answers["background"], minlength=HEADS["background"]).tolist(),
    }


def evaluation_ms(pipe, threads: int, batch: int = 16, repeats: int = 200) -> dict[str, float]:
    """Milliseconds of one call of the denoiser: the median and, for a busy machine, the best."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    config = pipe.transformer.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    t, y = torch.full((batch,), 500), torch.arange(batch)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 10):
            start = time.perf_counter()
            pipe.transformer(x, timestep=t, class_labels=y)
            times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return {"median": 1e3 * statistics.median(times[10:]), "best": 1e3 * min(times[10:])}


def timings(pipe) -> dict[str, dict[str, float]]:
    """`evaluation_ms` by number of threads."""
    return {str(n): evaluation_ms(pipe, n) for n in (1, 2)}


def strokes(images: np.ndarray) -> np.ndarray:
    """How coloured each pixel is, (n, 1024) in 0..1: the digit without its grey background."""
    values = images.astype(np.float32)
    chroma = (values.max(-1) - values.min(-1)).reshape(len(images), -1)
    return chroma / np.maximum(chroma.max(1, keepdims=True), 1)


def nearest(images: np.ndarray, class_ids: np.ndarray, count: int):
    """Nearest training pictures by strokes: (n, count, 32, 32, 3) and distances (n, count)."""
    world = DigitWorld("train", seed=1)
    found, distances = [], []
    for picture, class_id in zip(images, class_ids, strict=True):
        draws = np.full(NEIGHBOUR_DRAWS, class_id)
        pool, _ = world.batch(np.arange(NEIGHBOUR_DRAWS), class_ids=draws)
        distance = np.sqrt(((strokes(pool) - strokes(picture[None])) ** 2).mean(1))
        order = np.argsort(distance)[:count]
        found.append(pool[order])
        distances.append(distance[order])
    return np.stack(found), np.stack(distances)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """(n, h, w, 3) -> one picture, row by row, with a thin light gap."""
    n, h, w, _ = images.shape
    padded = np.full((n, h + 2, w + 2, 3), 255, np.uint8)
    padded[:, 1:-1, 1:-1] = images
    rows = n // columns
    joined = padded.reshape(rows, columns, h + 2, w + 2, 3).transpose(0, 2, 1, 3, 4)
    return joined.reshape(rows * (h + 2), columns * (w + 2), 3)


def draw_sheet(samples: np.ndarray, real: np.ndarray, path: Path) -> None:
    """All classes: samples beside real pictures of the same classes."""
    figure = Figure(figsize=(13, 6.9), layout="constrained")
    for axes, images, title in zip(
        figure.subplots(1, 2), (samples, real), (f"{NAME} samples", "real (held-out)"), strict=True
    ):
        axes.imshow(grid(images, 10), interpolation="nearest")
        axes.set_title(title)
        middle = np.arange(10) * 34 + 17
        axes.set_xticks(middle, DIGITS)
        axes.set_yticks(middle, COLOURS)
        axes.tick_params(length=0)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_neighbours(samples, neighbours, class_ids, path: Path) -> None:
    """One row per sample: the sample, then its nearest training pictures."""
    figure = Figure(figsize=(5.2, 8.4), layout="constrained")
    axes = figure.subplots()
    rows = np.concatenate([samples[:, None], neighbours], axis=1)
    axes.imshow(grid(rows.reshape(-1, 32, 32, 3), rows.shape[1]), interpolation="nearest")
    middle = np.arange(len(rows)) * 34 + 17
    axes.set_yticks(middle, [class_label(int(i)) for i in class_ids])
    columns = ["sample"] + [f"nearest {i + 1}" for i in range(neighbours.shape[1])]
    axes.set_xticks(np.arange(len(columns)) * 34 + 17, columns, fontsize=8)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_curves(stages: dict, path: Path) -> None:
    """Loss over steps of every training stage."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, stage) in zip(figure.subplots(1, len(stages)), stages.items(), strict=True):
        axes.plot(*zip(*stage["curve"], strict=True), linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def measure(samples: int) -> dict:
    """Everything the card quotes; draws the pictures into the model's folder on the way."""
    folder, pipe = zoo.path(NAME), load()
    judge = Judge.load(zoo.path("digits-judge"))
    class_ids = np.arange(samples) % CLASSES
    tables = {}
    for guidance in GUIDANCES:
        images = generate(pipe, class_ids, guidance, seed=1)
        tables[str(guidance)] = judged(judge, images, class_ids)
        print(guidance, {k: tables[str(guidance)][k] for k in ("digit", "colour", "both")})
    best = max(GUIDANCES, key=lambda g: tables[str(g)]["both"])

    every = np.arange(CLASSES)
    heldout = DigitWorld("heldout", seed=2)
    sheet = generate(pipe, every, best, seed=2)
    draw_sheet(sheet, heldout.batch(every, class_ids=every)[0], folder / "samples.png")

    chosen = np.array([11 * i for i in range(10)])  # ten digits in ten colours
    near, _ = nearest(sheet[chosen], chosen, count=4)
    draw_neighbours(sheet[chosen], near, chosen, folder / "neighbours.png")
    half = every[::2] + (every[::2] // 10) % 2  # every second class: all digits, all colours
    compared = {
        "samples": sheet[half],
        "heldout": heldout.batch(half, class_ids=half)[0],
        "train": DigitWorld("train", seed=3).batch(half, class_ids=half)[0],
    }
    distances = {
        name: float(np.median(nearest(images, half, count=1)[1]))
        for name, images in compared.items()
    }

    training = json.loads((folder / "training.json").read_text())
    draw_curves(training["stages"], folder / "loss.png")
    return {
        "model": NAME,
        "environment": environment(),
        "steps": STEPS,
        "scheduler": type(pipe.scheduler).__name__,
        "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
        "parameters": {
            part: sum(p.numel() for p in getattr(pipe, part).parameters())
            for part in ("transformer", "vae")
        },
        "transformer": {
            k: pipe.transformer.config[k]
            for k in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        },
        "tokens": (pipe.transformer.config.sample_size // pipe.transformer.config.patch_size) ** 2,
        "scaling_factor": pipe.vae.config.scaling_factor,
        "evaluation_ms_batch_16": timings(pipe),
        "judge_heldout": accuracy(judge, DigitWorld("heldout"), 3000),
        "guidance": tables,
        "sheet_guidance": best,
        "neighbours": {
            "draws": NEIGHBOUR_DRAWS,
            "compared": len(half),
            "median_distance": distances,
        },
        "training": training,
    }


def percent(share: float) -> str:
    """0.9876 -> "98.8"."""
    return f"{100 * share:.1f}"


def card(r: dict) -> str:
    """The model card, from the results alone."""
    env, stages = r["environment"], r["training"]["stages"]
    guidance, steps = r["sheet_guidance"], r["steps"]
    rows = [
        f"| {g} | {t['samples']} | {percent(t['digit'])} | {percent(t['colour'])} "
        f"| {percent(t['both'])} |"
        for g, t in r["guidance"].items()
    ]
    best = r["guidance"][str(guidance)]
    by_digit = " | ".join(percent(v) for v in best["both_by_digit"].values())
    by_colour = " | ".join(percent(v) for v in best["both_by_colour"].values())
    trained = [
        f"| {name} | {s['step']:,} | {s['batch']} | {s['seconds'] / 60:.0f} "
        f"| {s['curve'][-1][1]:.4f} |"
        for name, s in stages.items()
    ]
    ms, distance = r["evaluation_ms_batch_16"], r["neighbours"]["median_distance"]
    shape, real = r["transformer"], r["judge_heldout"]
    cost = "; ".join(
        f"{n} thread{'s'[: int(n) - 1]}: median {v['median']:.1f} ms, best {v['best']:.1f} ms"
        for n, v in ms.items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
<!-- Written by benchmarks/bench_zoo.py from benchmarks/results/zoo_{r["model"]}.json. -->
# {r["model"]}

A small class-conditional latent diffusion transformer, trained from nothing on DigitWorld: real
handwritten digits (scikit-learn's scans), coloured, on backgrounds from black to white, 32x32.
It exists so that acceleration methods can be tried, tested and measured offline in a minute. Its
figures say whether a method works, nothing about large models.

```python
from diffusers import DiTPipeline
from accel import zoo

pipe = DiTPipeline.from_pretrained(zoo.path("{r["model"]}"))
labels = pipe.get_label_ids(["red three"])
image = pipe(labels, guidance_scale={guidance}, num_inference_steps={steps}).images[0]
```

Class = digit + 10 x colour ({", ".join(COLOURS)});
1000 is "no class".

![samples beside real pictures](samples.png)

## Size and cost

| | |
|---|---|
| weights, half precision | {r["bytes"] / 1e6:.2f} MB |
| transformer | {r["parameters"]["transformer"] / 1e6:.2f} M parameters, \
{shape["num_layers"]} layers, {shape["num_attention_heads"]} heads of \
{shape["attention_head_dim"]}, {r["tokens"]} tokens (patch {shape["patch_size"]}) |
| autoencoder | {r["parameters"]["vae"] / 1e6:.2f} M parameters, scaling factor \
{r["scaling_factor"]:.4f} |
| schedule | {r["scheduler"]}, linear betas, noise prediction |
| one evaluation, batch 16, float32 | {cost} |

Measured on {env["hardware"]}, torch {env["versions"]["torch"]}, \
diffusers {env["versions"]["diffusers"]}, commit {env["commit"]}, {env["date"]}.

## Accuracy

Samples whose digit and colour the judge reads as asked for, in percent, {steps} steps. The
judge itself is right on {percent(real["digit"])} % of held-out handwriting (colour \
{percent(real["colour"])} %).

| guidance | samples | digit | colour | both |
|---|---|---|---|---|
{chr(10).join(rows)}

Both, at guidance {guidance}:

| {" | ".join(best["both_by_digit"])} |
|{"---|" * 10}
| {by_digit} |

| {" | ".join(best["both_by_colour"])} |
|{"---|" * 10}
| {by_colour} |

## Training

`python -m accel.zoo.train {r["model"]} --preset {r["training"]["preset"]} --out OUT`, seed \
{r["training"]["seed"]}, \
{r["training"]["hardware"]}, {r["training"]["threads"]} thread(s); \
{r["training"]["pool"]:,} pictures.

| stage | steps | batch | minutes | last loss |
|---|---|---|---|---|
{chr(10).join(trained)}

![loss](loss.png)

`training.json` holds the settings, the data position and the whole curve; `--start shipped` goes on
from these weights.

## Not a copy machine

The nearest of {r["neighbours"]["draws"]:,} training pictures of the same class (fresh jitter; root
mean square distance of the strokes, backgrounds ignored), median over \
{r["neighbours"]["compared"]} classes: samples {distance["samples"]:.3f}, \
real held-out pictures {distance["heldout"]:.3f}, \
pictures of training scans {distance["train"]:.3f}.

![samples and their nearest training pictures](neighbours.png)
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--card", action="store_true", help="only write the card again")
    parser.add_argument("--timing", action="store_true", help="only time again: on a quiet machine")
    args = parser.parse_args()
    if args.card or args.timing:
        results = results_file.read(RESULT)
        if results is None:
            raise SystemExit(f"no results {RESULT}; measure everything first")
    else:
        results = measure(args.samples)
    if args.timing:
        results["evaluation_ms_batch_16"] = timings(load())
    if not args.card:
        results_file.write(RESULT, "cpu", results)
    (zoo.path(NAME) / "README.md").write_text(card(results))


if __name__ == "__main__":
    main()
