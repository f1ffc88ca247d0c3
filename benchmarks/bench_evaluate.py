"""The evaluation itself, evaluated: does it agree with others, and what does it cost?

    python -m benchmarks.bench_evaluate [--vbench PYTHON --videos FOLDER]

Agreement with torchmetrics and prdc (where installed) on the same features, with closed forms of
Gaussians, and with the official code of VBench on the same files (an interpreter that has it, and a
folder of mp4 files; without them its last figure stays). Time and peak memory of 50,000 samples,
streamed and at once, each in a process of its own. Time of `accel evaluate fidelity` on
zoo:digits-dit as a user would call it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.measure import environment, load_average
from accel.metrics.distribution import frechet, kid
from accel.metrics.manifold import manifold
from accel.metrics.streaming import ClassSums, Moments, frechet_jackknife, frechet_of
from benchmarks.results_file import read, write

ROOT = Path(__file__).resolve().parents[1]
COUNT, PART = 50_000, 500
SIZES = (64, 2048)  # of digits-judge-b, of Inception
AGREEMENT = 2000  # samples
GROUPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vbench", help="an interpreter that can import vbench")
    parser.add_argument("--videos", type=Path, help="folder of mp4 files")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if (given.vbench is None) != (given.videos is None):
        parser.error("--vbench PYTHON and --videos FOLDER go together")
    if given.part:
        kind, size = given.part.split(":")
        print(json.dumps({"streamed": _streamed, "at_once": _at_once}[kind](int(size))))
        return
    load = load_average()
    torch.set_num_threads(1)
    agreement = [*_torchmetrics(), *_prdc(), *_gaussians()]
    agreement += _vbench(given.vbench, given.videos) if given.vbench else _kept_vbench()
    for row in agreement:
        print(row, flush=True)
    costs = [_in_process(kind, size) for size in SIZES for kind in ("streamed", "at_once")]
    whole = _whole_evaluation()
    block = environment("cpu", load)
    packages = {p: v for p in ("torchmetrics", "prdc") if (v := _version(p))}
    block = {**block, "versions": {**block["versions"], **packages}}
    write("evaluate", "cpu", {
        "environment": block, "protocol": None, "agreement": agreement, "samples": COUNT,
        "costs": costs, "whole": whole,
    })  # fmt: skip


# -- agreement -------------------------------------------------------------------------------


def _features(seed: int, n: int, d: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated, skewed features, as behind an activation."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(rng.normal(shift, scale, (n, d)) @ mix + 0.3, 0.0)


def _row(figure: str, of: str, ours: float, theirs: float) -> dict[str, Any]:
    difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
    return {"figure": figure, "of": of, "ours": ours, "theirs": theirs, "relative": difference}


class _Given(torch.nn.Module):
    """A feature extractor that returns what it is given."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _torchmetrics() -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
        from torchmetrics.image.kid import KernelInceptionDistance

        a, b = _features(0, AGREEMENT, 64), _features(1, AGREEMENT, 64, 1.2, 0.1)
        sides = [torch.from_numpy(x).float() for x in (a, b)]
        theirs: Any = FrechetInceptionDistance(feature=_Given(64)).set_dtype(torch.float64)
        whole: Any = KernelInceptionDistance(feature=_Given(64), subsets=1, subset_size=AGREEMENT)
        for metric, dtype in ((theirs, torch.float64), (whole, torch.float32)):
            for real, side in zip((True, False), sides, strict=True):
                metric.update(side.to(dtype), real=real)
        logits = sides[0][:, :10] * 3
        score: Any = InceptionScore(feature=_Given(10), splits=1)
        score.update(logits)
        of = "torchmetrics"
        ours = [x.numpy().astype(np.float64) for x in sides]
        return [
            _row("Frechet distance", of, frechet(*ours), float(theirs.compute())),
            _row("kernel distance", of, kid(*ours, subsets=None).mean, float(whole.compute()[0])),
            _row("inception score", of, ClassSums.of(logits.softmax(1)).score,
                 float(score.compute()[0])),
        ]  # fmt: skip


def _prdc() -> list[dict[str, Any]]:
    try:
        from prdc import compute_prdc
    except ImportError:
        return []
    samples, real = _features(2, 1000, 64, 0.9), _features(3, 1000, 64)
    ours = manifold(samples, real, k_precision=5, k_density=5)
    theirs = compute_prdc(real_features=real, fake_features=samples, nearest_k=5)
    return [
        _row(name, "prdc", float(getattr(ours, name).mean()), float(theirs[name]))
        for name in ("precision", "recall", "density", "coverage")
    ]


