"""Quantisation, part by part, beside torchao and quanto: ``quant.json``, ``_ddpm``, ``_sd``.

    python -m benchmarks.bench_quant [--model zoo:digits-ddpm] [--only "W4A8: plain"]

Each row is paired with the unmodified model: same noise, same inputs, timed in turn. Rows go from
plain rounding with one static scale to everything, one part more at a time; controls have their
scales shuffled among channels and layers. Calibrated on one batch of other noise. Rows that the
file has already with the same settings are not measured again, so a stopped run goes on;
``--fresh`` measures all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import denoisers
from accel.loading import quiet_loading
from accel.measure import Referee, Study, Verdict, environment, load_average
from accel.method import Method, Recipe
from accel.settings import Settings, settings_json
from apps.digits_referee import NAME, real_samples
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
from benchmarks.kept import kept_rows, stays
from benchmarks.quant_peers import Quanto, TorchAO
from benchmarks.results_file import DEVICES, add_fresh, read, write
from quant import mixed_precision
from quant._parts import of_weights
from quant.calibrate import TFMQCalibration
from quant.tfmq import TFMQ

DDPM = "zoo:digits-ddpm"
NAMES = {MODEL: "quant", SD: "quant_sd", DDPM: "quant_ddpm"}
STEPS, SAMPLES = 20, 140  # enough samples for a Frechet distance of 64 features
ROUNDING_STEPS, MANY_STEPS = 100, 2000  # of AdaRound, a block
NOISES = (1, 2)  # of further calibrations of the same setting
SIZES = {"6 bits": 0.19, "5 bits": 0.16}  # of layers' bytes in float32; 8 bits are 0.25, 4 0.125


@dataclass(frozen=True)
class Spec:
    """One row: a calibration, perhaps of a plan within a share of bytes, or shuffled; or a peer."""

    label: str
    how: TFMQCalibration | None = None
    share: float | None = None
    shuffled: bool = False
    peer: Method | None = None

    def settings(self) -> Recipe | dict[str, Any]:
        """What its row depends on."""
        if self.peer is not None:
            return Recipe((self.peer,))
        how = settings_json(self.how)
        return {"how": how, "share": self.share, "shuffled": self.shuffled}


def specs(model: str) -> list[Spec]:
    """Rows in order of worth."""
    shared = TFMQCalibration(steps=ROUNDING_STEPS, calls=5, skips="split")
    gptq = {8: replace(shared, bits=8), 4: replace(shared, bits=4)}
    plain = {
        bits: replace(how, rounding="nearest", activations="static", temporal="plain")
        for bits, how in gptq.items()
    }
    whole = {bits: replace(how, temporal="cache") for bits, how in plain.items()}
    brecq = replace(plain[4], rounding="adaround")
    tiar = replace(brecq, temporal="tiar")
    only = replace(gptq[4], activations="whole")
    found = [
        Spec("W8A8: GPTQ", gptq[8]),
        Spec("W4A8: GPTQ", gptq[4]),
        Spec("W4A8: plain", plain[4]),
        Spec("W8A8: plain", plain[8]),
        Spec("control: W4A8, scales shuffled", gptq[4], shuffled=True),
        Spec("control: W8A8, scales shuffled", gptq[8], shuffled=True),
        Spec("W4A8: + temporal whole", whole[4]),
        Spec("W4A8: + scales by timestep", replace(whole[4], activations="groups")),
        Spec("W4A8: + scheme by layer", replace(whole[4], activations="auto")),
        Spec("W8A8: GPTQ, faster layers only", replace(gptq[8], only_faster=True)),
        *(Spec(f"mixed: {k} on average", gptq[4], share=s) for k, s in SIZES.items()),
        Spec("W4A8: AdaRound, one scale", brecq),
        Spec("W4A8: AdaRound, + TIAR", tiar),
        Spec("W4A8: AdaRound, + TIAR, by timestep", replace(tiar, activations="groups")),
        Spec("W4A8: AdaRound, temporal whole, by layer", replace(gptq[4], rounding="adaround")),
        *skips(model, plain, gptq),
        Spec("W8A8: + temporal whole", whole[8]),
        Spec("W8A8: + scales by timestep", replace(whole[8], activations="groups")),
        Spec("W8A8: + scheme by layer", replace(whole[8], activations="auto")),
        Spec("W4A16: plain", replace(plain[4], activations="whole")),
        Spec("W4A16: + temporal whole", replace(whole[4], activations="whole")),
        Spec("W4A16: GPTQ", only),
        Spec("torchao: int8 dynamic", peer=TorchAO("int8 dynamic")),
        Spec("quanto: int8 weights", peer=Quanto(8)),
        Spec("quanto: int4 weights", peer=Quanto(4)),
        Spec("torchao: int8 weight-only", peer=TorchAO("int8 weight-only")),
    ]
    if model != SD:  # minutes there, an hour of it
        many = replace(gptq[4], rounding="adaround", steps=MANY_STEPS)
        found.append(Spec("W4A8: AdaRound, many iterations", many))
    return found + [
        Spec(f"W{bits}A8: GPTQ, calibration {seed + 1}", replace(gptq[bits], seed=seed))
        for seed in NOISES
        for bits in (4, 8)
    ]


def skips(model: str, plain: dict[int, Any], gptq: dict[int, Any]) -> list[Spec]:
    """In UNets: what it is worth to leave layers fed with skips whole, or to split their grids."""
    if model == MODEL:
        return []
    return [
        Spec("W8A8: GPTQ, skips whole", replace(gptq[8], skips="whole")),
        Spec("W4A8: GPTQ, skips whole", replace(gptq[4], skips="whole")),
        Spec("W4A8: plain, skips not split", replace(plain[4], skips="joint")),
        Spec("W8A8: plain, skips not split", replace(plain[8], skips="joint")),
        Spec("W4A8: GPTQ, skips not split", replace(gptq[4], skips="joint")),
    ]


class Calibrator:
    """Artifacts of calibrations; what two of them have in common is done once."""

    def __init__(self, pipe: Any, calls: list[dict[str, Any]], folder: Path) -> None:
        self.pipe, self.calls, self.folder = pipe, calls, folder

    def method(self, spec: Spec) -> tuple[Method, dict[str, Any]]:
        """A row's method, and what its calibration says of itself."""
        if spec.peer is not None:
            return spec.peer, {}
        assert spec.how is not None
        how = spec.how if spec.share is None else self._planned(spec.how, spec.share)
        artifact = how.fit(self.pipe, self.calls, self._parts(how), say=lambda _: None)
        if spec.shuffled:
            artifact = shuffled(artifact)
        ref = artifact.save(self.folder / f"{_digest(spec.label)}.safetensors")
        return TFMQ(ref), facts(self.pipe, artifact, ref)

    def _parts(self, how: TFMQCalibration) -> str:
        kept = json.dumps(of_weights(settings_json(how)), sort_keys=True)
        return str(self.folder / _digest(kept))

    def _planned(self, how: TFMQCalibration, share: float) -> TFMQCalibration:
        nearest = replace(how, rounding="nearest", bits=8)
        costs = mixed_precision.measured(
            self.pipe, self.calls, nearest, str(self.folder / "costs"), say=lambda _: None
        )
        return replace(how, plan=Settings(mixed_precision.within(costs, "bytes", share)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    return replace(artifact, tensors=tensors | mixed)


def _zero(name: str) -> str:
    return name.replace(":ascale", ":azero")


def facts(pipe: Any, artifact: Artifact, ref: ArtifactRef) -> dict[str, Any]:
    """Sizes and times: of the file and what stays in floating point, by calibration and layers."""
    layers = artifact.settings["layers"]
    whole = 0
    for denoiser in denoisers(pipe):
        own = f"{denoiser.slot}."
        taken = {f"{p.removeprefix(own)}.weight" for p in layers if p.startswith(own)}
        whole += sum(p.nbytes for n, p in denoiser.module.named_parameters() if n not in taken)
    total = sum(p.nbytes for d in denoisers(pipe) for p in d.module.parameters())
    return {
        "calibration_seconds": artifact.settings["seconds"],
        "temporal_error": max(artifact.settings["temporal_error"].values()),
        "quantised_layers": len(layers),
        "layers_by_bits": dict(Counter(str(how["bits"]) for how in layers.values())),
        "bytes_on_disk": [total, whole + Path(ref.path).stat().st_size],
    }


def unconditional(samples: int, steps: int, device: str) -> Study:
    """digits-ddpm: no question, so the referee says whether it takes a sample for a digit."""
    import diffusers

    from accel import zoo
    from accel.metrics.protocol import file_sha256
    from accel.zoo.judge import judge

    torch.set_num_threads(1)
    folder = zoo.path("digits-ddpm")
    with quiet_loading():
        pipe = diffusers.DDIMPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    calls = [{"batch_size": BATCH, "num_inference_steps": steps} for _ in range(samples // BATCH)]
    reader = judge(NAME)
    referee = Referee(
        name=NAME,
        sha256=file_sha256(zoo.path(NAME) / "model.safetensors"),
        judge=lambda made, _: Verdict(reader.digit_like(made), reader.features_of(made)),
        real=lambda given, draw: reader.features_of(real_samples(given, draw)),
    )
    seeds = [1000 + i for i in range(len(calls))]
    model = {"name": DDPM, "weights_sha256": weights_sha256(folder)}
    return Study(pipe, calls, seeds=seeds, timed=1, referee=referee, model=model)


def studied(model: str, samples: int, device: str) -> tuple[Study, list[dict[str, Any]]]:
    """A study, and the calls to calibrate on, which are none of it."""
    if model == DDPM:
        calls = [{"batch_size": BATCH, "num_inference_steps": STEPS}]
        return unconditional(samples, STEPS, device), calls  # of other noise: seeds from 0 on
    made: Callable[..., Any] = inputs if model == MODEL else prompts
    return study(samples, device, NAME, model, STEPS), made(samples + BATCH, STEPS)[-1:]


def there(model: str, measured: dict[str, Any]) -> set[str]:
    """Names of the rows that are of the settings to be measured."""
    return {s.label for s in specs(model) if stays(measured.get(s.label), s.settings())}


def missing(model: str, only: list[str], have: Container[str]) -> Iterator[Spec]:
    """Of the named rows, or of all, those that are not there yet.

    Raises:
        ValueError: a name of no row.
    """
    known = specs(model)
    unknown = set(only) - {spec.label for spec in known}
    if unknown:
        raise ValueError(f"no row is called {min(unknown)!r}; rows: {[s.label for s in known]}")
    for spec in known:
        if spec.label not in have and (not only or spec.label in only):
            yield spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=MODEL, choices=tuple(NAMES))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="*", default=[], help="rows to measure; all by default")
    add_fresh(parser)
    given = parser.parse_args()
    load, name = load_average(), NAMES[given.model]
    bench, calls = studied(given.model, given.samples, given.device)
    block = environment_of(given.device, load)
    old = read(name, given.device) if given.only or not given.fresh else None
    measured = dict(kept_rows(old, bench.protocol(), block))
    with tempfile.TemporaryDirectory() as folder:
        made = Calibrator(bench.pipe, calls, Path(folder))
        have = () if given.fresh else there(given.model, measured)
        for spec in missing(given.model, given.only, have):
            method, found = made.method(spec)
            result = bench.compare(Recipe((method,)), rounds=given.rounds)
            run = result.report["members"][0]["runs"][-1]
            sizes = ("weights_bytes", "quantised_bytes")
            found |= {k: run["detail"][k] for k in sizes if k in run["detail"]}
            found["fallbacks"] = sum(run["fallbacks"].values())
            made_row = {**row(Recipe((method,)), result, folder), "facts": found}
            settings = spec.settings()
            made_row |= {} if isinstance(settings, Recipe) else {"calibration": settings}
            measured[spec.label] = made_row
            print(spec.label, *(measured[spec.label][k] for k in ("speedup", "psnr", "facts")))
            block = environment_of(given.device, load)
            content = {
                **head(bench, given.samples, block),
                "rows": _in_order(given.model, measured),
            }
            write(name, given.device, content)  # after each: a stopped run has not been for nothing


def _in_order(model: str, measured: dict[str, Any]) -> dict[str, Any]:
    labels = [spec.label for spec in specs(model)]
    return {k: measured[k] for k in sorted(measured, key=labels.index)}


def environment_of(device: str, load: float | None) -> dict[str, Any]:
    """The environment block, with the peers' versions."""
    from importlib.metadata import version

    block = environment(device, load)
    peers = {p: version(p) for p in ("torchao", "optimum-quanto")}
    return {**block, "versions": {**block["versions"], **peers}}


if __name__ == "__main__":
    main()
