"""What studies of the digits share: command line, inputs, seeds, referee and rows."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import accel
from accel.loading import zoo_path
from accel.measure import Comparison, Study
from accel.method import Method, Recipe
from accel.settings import Settings
from accel.zoo.world import caption
from apps.digits_referee import NAME, digits_referee, zoo_inputs
from benchmarks.results_file import DEVICES

MODEL, SD, WAN = "zoo:digits-dit", "zoo:digits-sd", "zoo:digits-wan"
STEPS, GUIDANCE, BATCH = 50, 3.0, 20
SD_GUIDANCE = WAN_GUIDANCE = 4.0
SAMPLES = 200  # two of each class, and enough for a Frechet distance of 64 features
TIMED = 1  # of the batches
SEED = 1000
STRIDE = 37  # prime to 100: goes round all classes before any comes twice
# grids that start at full noise, whatever the number of steps; DDIM's "leading" one does not
DPM = ("DPMSolverMultistepScheduler", Settings(timestep_spacing="trailing"))
UNIPC = ("UniPCMultistepScheduler",)  # digits-wan's own
DDIM = ("DDIMScheduler", Settings(timestep_spacing="trailing"))


def command_line(
    doc: str | None, *, samples: int = SAMPLES, rounds: int = 7
) -> argparse.ArgumentParser:
    """The options that studies share, for a script with this docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--referee", default=NAME, help="a shipped judge")
    return parser


def inputs(samples: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """Batches of class labels that go round all classes, as pipeline-call arguments."""
    labels = [(i * STRIDE) % 100 for i in range(samples)]
    return [
        {
            "class_labels": labels[i : i + BATCH],
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
        }
        for i in range(0, samples, BATCH)
    ]


def prompts(samples: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """The same for digits-sd: captions that go round digits, colours and backgrounds."""
    rows = [(i * STRIDE) % 100 for i in range(samples)]
    said = [caption(c % 10, c // 10, (c + i) % 5) for i, c in enumerate(rows)]
    return [
        {
            "prompt": said[i : i + BATCH],
            "num_inference_steps": steps,
            "guidance_scale": SD_GUIDANCE,
        }
        for i in range(0, samples, BATCH)
    ]


def videos(samples: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """Calls of digits-wan, a video each, going round digits, colours, backgrounds and motions."""
    calls = zoo_inputs("WanPipeline", samples, steps)
    return [{**call, "guidance_scale": WAN_GUIDANCE} for call in calls]


CALLS = {MODEL: inputs, SD: prompts, WAN: videos}  # by model


def study(
    samples: int = SAMPLES,
    device: str = "cpu",
    referee: str = NAME,
    model: str = MODEL,
    steps: int = STEPS,
) -> Study:
    """The shipped pipeline, one thread, with its inputs and referee."""
    calls = CALLS[model](samples, steps)
    return study_of(loaded(model, device), calls, seed=SEED, model=model, referee=referee)


def loaded(model: str, device: str = "cpu") -> Any:
    """A pipeline as studies run it: one thread, no progress bar."""
    torch.set_num_threads(1)
    pipe = accel.load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def study_of(
    pipe: Any, calls: list[dict[str, Any]], *, seed: int, model: str, referee: str = NAME
) -> Study:
    """These calls of a pipeline with seeds from ``seed`` on, the first ``TIMED`` of them timed."""
    folder = zoo_path(model) if model.startswith("zoo:") else Path(model)
    return Study(
        pipe,
        calls,
        seeds=[seed + i for i in range(len(calls))],
        timed=TIMED,
        referee=digits_referee(calls, referee),
        model={"name": model, "weights_sha256": weights_sha256(folder)},
    )


def weights_sha256(folder: Path) -> str:
    """Over all weights and configurations of a pipeline's components; cards do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*/*") if p.suffix in (".safetensors", ".json")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def without_folder(method: Method) -> dict[str, Any]:
    """The method as JSON, its artifact by its file's name: results go for any machine."""
    record = method.to_json()
    artifact = record["settings"].get("artifact")
    if artifact is None:
        return record
    artifact = {**artifact, "path": Path(artifact["path"]).name}
    return {**record, "settings": {**record["settings"], "artifact": artifact}}


def records(recipe: Recipe, *artifacts: str) -> list[dict[str, Any]]:
    """Its methods as JSON, without the names of these folders in their artifacts' paths."""
    methods = json.dumps([m.to_json() for m in recipe.methods])
    for folder in artifacts:
        methods = methods.replace(f"{folder}/", "")
    return json.loads(methods)


def row(recipe: Recipe, result: Comparison, *artifacts: str) -> dict[str, Any]:
    """A row of ``schema.Row``. ``artifacts``: folders whose names are left out of paths."""
    measured = result.measured()
    kept = ("speedup", "flops", "nfe", "peak_bytes", "psnr", "ssim", "judged")
    seconds = (result.time.seconds_a, result.time.seconds_b)
    return {
        **{k: measured[k] for k in kept},
        "methods": records(recipe, *artifacts),
        "effect": [m["effect"] for m in result.report["members"]],
        "seconds": [[round(x, 6) for x in side] for side in seconds],
        "per_sample": result.per_sample,
        "protocol": result.protocol.sha256,
        "environment": measured["environment"],
    }


def head(
    study: Study, samples: int, environment: dict[str, Any], batch: int = BATCH
) -> dict[str, Any]:
    """What stands above the rows of ``schema.Study``."""
    protocol = study.protocol()
    return {
        "environment": environment,
        "protocol": protocol.as_json(),
        "model": protocol.model["name"],
        "steps": protocol.steps,
        "guidance": protocol.guidance,
        "batch": batch,
        "samples": samples,
    }
