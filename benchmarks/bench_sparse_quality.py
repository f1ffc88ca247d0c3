"""What each policy of sparse attention costs in quality, against density, on ``zoo:digits-wan``.

    python -m benchmarks.bench_sparse_quality [--videos 32] [--judged 32] [--densities 0.2 0.4]
                                              [--only WORD] [--fresh]

Paired: the same prompts and seeds as the dense model, PSNR of whole videos. Controls keep as many
blocks drawn at random, with and without means for the rest, and must lose. At one density the
default policy's parts are taken away one by one, and it, the calibrated one, the best static
pattern and the control are judged by the referee (digit, colour, background, motion), on more
videos. Blocks are small, since a video has 1,280 tokens: nothing here is a speed. Budgets are
calibrated on other prompts and seeds. Some 700 videos of 6 seconds of one core. Videos are kept
as they are made, so a stopped study goes on (after a change of code: ``--fresh``). ``--only``
measures the rows again that have a word in their names, and leaves the others in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import accel
from accel.files import write_atomically
from accel.loading import zoo_path
from accel.measure import PLAIN, PSNR_CAP, Study, environment, load_average, pipeline_samples
from accel.method import Method, Recipe, attached
from accel.metrics.fidelity import psnr
from accel.metrics.statistics import bootstrap
from apps.digits_referee import digits_referee, zoo_inputs
from benchmarks.digits_study import weights_sha256, without_folder
from benchmarks.results_file import DEVICES, add_fresh, read, require_machine, write
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.adaptive import Adaptive
from sparse_attn.block_map import keep_share
from sparse_attn.budgets import Budgets
from sparse_attn.calibrate import CalibrationSettings
from sparse_attn.estimators import complement
from sparse_attn.head_classes import HeadClasses
from sparse_attn.kernels.reference import Pooled
from sparse_attn.radial import Radial
from sparse_attn.sliding_tile import SlidingTile
from sparse_attn.sparge import SpargePrediction
from sparse_attn.subblock_lse import SubblockLSE
from sparse_attn.topk import TopK

MODEL = "zoo:digits-wan"
STEPS, GUIDANCE = 20, 4.0
BLOCKS = (64, 32)  # 20 x 40 blocks of 1,280 tokens
DENSE = (0.2, 0.0)
SEED, CALIBRATION_SEED, CALIBRATION_VIDEOS = 1000, 5000, 6
# it has no density to ask for; what keeps about as much on this model's attention
SPARGE_MASSES = {0.1: 0.38, 0.2: 0.6, 0.4: 0.85}
CALIBRATED = "calibrated"  # in the names of rows that need budgets
STATIC = ("SlidingTile", "Radial", "HeadClasses")


@dataclass(frozen=True)
class RandomMask(SparseAttention, Method):
    """A control: as many blocks, drawn at random."""

    density: float = 0.3
    means: bool = False

    def nominal(self) -> float:
        return self.density

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        draw = zlib.crc32(repr((place.layer, place.step, place.branch)).encode())
        nq, nk = (-(-x.shape[2] // n) for x, n in zip((q, k), place.blocks, strict=True))
        generator = torch.Generator().manual_seed(draw)
        scores = torch.rand(*q.shape[:2], nq, nk, generator=generator).to(q.device)
        return keep_share(scores, self.density)

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        return complement(k, v, keep, place.blocks[1]) if self.means else None


def methods(density: float, budgets: Any, parts: bool = True) -> dict[str, Method]:
    """What is compared at a density. parts: with the default policy's parts taken away, too."""
    shared: dict[str, Any] = {"dense": DENSE, "blocks": BLOCKS, "guard": False, "canary": 4}
    asked = {**shared, "density": density}
    found: dict[str, Method] = {
        "SubblockLSE": SubblockLSE(**asked, allocate="row"),
        f"SubblockLSE, {CALIBRATED}": SubblockLSE(**asked, artifact=budgets),
        f"SubblockLSE, {CALIBRATED}, by layer": SubblockLSE(
            **asked, allocate="layer", artifact=budgets
        ),
        "Adaptive": Adaptive(**shared, low=density, high=density),
        "TopK": TopK(**asked),
        "SpargePrediction": SpargePrediction(
            **shared, mass=SPARGE_MASSES.get(density, density), alike=-1.0
        ),
        "SlidingTile": SlidingTile(**asked),
        "Radial": Radial(**asked),
        "HeadClasses": HeadClasses(**asked),
        "control: random blocks": RandomMask(**asked),
    }
    if parts:
        found |= {
            "SubblockLSE, by layer": SubblockLSE(**asked, allocate="layer"),
            "SubblockLSE, no means": SubblockLSE(**asked, allocate="row", pooled=False),
            "control: random blocks, means": RandomMask(**asked, means=True),
        }
    return found