def _gaussians() -> list[dict[str, Any]]:
    """Sets whose mean and covariance are exactly given; two that commute, so the root is plain."""
    rng = np.random.default_rng(0)
    d, n = 64, 1000

    def exact(deviations: np.ndarray, mean: np.ndarray) -> np.ndarray:
        x = rng.normal(size=(n, d))
        x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)
        return x * deviations + mean

    one, two = rng.uniform(0.5, 2, (2, d))
    shift = rng.normal(size=d)
    a, b = exact(one, np.zeros(d)), exact(two, shift)
    expected = float((shift**2).sum() + ((one - two) ** 2).sum())
    parts = [[Moments.of(x) for x in np.array_split(y, 7)] for y in (a, b)]
    merged = frechet_of(*(_sum(p) for p in parts))
    of = "closed form"
    return [
        _row("Frechet distance", of, frechet(a, b), expected),
        _row("Frechet distance, streamed", of, merged, expected),
    ]


def _sum(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_OFFICIAL = """
import json, sys
from vbench.temporal_flickering import cal_score
print(json.dumps([cal_score(path) for path in sys.argv[1:]]))
"""


def _vbench(python: str, folder: Path) -> list[dict[str, Any]]:
    """The official function on mp4 files, and ours on the frames that are decoded from them."""
    from apps.evaluation.vbench.native import native
    from apps.render.media import decode_mp4

    files = sorted(folder.glob("*.mp4"))[:8]
    done = subprocess.run(
        [python, "-c", _OFFICIAL, *map(str, files)], capture_output=True, text=True
    )
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    ours = [native(decode_mp4(file))["temporal_flickering"] for file in files]
    name = f"temporal_flickering, mean of {len(files)} mp4 files"
    return [_row(name, "vbench 0.1.5", float(np.mean(ours)), float(np.mean(theirs)))]


def _kept_vbench() -> list[dict[str, Any]]:
    """The rows of an earlier run: the official code has an environment of its own."""
    old = read("evaluate") or {"agreement": []}
    return [row for row in old["agreement"] if row["of"].startswith("vbench")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- cost ------------------------------------------------------------------------------------


def _in_process(kind: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_evaluate", "--part", f"{kind}:{size}"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-500:])
    row = {"how": kind, "features": size, **json.loads(done.stdout.strip().splitlines()[-1])}
    print(row, flush=True)
    return row


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _batches(seed: int, size: int) -> Any:
    rng = np.random.default_rng(seed)
    for _ in range(COUNT // PART):
        yield rng.normal(0.1 * seed, 1.0, (PART, size)).astype(np.float32)


def _streamed(size: int) -> dict[str, Any]:
    """Two sets of 50,000 as a report takes them: moments of groups, then distance and interval."""
    before, started = _resident(), time.process_time()
    sets = []
    for seed in (0, 1):
        groups: list[Moments | None] = [None] * GROUPS
        for i, batch in enumerate(_batches(seed, size)):
            part, place = Moments.of(batch), i * GROUPS * PART // COUNT
            old = groups[place]
            groups[place] = part if old is None else old + part
        sets.append([g for g in groups if g is not None])
    found = frechet_jackknife(*sets)
    return _cost(started, before, found.estimate)


def _at_once(size: int) -> dict[str, Any]:
    """The same with all rows in memory."""
    before, started = _resident(), time.process_time()
    sets = [np.concatenate(list(_batches(seed, size))) for seed in (0, 1)]
    return _cost(started, before, frechet(*sets))


def _cost(started: float, before: float, distance: float) -> dict[str, Any]:
    return {
        "cpu_seconds": round(time.process_time() - started, 2),
        "peak_mb": round(_status("VmHWM") - before, 1),
        "frechet": float(f"{distance:.8g}"),
    }


def _resident() -> float:
    """Resident memory now, MB, from where its peak is counted anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) / 1024


def _whole_evaluation() -> dict[str, Any]:
    """`accel evaluate fidelity` with its defaults and one recipe, timed from outside."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report"
        command = [sys.executable, "-m", "apps.cli", "evaluate", "fidelity", "--model"]
        command += ["zoo:digits-dit", "--recipe", str(ROOT / "recipes" / "taylor.yaml")]
        command += ["--device", "cpu", "--out", str(out), "--progress", "none"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=_environment(), check=True, capture_output=True)
        seconds = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((out / "report.json").read_text("utf-8"))
        cpu = sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))
        return {
            "model": found["model"]["name"], "samples": found["samples"],
            "rounds": found["request"]["rounds"], "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "page_kb": round((out / "index.html").stat().st_size / 1e3),
        }  # fmt: skip


if __name__ == "__main__":
    main()
