"""Quantisation, part by part, beside torchao and quanto: ``quant.json``, ``_ddpm``, ``_sd``.

    python -m benchmarks.bench_quant [--model zoo:digits-ddpm] [--samples 100] [--only W4A8]

Each row is paired with the unmodified model: same noise, same inputs, timed in turn. The first row
of each width rounds to the nearest with one static scale; each further one adds a part. Controls
have the scales of the last row shuffled among channels and layers. Calibrated on other noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import denoisers
from accel.loading import quiet_loading
from accel.measure import Study, load_average
from accel.method import Method, Recipe
from apps.digits_referee import NAME
from benchmarks.bench_native import kept_rows
from benchmarks.digits_study import (
    BATCH,
    MODEL,
    SD,
    head,
    inputs,
    prompts,
    row,
    study,
    weights_sha256,
)
from benchmarks.quant_peers import Quanto, TorchAO
from benchmarks.results_file import DEVICES, read, write
from quant.calibrate import TFMQCalibration
from quant.tfmq import TFMQ

DDPM = "zoo:digits-ddpm"
NAMES = {MODEL: "quant", SD: "quant_sd", DDPM: "quant_ddpm"}
STEPS, SAMPLES = 20, 100
FIRST = ("W8A8: + GPTQ", "W4A8: + GPTQ")  # stand for the method where one row does
ROUNDING_STEPS = 100
EIGHT = ("plain", "+ scales by timestep", "+ scheme by layer", "+ GPTQ")  # parts that 8 bits need


def calibrations(bits: int) -> dict[str, TFMQCalibration]:
    """From plain rounding to everything, one part more at a time."""
    how: dict[str, Any] = {"bits": bits, "steps": ROUNDING_STEPS, "calls": 5}
    plain = {"activations": "static", "rounding": "nearest", "temporal": "plain"}
    return {
        "plain": TFMQCalibration(**how, **plain),
        "+ temporal modules whole": TFMQCalibration(**how, **plain | {"temporal": "cache"}),
        "+ scales by timestep": TFMQCalibration(
            **how, **plain | {"temporal": "cache", "activations": "groups"}
        ),
        "+ scheme by layer": TFMQCalibration(
            **how, **plain | {"temporal": "cache", "activations": "auto"}
        ),
        "+ GPTQ": TFMQCalibration(**how, rounding="gptq"),
        "+ AdaRound by blocks": TFMQCalibration(**how, rounding="adaround"),
        "TIAR, AdaRound by blocks": TFMQCalibration(**how, rounding="adaround", temporal="tiar"),
    }


def weight_only() -> dict[str, TFMQCalibration]:
    how: dict[str, Any] = {"bits": 4, "steps": ROUNDING_STEPS, "calls": 5, "activations": "whole"}
    return {
        "plain": TFMQCalibration(**how, rounding="nearest", temporal="plain"),
        "+ temporal modules whole": TFMQCalibration(**how, rounding="nearest"),
        "+ GPTQ": TFMQCalibration(**how, rounding="gptq"),
    }


def shuffled(artifact: Artifact) -> Artifact:
    """The same codes under the scales of other channels and layers."""
    order = torch.Generator().manual_seed(0)
    tensors = dict(artifact.tensors)
    for name, tensor in tensors.items():
        if name.endswith(":wscale"):
            tensors[name] = tensor[torch.randperm(len(tensor), generator=order)]
    grids = sorted(n for n in tensors if n.endswith(":ascale"))
    places = torch.randperm(len(grids), generator=order).tolist()
    mixed = {grids[i]: tensors[grids[j]] for i, j in enumerate(places)}
    for i, j in enumerate(places):
        mixed[_zero(grids[i])] = tensors[_zero(grids[j])]
    artifact.tensors = tensors | mixed
    return artifact


def _zero(name: str) -> str:
    return name.replace(":ascale", ":azero")


def rows(
    pipe: Any, calls: list[dict[str, Any]], folder: Path, only: Container[str]
) -> Iterator[tuple[str, Method, dict[str, Any]]]:
    """Label, method, and what the calibration says of itself."""
    eight = {k: v for k, v in calibrations(8).items() if k in EIGHT}
    widths = {"W4A8": calibrations(4), "W4A16": weight_only(), "W8A8": eight}
    last: ArtifactRef | None = None
    for width, found in widths.items():
        for label, how in found.items():
            name = f"{width}: {label}"
            if not only or name in only:
                place = folder / name.replace(" ", "_").replace(":", "")
                artifact = how.fit(pipe, calls, str(place), say=lambda _: None)
                last = artifact.save(f"{place}.safetensors")
                yield name, TFMQ(last), facts(pipe, artifact, last)
        control = f"control: {width}, scales shuffled"
        if last is not None and (not only or control in only) and width != "W4A16":
            mixed = shuffled(Artifact.load(last)).save(folder / f"{width}-shuffled.safetensors")
            yield control, TFMQ(mixed), {}
    for name, peer in (
        ("torchao: int8 dynamic", TorchAO("int8 dynamic")),
        ("torchao: int8 weight-only", TorchAO("int8 weight-only")),
        ("quanto: int8 weights", Quanto(8)),
        ("quanto: int4 weights", Quanto(4)),
    ):
        if not only or name in only:
            yield name, peer, {}


def facts(pipe: Any, artifact: Artifact, ref: ArtifactRef) -> dict[str, Any]:
    """Sizes and times: of the file and what stays in floating point, by calibration and layers."""
    layers = artifact.settings["layers"]
    whole = 0
    for denoiser in denoisers(pipe):
        taken = {f"{path.partition('.')[2]}.weight" for path in layers}
        whole += sum(p.nbytes for n, p in denoiser.module.named_parameters() if n not in taken)
    total = sum(p.nbytes for d in denoisers(pipe) for p in d.module.parameters())
    return {
        "calibration_seconds": artifact.settings["seconds"],
        "temporal_error": max(artifact.settings["temporal_error"].values()),
        "quantised_layers": len(layers),
        "bytes_on_disk": [total, whole + Path(ref.path).stat().st_size],
    }


def ddpm_study(samples: int, steps: int) -> Study:
    """digits-ddpm: no question, so only distances."""
    import diffusers

    from accel import zoo

    torch.set_num_threads(1)
    folder = zoo.path("digits-ddpm")
    with quiet_loading():
        pipe = diffusers.DDIMPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = [{"batch_size": BATCH, "num_inference_steps": steps} for _ in range(samples // BATCH)]
    model = {"name": DDPM, "weights_sha256": weights_sha256(folder)}
    return Study(pipe, calls, seeds=list(range(len(calls))), timed=1, model=model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=MODEL, choices=tuple(NAMES))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure; the others stay")
    given = parser.parse_args()
    load = load_average()
    if given.model == DDPM:
        bench = ddpm_study(given.samples, STEPS)
        calls = [{"batch_size": BATCH, "num_inference_steps": STEPS}]
    else:
        bench = study(given.samples, given.device, NAME, given.model, STEPS)
        made = inputs if given.model == MODEL else prompts
        calls = made(given.samples + BATCH, STEPS)[-1:]
    name = NAMES[given.model]
    print(name, flush=True)
    block = environment_of(given.device, load)
    kept = kept_rows(read(name, given.device), bench.protocol(), block) if given.only else {}
    measured = dict(kept)
    with tempfile.TemporaryDirectory() as folder:
        for label, method, found in rows(bench.pipe, calls, Path(folder), given.only):
            recipe = Recipe((method,))
            result = bench.compare(recipe, rounds=given.rounds)
            detail = result.report["members"][0]["runs"][-1]["detail"]
            sizes = {k: detail[k] for k in ("weights_bytes", "quantised_bytes") if k in detail}
            measured[label] = {**row(recipe, result, folder), "facts": {**found, **sizes}}
            print(label, *(measured[label][k] for k in ("speedup", "psnr", "facts")), flush=True)
            block = environment_of(given.device, load)
            first = {k: measured[k] for k in FIRST if k in measured}
            content = {**head(bench, given.samples, block), "rows": first | measured}
            write(name, given.device, content)  # after each: a stopped run has not been for nothing


def environment_of(device: str, load: float | None) -> dict[str, Any]:
    """The environment block, with the peers' versions."""
    from importlib.metadata import version

    from accel.measure import environment

    block = environment(device, load)
    peers = {p: version(p) for p in ("torchao", "optimum-quanto")}
    return {**block, "versions": {**block["versions"], **peers}}


if __name__ == "__main__":
    main()