def inputs(videos: int) -> list[dict[str, Any]]:
    calls = zoo_inputs("WanPipeline", videos, STEPS)
    return [{**call, "guidance_scale": GUIDANCE} for call in calls]


class _Videos:
    """The model, its calls, and what the dense model makes of them; videos are kept on disk."""

    def __init__(self, pipe: Any, calls: list[dict[str, Any]], folder: Path, key: str) -> None:
        self.pipe, self.calls, self.folder, self.key = pipe, calls, folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, method: Method, count: int) -> tuple[Tensor, dict[str, Any]]:
        """(count, f, c, h, w) in [0, 1], and the last report's run."""
        digest = hashlib.sha256((self.key + method.digest()).encode()).hexdigest()[:16]
        samples, run = [], {}
        for i in range(count):
            file = self.folder / f"{digest}-{i}.pt"
            if not file.is_file():
                with attached(method, self.pipe) as live:
                    sample = pipeline_samples(self.pipe, self.calls[i], SEED + i)
                    report = live.report()
                    runs = report["runs"]
                kept = {"sample": (sample * 255).round().to(torch.uint8), "run": runs[0]}
                partial = file.with_suffix(".tmp")
                torch.save(kept, partial)
                partial.replace(file)
            kept = torch.load(file, weights_only=False)
            samples.append(kept["sample"].float() / 255)
            run = kept["run"]
        return torch.cat(samples), run


