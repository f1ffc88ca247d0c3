"""Searches and learns the cache schedules that ``bench_caches`` and its video sister measure.

    python -m benchmarks.search_schedules [evolution router exits] [--steps 50] [--work FOLDER]
    python -m benchmarks.search_schedules video --steps 20

Of ``zoo:digits-dit``; ``video``: a search of ``zoo:digits-wan``. Calibration is on noise that no
benchmark uses: seeds from 0, theirs begin at 1,000. What is found goes to ``benchmarks/schedules``,
and one schedule of the search to a recipe; a search or training that was cut off goes on. On one
core of a server CPU the search takes some ten minutes, and so does a training of the router; the
heads of early exits take half of that, video half an hour.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accel
from accel.artifact import Artifact
from accel.loading import zoo_path
from accel.measure import environment
from benchmarks.digits_study import GUIDANCE, MODEL, STRIDE, WAN, loaded, videos, weights_sha256
from benchmarks.distil import RECIPES
from caches._front import FRONT, Front
from caches.early_exit import EarlyExit, ExitTraining
from caches.evolution import EvolutionCache, EvolutionSearch
from caches.heat_map import draw
from caches.router import RouterTrainer
from caches.schedule import of_artifact

SCHEDULES = Path(__file__).parent / "schedules"
PICTURES = Path(__file__).parent / "pictures"
RECIPE_STEPS, RECIPE_QUALITY = 50, 38.0  # dB
BATCH, CALLS = 20, 4
SEARCH = EvolutionSearch(population=24, generations=24, screen=2)
# what is forecast does worse on digits-wan than what is repeated, and parts than the whole
VIDEO_SEARCH = EvolutionSearch("output", order=0, population=16, generations=10, screen=2)
VIDEOS = slice(77, 80)  # of the order of prompts; the benchmark has the first ones
# the price of a module decides how many compute; the paper's 7e-8 is for its own pictures
BETAS = {20: (3e-6, 1e-5), 50: (3e-7, 1e-6)}
ROUTER_BATCH, UPDATES = 8, 250
EXITS, HEADS = ExitTraining(), "heads.safetensors"
# the best of them first
EXIT_ROWS = (*(("forecast", q) for q in (40, 35, 30, 25)), ("residual", 30), ("skip", 30),
             ("heads", 30))  # fmt: skip


def calls(steps: int, batch: int = BATCH, count: int = CALLS) -> list[dict[str, Any]]:
    """Calibration: classes in another order than the benchmarks'."""
    labels = [(7 + i * STRIDE) % 100 for i in range(batch * count)]
    return [
        {
            "class_labels": labels[i : i + batch],
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
        }
        for i in range(0, len(labels), batch)
    ]


def evolution(pipe: Any, steps: int, work: Path) -> dict[str, Any]:
    """The front of a search, as JSON."""
    folder = work / f"evolution-{steps}"
    begin = time.monotonic()
    SEARCH.run(pipe, calls(steps), folder)
    record = json.loads((folder / FRONT).read_text())
    if steps == RECIPE_STEPS:
        write_recipe(Front.read(folder))
    return {**record, "seconds": round(time.monotonic() - begin)}


def video(pipe: Any, steps: int, work: Path) -> dict[str, Any]:
    """The front of a search on ``zoo:digits-wan``, as JSON."""
    folder, begin = work / f"video-{steps}", time.monotonic()
    VIDEO_SEARCH.run(pipe, videos(VIDEOS.stop, steps)[VIDEOS], folder)
    record = json.loads((folder / FRONT).read_text())
    return {**record, "seconds": round(time.monotonic() - begin)}


def write_recipe(found: Front) -> None:
    """The fastest schedule of a fidelity as a recipe."""
    accel.write_recipe(
        RECIPES / "digits-dit-evolution.yaml",
        accel.Recipe((EvolutionCache(found.pick(quality=RECIPE_QUALITY)),)),
        name="digits-dit-evolution",
        description=f"A searched schedule for {MODEL}: the network is called at few steps.",
    )


def router(pipe: Any, steps: int, work: Path) -> dict[str, Any]:
    """Schedules of trainings at rising prices, as JSON."""
    rows = []
    for beta in BETAS[steps]:
        trainer = RouterTrainer(beta=beta, updates=UPDATES)
        artifact = trainer.fit(
            pipe, calls(steps, ROUTER_BATCH, 12), str(work / f"router-{steps}-{beta:g}")
        )
        schedule = of_artifact(artifact)
        said = f"HarmoniCa's router, {steps} steps, price {beta:g}: {schedule.share():.0%} computed"
        draw(schedule, PICTURES / f"router_{steps}_{beta:g}.png", said)
        rows.append(
            {
                "beta": beta,
                "columns": list(schedule.columns),
                "rows": list(schedule.rows),
            }
        )
    return {"updates": UPDATES, "batch": ROUTER_BATCH, "schedules": rows}


def exits(pipe: Any, steps: int, work: Path) -> dict[str, Any]:
    """Trains the heads of early exits, put beside the record that is returned, and all depths."""
    folder, begin = work / f"exits-{steps}", time.monotonic()
    heads = EXITS.fit(pipe, calls(steps, ROUTER_BATCH, 12), str(folder))
    heads.save(SCHEDULES / f"exits-{steps}" / HEADS)
    seconds, rows = round(time.monotonic() - begin), []
    for rest, quality in EXIT_ROWS:
        file = folder / f"{rest}-{quality}.safetensors"
        if not file.is_file():
            instead: Any = heads if rest == "heads" else rest
            given = calls(steps, count=1)
            EarlyExit.calibrate(pipe, given, rest=instead, quality=quality).save(file)
        schedule = of_artifact(Artifact.load(file))
        rows.append({"rest": rest, "quality": quality, "rows": list(schedule.rows)})
        print(rest, quality, f"{schedule.share():.0%} of the blocks", flush=True)
    found = {"columns": list(schedule.columns), "schedules": rows}
    return {"training": asdict(EXITS), "batch": ROUTER_BATCH, "seconds": seconds, **found}


def front(steps: int, what: str = "evolution") -> Front:
    """The searched front for a number of steps. Raises FileNotFoundError before the search."""
    return Front.read(SCHEDULES / f"{what}-{steps}")


OF_PICTURES = {"evolution": evolution, "router": router, "exits": exits}
WHAT = {**OF_PICTURES, "video": video}
SEARCHES = ("evolution", "video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="*", default=list(OF_PICTURES), choices=WHAT)
    parser.add_argument("--steps", type=int, default=50, choices=sorted(BETAS))
    parser.add_argument("--work", type=Path, default=Path("out/schedules"))
    given = parser.parse_args()
    for what in given.what:
        model = WAN if what == "video" else MODEL
        found = WHAT[what](loaded(model), given.steps, given.work)
        found |= {
            "model": model,
            "weights_sha256": weights_sha256(zoo_path(model)),
            "steps": given.steps,
            "environment": environment("cpu"),
        }
        folder = SCHEDULES / f"{what}-{given.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (FRONT if what in SEARCHES else f"{what}.json")).write_text(
            json.dumps(found, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
