"""Which exit a noise level can take: what leaving there does to the finished samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.measure import mean_psnr, pipeline_samples
from accel.method import Attached, Method, attached
from caches._drift import measure_drift
from caches._executor import LiveSchedule, Scheduled
from caches._exits import ExitHeads, LiveExit, Rest, as_schedule, exit_columns
from caches._gating import halved
from caches.schedule import Schedule, constant, noise_share, predicted_cost

if TYPE_CHECKING:
    from torch import Tensor

EXITS = 7  # at most
PROBES = 8  # noise levels at which a calibration leaves at each of them
TRIES = 9  # thresholds it then tries


# -- the maths --------------------------------------------------------------------------------


def spaced_exits(blocks: int, most: int = EXITS) -> tuple[int, ...]:
    """How many blocks run before each exit: at least one, not all, evenly spaced."""
    return tuple(sorted({round(x) for x in np.linspace(1, blocks - 1, min(most, blocks - 1))}))


def harm(answers: np.ndarray, at: Sequence[float], shares: Sequence[float]) -> np.ndarray:
    """What leaving does to the finished sample, (steps, exits), in a run over noise shares.

    answers: (probes, exits), by unit of a step's length, at the noise shares `at`, which fall;
    linear between them, constant beyond.
    """
    lengths = -np.diff([*shares, 0.0])
    columns = [np.interp(shares, at[::-1], column[::-1]) for column in answers.T]
    return np.stack(columns, axis=1) * lengths[:, None]


def chosen_depths(
    harms: np.ndarray, exits: Sequence[int], blocks: int, error: float
) -> tuple[int, ...]:
    """Blocks that run at each step: up to the first exit that does less harm than `error`."""
    good = harms < error
    first = np.where(good.any(1), good.argmax(1), len(exits))
    return tuple((*exits, blocks)[k] for k in first)


def chosen_depths_of_residuals(
    harms: np.ndarray, shares: Sequence[float], exits: Sequence[int], blocks: int, error: float
) -> tuple[int, ...]:
    """The same where harm grows with the distance, by unit of it, from the last full step.

    The first step is full.
    """
    depths = [blocks]
    for row, (_, share) in zip(harms[1:], itertools.pairwise(shares), strict=True):
        if depths[-1] == blocks:
            full = shares[len(depths) - 1]
        depths += chosen_depths(row[None] * (full - share), exits, blocks, error)
    return tuple(depths)


# -- on a pipeline ----------------------------------------------------------------------------


class Found(NamedTuple):
    """A calibrated schedule with the noise levels, exits and heads' tensors it is for."""

    schedule: Schedule
    grid: tuple[float, ...]
    exits: tuple[int, ...]
    tensors: dict[str, Tensor]


def calibrated(
    pipe: Any,
    inputs: list[dict[str, Any]],
    rest: Rest,
    trained: Artifact | None,
    asked: tuple[float | None, float | None],
) -> Found:
    """The schedule for what is asked: a quality or a speed, of which the other one is None."""
    with attached(_Probe(rest), pipe) as live:
        assert isinstance(live, LiveExit)
        trial = _Trial(pipe, inputs, live, trained)
        quality, speed = asked
        schedule = trial.as_fast(speed or 1.0) if quality is None else trial.as_good(quality)
    return Found(schedule, live.grid, trial.exits, trial.tensors)


@dataclass(frozen=True)
class _Probe(Scheduled, Method):
    """Exits while they are calibrated: the live state is given a schedule from outside."""

    rest: Rest = "skip"

    def neutral(self) -> Method:
        return self

    def columns(self, pipe: Any) -> tuple[str, ...]:
        return exit_columns(pipe)

    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        assert isinstance(live, LiveExit)
        live.grid = sigmas
        return live.trial or constant(live.columns, len(sigmas))

    def new_live(self, pipe: Any) -> Attached:
        return LiveExit(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveExit)
        super().build(pipe, live)
        live.rest = self.rest
        live.adopt_exits(pipe)