def row(videos: _Videos, method: Method, plain: Tensor, count: int) -> dict[str, Any]:
    samples, run = videos.of(method, count)
    values = psnr(plain[:count], samples).clamp(max=PSNR_CAP).tolist()
    detail = run["detail"]
    return {
        "methods": [without_folder(method)],
        "density": detail["density"],
        "psnr": bootstrap(values).as_json(),
        "per_video": [round(x, 3) for x in values],
        "output_error": detail["output_error"]["mean"],
        "fallbacks": run["fallbacks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--judged", type=int, default=32)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--judged-density", type=float, default=0.2)
    parser.add_argument("--only", default="", metavar="WORD", help="rows to measure again")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/sparse_quality"))
    add_fresh(parser)
    args = parser.parse_args()
    if args.judged and args.judged_density not in args.densities:
        parser.error(f"--judged-density {args.judged_density} is none of --densities")
    torch.set_num_threads(1)
    before = load_average()
    pipe = accel.load(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    weights = weights_sha256(zoo_path(args.model) if args.model == MODEL else Path(args.model))
    count = max(args.videos, args.judged)
    calls = inputs(count)
    what = [weights, args.device, calls[:1], DENSE, BLOCKS]
    what += [time.time_ns()] if args.fresh else []  # what older code has made is not looked at
    key = json.dumps(what, sort_keys=True)
    videos = _Videos(pipe, calls, args.out, key)
    plain, _ = videos.of(Recipe(()), count)
    study = Study(
        pipe, calls, seeds=[SEED + i for i in range(count)], timed=1,
        model={"name": args.model, "weights_sha256": weights},
    )  # fmt: skip
    protocol = protocol_of(study, plain, args).as_json()
    others = kept_figures(args, protocol) if args.only else {}
    wanted = [name for name in methods(args.judged_density, None) if args.only in name]
    budgets = foretold = None
    if any(CALIBRATED in name for name in wanted):
        budgets = calibrated(pipe, args.out, key)
        foretold = Budgets.load(budgets, pipe)
    rows = {}
    for density in args.densities:
        parts = density == args.judged_density
        for name, method in methods(density, budgets, parts).items():
            if args.only not in name:
                continue
            found = row(videos, method, plain, args.videos)
            if foretold is not None and isinstance(method, SubblockLSE) and method.artifact:
                found |= promised(method, foretold)
            rows[f"{name} @ {density:g}"] = found
            print(
                f"{name:34} {found['density']:.3f} {found['psnr']['estimate']:.2f} dB", flush=True
            )
    rows = renewed(others.get("rows", {}), rows)
    judged = verdicts(videos, plain, rows, args, budgets) if args.judged else {}
    judged = others.get("judged", {}) | judged
    content = {
        "environment": environment(args.device, load_before=before),
        "protocol": protocol,
        "model": args.model,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "videos": args.videos,
        "rows": rows,
        "judged": judged,
    }
    if args.model != MODEL:  # a trial on other weights is no result
        write_atomically(args.out / "trial.json", json.dumps(content, indent=1).encode())
        return
    write("sparse_quality", args.device, content)


def kept_figures(args: argparse.Namespace, protocol: dict[str, Any]) -> dict[str, Any]:
    """What is in the file. Raises ``ValueError`` where it was measured otherwise."""
    old = read("sparse_quality", args.device) or {}
    if old:
        require_machine(old["environment"], environment(args.device))
        if (old["protocol"]["sha256"], old["videos"]) != (protocol["sha256"], args.videos):
            raise ValueError("the rows in the file are of other videos; measure without --only")
    return old


def renewed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of before, but for those measured again, in their order; policies that are no more
    have none."""
    rows = old | new
    densities = sorted({label.rpartition(" @ ")[2] for label in rows}, key=float)
    labels = [f"{name} @ {asked}" for asked in densities for name in methods(float(asked), None)]
    return {label: rows[label] for label in labels if label in rows}


def promised(method: SubblockLSE, budgets: Budgets) -> dict[str, Any]:
    """What a calibration expects of a policy that shares out as it did."""
    if method.allocate not in (None, budgets.allocate):
        return {}
    found = budgets.at_density(method.density)
    return {"expected": found.quality, "expected_extremes": found.extremes}


def protocol_of(study: Study, plain: Tensor, args: argparse.Namespace) -> Any:
    """Of the study; the dense videos are there already."""
    from accel.measure import Pass

    study._passes[PLAIN] = Pass(plain, None, {}, 0, 0, 0)
    return study.protocol()


def calibrated(pipe: Any, out: Path, key: str) -> Any:
    """Budgets from other prompts and seeds than those that are compared."""
    name = hashlib.sha256((key + "budgets").encode()).hexdigest()[:16]
    settings = CalibrationSettings(blocks=BLOCKS, dense=DENSE[0], queries=20)
    calls = zoo_inputs("WanPipeline", CALIBRATION_SEED + CALIBRATION_VIDEOS, STEPS)
    calls = [{**x, "guidance_scale": GUIDANCE} for x in calls[-CALIBRATION_VIDEOS:]]
    artifact = SubblockLSE.calibrate(pipe, calls, settings, str(out / name))
    return artifact.save(out / f"{name}.safetensors")


def verdicts(
    videos: _Videos, plain: Tensor, rows: dict[str, Any], args: argparse.Namespace, budgets: Any
) -> dict[str, Any]:
    """The referee's figures of the default, the calibrated and the best static policy."""
    density = args.judged_density
    mean = {n: rows[f"{n} @ {density:g}"]["psnr"]["estimate"] for n in STATIC}
    best = max(mean, key=lambda name: mean[name])
    names = ("SubblockLSE", f"SubblockLSE, {CALIBRATED}", best, "control: random blocks")
    names = tuple(name for name in names if args.only in name)
    calls = videos.calls[: args.judged]
    referee = digits_referee(calls)
    assert referee is not None
    before = referee.judge(_bytes(plain[: args.judged]), calls)
    found = {}
    for name in names:
        method = methods(density, budgets)[name]
        samples, _ = videos.of(method, args.judged)
        after = referee.judge(_bytes(samples), calls)
        values = psnr(plain[: args.judged], samples).clamp(max=PSNR_CAP).tolist()
        found[f"{name} @ {density:g}"] = {
            "videos": args.judged,
            "psnr": bootstrap(values).as_json(),
            "judged": referee.compare(calls, before, after, None).as_json(),
        }
        print(name, found[f"{name} @ {density:g}"], flush=True)
    return found


def _bytes(samples: Tensor) -> np.ndarray:
    return (samples.movedim(-3, -1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


if __name__ == "__main__":
    main()
