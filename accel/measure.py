"""What an acceleration gains and costs: paired timing, counted work, memory, fidelity.

A speed is a ratio, measured in turn in one process: plain, accelerated, accelerated, plain, ...
Work is counted (floating-point operations, network evaluations), so it is exact and repeatable.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.artifact import inputs_digest, versions
from accel.method import Method, Recipe, attached
from accel.metrics.fidelity import SSIM_WINDOW, psnr, ssim
from accel.metrics.statistics import Interval, bootstrap

PSNR_CAP = 100.0  # dB; equal samples have infinite PSNR, which has no mean


@dataclass(frozen=True)
class PairedTime:
    """Seconds of ``a`` and ``b`` measured in turn; ``speedup`` > 1 means ``b`` is faster."""

    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]

    @property
    def speedup(self) -> Interval:
        """Median over rounds of a / b, with its bootstrap interval."""
        ratios = [a / b for a, b in zip(self.seconds_a, self.seconds_b, strict=True)]
        return bootstrap(ratios, np.median)


def paired_time(
    a: Callable[[], Any], b: Callable[[], Any], *, rounds: int = 7, warmup: int = 1
) -> PairedTime:
    """Time two callables in turn, in alternating order, after ``warmup`` rounds.

    Waits for the accelerator after every call, if there is one.
    """
    if rounds < 1:
        raise ValueError(f"paired_time: rounds = {rounds}, at least 1")
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for i in range(warmup + rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            elapsed = _timed((a, b)[which])
            if i >= warmup:
                seconds[which].append(elapsed)
    return PairedTime(tuple(seconds[0]), tuple(seconds[1]))


def _timed(fn: Callable[[], Any]) -> float:
    _synchronize()
    begin = time.perf_counter()
    fn()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counted_flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions that ``fn`` really runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fn()
    return int(counter.get_total_flops())


def peak_memory(fn: Callable[[], Any]) -> int | None:
    """Bytes that ``fn`` needs at most above what is there before: device memory, else resident.

    ``None`` where the operating system does not let a process reset its high-water mark.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        fn()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Comparison:
    """One recipe against the plain pipeline, on the same inputs and seeds."""

    time: PairedTime
    flops: tuple[int, int]
    peak_bytes: tuple[int | None, int | None]
    nfe: tuple[int, int]
    psnr: Interval
    ssim: Interval | None
    samples: int
    report: dict[str, Any]
    inputs_sha256: str

    def measured(self) -> dict[str, Any]:
        """The ``measured`` block of a recipe file, plain JSON."""
        return {
            "speedup": self.time.speedup.as_json(),
            "flops": list(self.flops),
            "nfe": list(self.nfe),
            "peak_bytes": list(self.peak_bytes),
            "psnr": self.psnr.as_json(),
            "ssim": self.ssim.as_json() if self.ssim else None,
            "samples": self.samples,
            "rounds": len(self.time.seconds_a),
            "inputs_sha256": self.inputs_sha256,
            **environment(),
        }


def compare(
    pipe: Any,
    method: Method,
    inputs: list[dict[str, Any]],
    *,
    seeds: Sequence[int] | None = None,
    rounds: int = 5,
) -> Comparison:
    """Measure ``method`` against the plain pipeline on ``inputs`` (pipeline-call arguments).

    Input i runs with a CPU generator of seed ``seeds[i]`` (its index by default). Samples are
    compared as values in [0, 1]; for SSIM, frames of a video count as images.

    Raises:
        ValueError: no inputs, not one seed for each, or what attaching raises.
    """
    seeds = range(len(inputs)) if seeds is None else seeds
    if not inputs or len(seeds) != len(inputs):
        raise ValueError(f"compare: {len(inputs)} inputs, {len(seeds)} seeds; wants some, paired")

    def plain() -> torch.Tensor:
        return torch.cat([_samples(pipe, x, s) for x, s in zip(inputs, seeds, strict=True)])

    reports: list[dict[str, Any]] = []

    def accelerated() -> torch.Tensor:
        with attached(method, pipe) as live:
            output = plain()
            reports.append(live.report())
        return output

    with attached(Recipe(()), pipe) as bare:
        reference = plain()
        nfe = sum(run["nfe"] for run in bare.report()["runs"])
    output = accelerated()
    flops = (counted_flops(plain), counted_flops(accelerated))
    peaks = (peak_memory(plain), peak_memory(accelerated))
    decibels = psnr(reference, output).clamp(max=PSNR_CAP).tolist()
    frames = [x.reshape(-1, *x.shape[-3:]) for x in (reference, output)]
    large = min(reference.shape[-2:]) >= SSIM_WINDOW
    return Comparison(
        time=paired_time(plain, accelerated, rounds=rounds),
        flops=flops,
        peak_bytes=peaks,
        nfe=(nfe, sum(run["nfe"] for run in reports[0]["runs"])),
        psnr=bootstrap(decibels),
        ssim=bootstrap(ssim(frames[0], frames[1]).tolist()) if large else None,
        samples=len(reference),
        report=reports[0],
        inputs_sha256=inputs_digest(inputs),
    )


def _samples(pipe: Any, arguments: dict[str, Any], seed: int) -> torch.Tensor:
    """Pipeline output in [0, 1]: (batch, channels, h, w) or (batch, frames, channels, h, w)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(**{**arguments, "generator": generator, "output_type": "np"}, return_dict=False)
    array = torch.as_tensor(np.asarray(output[0]))
    return array.movedim(-1, -3)  # channels last in numpy


def environment() -> dict[str, Any]:
    """Hardware, threads, versions, commit and date: what every figure is stored with."""
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def hardware() -> str:
    """The accelerator if there is one, else the processor with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