class _Trial:
    """One calibration: what the plain pipeline makes, and the harm of every exit."""

    def __init__(
        self, pipe: Any, inputs: list[dict[str, Any]], live: LiveExit, trained: Artifact | None
    ) -> None:
        self.pipe, self.inputs, self.live = pipe, inputs, live
        if len({x.get("num_inference_steps") for x in inputs}) != 1:
            raise ValueError("EarlyExit.calibrate wants inputs, all of the same number of steps")
        self.denoiser, *others = denoisers(pipe)
        self.blocks = live.blocks(self.denoiser.slot)
        if any(live.blocks(other.slot) != self.blocks for other in others):
            raise ValueError("EarlyExit.calibrate wants denoisers of equally many blocks")
        self.exits = spaced_exits(self.blocks)
        self.tensors = {}
        if trained is not None:
            trained.check_model(self.denoiser.module)
            self.exits = tuple(trained.settings["exits"])
            self.tensors = {k: v for k, v in trained.tensors.items() if k.startswith("heads.")}
            live.heads = ExitHeads.of(self.tensors, self.exits)
        self.plain = self.made()
        self.shares = noise_share(live.grid)
        self.harms = self._harms()

    def made(self) -> list[Any]:
        """Samples of all inputs."""
        return [pipeline_samples(self.pipe, x, i) for i, x in enumerate(self.inputs)]

    def _harms(self) -> np.ndarray:
        """Root mean square error of the finished samples for every step and exit (``harm``)."""
        steps, ages = len(self.shares), self.live.rest == "residual"
        lengths = -np.diff([*self.shares, 0.0])
        gaps = -np.diff([np.inf, *self.shares]) if ages else np.ones(steps)
        some = np.linspace(int(ages), steps - 1, PROBES).round().astype(int)
        probes = [s for s in dict.fromkeys(some.tolist()) if 0 < lengths[s] * gaps[s] < np.inf]
        if not probes:
            raise ValueError(f"EarlyExit.calibrate: {steps} steps leave none to exit early at")
        answers = [[self._error(s, d) / lengths[s] / gaps[s] for d in self.exits] for s in probes]
        return harm(np.array(answers), [self.shares[s] for s in probes], self.shares)

    def _error(self, step: int, depth: int) -> float:
        """Of the finished samples, where one step alone leaves at an exit."""
        depths = [self.blocks] * len(self.shares)
        depths[step] = depth
        self.live.trial = as_schedule(self.live.columns, depths)
        moved = [(a - b).square().mean() for a, b in zip(self.made(), self.plain, strict=True)]
        return float(sum(moved) / len(moved)) ** 0.5

    def schedule(self, error: float) -> Schedule:
        """The schedule of a threshold."""
        if self.live.rest == "residual":
            depths = chosen_depths_of_residuals(
                self.harms, self.shares, self.exits, self.blocks, error
            )
        else:
            depths = chosen_depths(self.harms, self.exits, self.blocks, error)
        return as_schedule(self.live.columns, depths)

    def as_good(self, quality: float) -> Schedule:
        """The boldest that keeps a fidelity."""

        def keeps(error: float) -> bool:
            self.live.trial = self.schedule(error)
            nearness = [mean_psnr(a, b) for a, b in zip(self.made(), self.plain, strict=True)]
            return sum(nearness) / len(nearness) >= quality

        return self._found(halved(keeps, TRIES)[0], f"{quality} dB")

    def as_fast(self, speed: float) -> Schedule:
        """The most careful of a predicted speed-up."""
        self.live.trial = None
        drift = measure_drift(self.pipe, self.inputs[0], self.live.columns)
        costs = (drift.seconds, drift.rest)
        full = predicted_cost(self.schedule(0.0), *costs)

        def is_slow(error: float) -> bool:
            return full / predicted_cost(self.schedule(error), *costs) < speed

        return self._found(halved(is_slow, TRIES)[1], f"{speed}x")

    def _found(self, error: float | None, asked: str) -> Schedule:
        schedule = self.schedule(error or 0.0)
        if schedule.is_neutral():
            raise ValueError(f"EarlyExit.calibrate: no exits give {asked}")
        return schedule
