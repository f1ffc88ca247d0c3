"""What an acceleration gains and costs: paired timing, counted work, memory, quality.

A speed is a ratio, measured in turn in one process: plain, accelerated, accelerated, plain, ...
Work is counted (floating-point operations, network evaluations, bytes of tensors), so it is exact
and repeatable. Quality is paired: same inputs, same seeds. Whether an output is right is judged by
a ``Referee``, a value from outside.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from accel.artifact import Fingerprint, inputs_digest
from accel.counting import counted_flops, peak_memory, synchronize
from accel.denoiser import denoisers
from accel.device import seeded_rng
from accel.environment import environment, hardware, load_average
from accel.method import Method, Recipe, attached, live_on, require_detached
from accel.metrics.fidelity import SSIM_WINDOW, feature_distance, psnr, ssim
from accel.metrics.protocol import Protocol
from accel.metrics.statistics import Interval, bootstrap
from accel.referee import Inputs, Judged, Referee, Verdict

__all__ = [
    "PLAIN", "Comparison", "Judged", "PairedTime", "Pass", "Referee", "Study", "Verdict", "compare",
    "counted_flops", "environment", "hardware", "load_average", "mean_psnr", "paired_time",
    "peak_memory", "pipeline_samples",
]  # fmt: skip

# What pipelines raise for arguments they cannot take; a ValueError of theirs says it in words.
CALL_ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError)
PSNR_CAP = 100.0  # dB; equal samples have infinite PSNR, which has no mean

Around = Callable[[], AbstractContextManager[Any]]


# -- time ------------------------------------------------------------------------------------


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
    a: Callable[[], Any],
    b: Callable[[], Any],
    *,
    rounds: int = 7,
    warmup: int = 1,
    around: tuple[Around, Around] = (nullcontext, nullcontext),
) -> PairedTime:
    """Time two callables in turn, in alternating order, after ``warmup`` rounds.

    Waits for the accelerator after every call, if there is one. Each call runs inside a context of
    its own, made by ``around``: entering and leaving it is not timed.
    """
    if rounds < 1:
        raise ValueError(f"paired_time: rounds = {rounds}, at least 1")
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(warmup + rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            with around[which]():
                elapsed = _timed((a, b)[which])
            if i >= warmup:
                seconds[which].append(elapsed)
    return PairedTime(tuple(seconds[0]), tuple(seconds[1]))


def _timed(fn: Callable[[], Any]) -> float:
    synchronize()
    begin = time.perf_counter()
    fn()
    synchronize()
    return time.perf_counter() - begin


# -- one recipe against another --------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """All inputs through a pipeline once: samples in [0, 1], (n, c, h, w) or (n, f, c, h, w).

    ``flops``, ``nfe`` and ``peak_bytes`` are of the timed inputs.
    """

    samples: torch.Tensor
    verdict: Verdict | None
    report: dict[str, Any]
    flops: int
    nfe: int
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """One recipe against another (or none), on the same inputs and seeds.

    ``per_sample`` has "psnr", "ssim" and, where there is a referee, "right" (of the accelerated
    side) and "feature_distance", for paired tests between recipes of the same protocol.
    """

    time: PairedTime
    flops: tuple[int, int]
    peak_bytes: tuple[int, int]
    nfe: tuple[int, int]
    psnr: Interval
    ssim: Interval | None
    judged: Judged | None
    per_sample: dict[str, list[float]]
    samples: int
    report: dict[str, Any]
    protocol: Protocol
    environment: dict[str, Any]

    def measured(self) -> dict[str, Any]:
        """The ``measured`` block of a recipe file, plain JSON."""
        return {
            "speedup": self.time.speedup.as_json(),
            "flops": list(self.flops),
            "nfe": list(self.nfe),
            "peak_bytes": list(self.peak_bytes),
            "psnr": self.psnr.as_json(),
            "ssim": self.ssim.as_json() if self.ssim else None,
            "judged": self.judged.as_json() if self.judged else None,
            "samples": self.samples,
            "rounds": len(self.time.seconds_a),
            "protocol": self.protocol.as_json(),
            "environment": self.environment,
        }


PLAIN = Recipe(())


class Study:
    """A pipeline with inputs and seeds. What was run once, such as the plain pipeline, is kept."""

    def __init__(
        self,
        pipe: Any,
        inputs: Inputs,
        *,
        seeds: Sequence[int] | None = None,
        timed: int | None = None,
        referee: Referee | None = None,
        model: Any = None,
    ) -> None:
        """Input i runs with a CPU generator of seed ``seeds[i]`` (its index by default).

        Args:
            inputs: pipeline-call arguments.
            timed: how many of the first inputs are timed and counted; all by default.
            model: the pipeline's name and revision as plain JSON; what it consists of by default.

        Raises:
            ValueError: no inputs, not one seed for each, not so many to time, or a pipeline under
                a method, which is not the plain one.
        """
        require_detached(pipe, "measuring")
        self.seeds = list(range(len(inputs)) if seeds is None else seeds)
        if not inputs or len(self.seeds) != len(inputs):
            raise ValueError(
                f"Study: {len(inputs)} inputs, {len(self.seeds)} seeds; wants some, paired"
            )
        self.timed = len(inputs) if timed is None else timed
        if not 1 <= self.timed <= len(inputs):
            raise ValueError(f"Study: timed = {timed} of {len(inputs)} inputs")
        self.pipe, self.inputs, self.referee = pipe, list(inputs), referee
        self.model = _model_record(pipe) if model is None else model
        self._passes: dict[Method, Pass] = {}
        self._load = load_average()

    def run(self, method: Method = PLAIN) -> Pass:
        """Run all inputs with ``method``, and count the timed ones; done once for each method.

        Raises:
            ValueError: what attaching raises; a call that fails, or comes out as NaN.
        """
        if method not in self._passes:
            self._passes[method] = self._run(method)
        return self._passes[method]

    def _run(self, method: Method) -> Pass:
        timed = self._timed_run(method)
        with attached(method, self.pipe) as live:
            samples = self._outputs(len(self.inputs), method.call_changes())
            if not samples.isfinite().all():
                raise ValueError(f"{_as_attached(self.pipe)} makes outputs that are not finite")
        report = live.report()  # detached, so that calls which end before their grid have ended
        with attached(method, self.pipe) as live:
            flops = counted_flops(timed)
        nfe = live.report()["nfe"]
        with attached(method, self.pipe):
            peak = peak_memory(timed, self.pipe.device.type)
        verdict = None
        if self.referee is not None:
            verdict = self.referee.judge(_as_bytes(samples), self.inputs)
        return Pass(samples, verdict, report, flops, nfe, peak)

    def paired_time(self, a: Method, b: Method, *, rounds: int = 5) -> PairedTime:
        """Time the timed inputs under two methods in turn; attaching them is not timed."""
        around = tuple(lambda m=m: attached(m, self.pipe) for m in (a, b))
        runs = self._timed_run(a), self._timed_run(b)
        return paired_time(*runs, rounds=rounds, around=(around[0], around[1]))

    def compare(self, method: Method, base: Method = PLAIN, *, rounds: int = 5) -> Comparison:
        """``method`` against ``base``, the plain pipeline by default."""
        with attached(method, self.pipe):
            pass  # what can not be attached is told before anything is measured
        before, after = self.run(base), self.run(method)
        values = _paired_values(before, after)
        return Comparison(
            time=self.paired_time(base, method, rounds=rounds),
            flops=(before.flops, after.flops),
            peak_bytes=(before.peak_bytes, after.peak_bytes),
            nfe=(before.nfe, after.nfe),
            psnr=bootstrap(values["psnr"]),
            ssim=bootstrap(values["ssim"]) if "ssim" in values else None,
            judged=self._judged(before, after, values),
            per_sample={k: [round(x, 4) for x in v] for k, v in values.items()},
            samples=len(before.samples),
            report=after.report,
            protocol=self.protocol(),
            environment=environment(self.pipe.device.type, load_before=self._load),
        )

    def _judged(self, before: Pass, after: Pass, values: dict[str, list[float]]) -> Judged | None:
        if self.referee is None or before.verdict is None or after.verdict is None:
            return None
        distance = values.get("feature_distance")
        return self.referee.compare(self.inputs, before.verdict, after.verdict, distance)

    def protocol(self) -> Protocol:
        """How everything here is evaluated."""
        scheduler = self.pipe.scheduler
        first = self.run().samples
        return Protocol(
            model=self.model,
            inputs={"sha256": inputs_digest(self.inputs), "calls": len(self.inputs)},
            samples=len(first),
            seeds=self.seeds,
            steps=self._common("num_inference_steps"),
            guidance=self._common("guidance_scale"),
            scheduler=type(scheduler).__name__,
            features=self.referee.name if self.referee else None,
            features_sha256=self.referee.sha256 if self.referee else None,
            size=[*first.shape[1:-3], *first.shape[-2:]],
            quantise="round(255 x) before the referee, none before psnr and ssim",
            more={"timed_calls": self.timed, "dtype": str(self.pipe.dtype)},
        )

    def _common(self, argument: str) -> Any:
        """The value of a call argument where all inputs agree, else ``None``."""
        values = [x.get(argument) for x in self.inputs]
        return values[0] if all(v == values[0] for v in values) else None

    def _timed_run(self, method: Method) -> Callable[[], torch.Tensor]:
        changes = method.call_changes()  # once: it may read a file
        return lambda: self._outputs(self.timed, changes)

    def _outputs(self, count: int, changes: dict[str, Any]) -> torch.Tensor:
        """Of the first calls, with what the attached method changes in them."""
        pairs = zip(self.inputs[:count], self.seeds[:count], strict=True)
        samples: list[torch.Tensor] = []
        for i, (arguments, seed) in enumerate(pairs):
            samples.append(pipeline_samples(self.pipe, {**arguments, **changes}, seed))
            size, first = (list(s.shape[1:]) for s in (samples[i], samples[0]))
            if size != first:
                raise ValueError(
                    f"Study: input {i} makes samples of {size}, input 0 of {first}; measure inputs "
                    "of one size together"
                )
        return torch.cat(samples)


def compare(
    pipe: Any,
    method: Method,
    inputs: Inputs,
    *,
    seeds: Sequence[int] | None = None,
    rounds: int = 5,
) -> Comparison:
    """Measure ``method`` against the plain pipeline on ``inputs``; see ``Study``."""
    return Study(pipe, inputs, seeds=seeds).compare(method, rounds=rounds)


def _paired_values(before: Pass, after: Pass) -> dict[str, list[float]]:
    """One number a sample and measure; SSIM only where its window fits (a video's is the mean)."""
    a, b = before.samples, after.samples
    values = {"psnr": psnr(a, b).clamp(max=PSNR_CAP).tolist()}
    if min(a.shape[-2:]) >= SSIM_WINDOW:
        frames = [x.reshape(-1, *x.shape[-3:]) for x in (a, b)]
        values["ssim"] = ssim(*frames).reshape(len(a), -1).mean(1).tolist()
    if before.verdict is not None and after.verdict is not None:
        values["right"] = after.verdict.right.astype(float).tolist()
        if len(a) > 1:
            features = [torch.from_numpy(v.features) for v in (after.verdict, before.verdict)]
            values["feature_distance"] = feature_distance(*features).tolist()
    return values


def pipeline_samples(pipe: Any, arguments: dict[str, Any], seed: int) -> torch.Tensor:
    """What one call returns, in [0, 1]: (batch, channels, h, w), of videos (batch, frames, ...).

    Noise comes from a CPU generator of this seed, and from global ones that begin with it.

    Raises:
        ValueError: the pipeline cannot be called so; with the arguments, and what it raised.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    call = {**arguments, "generator": generator, "output_type": "np", "return_dict": False}
    try:
        with seeded_rng(seed):
            output = pipe(**call)
    except CALL_ERRORS as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{_as_attached(pipe)} failed on {reprlib.repr(arguments)}: {told}"
        ) from error
    array = torch.as_tensor(np.asarray(output[0]))
    return array.movedim(-1, -3)  # channels last in numpy


def _as_attached(pipe: Any) -> str:
    names = [live.method.name() for live in live_on(pipe) if not isinstance(live.method, Recipe)]
    return f"{type(pipe).__name__} under {' + '.join(names)}" if names else type(pipe).__name__


def mean_psnr(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples in dB; equal samples count with the cap."""
    return float(psnr(samples, reference).clamp(max=PSNR_CAP).mean())


def _as_bytes(samples: torch.Tensor) -> np.ndarray:
    """(..., c, h, w) in [0, 1] -> (..., h, w, c) uint8."""
    return (samples.movedim(-3, -1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _model_record(pipe: Any) -> dict[str, str]:
    prints = [asdict(Fingerprint.of(d.module)) for d in denoisers(pipe)]
    text = json.dumps(prints, sort_keys=True)
    return {
        "pipeline": type(pipe).__name__,
        "fingerprint_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
