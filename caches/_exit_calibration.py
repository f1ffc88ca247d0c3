"""Which exit a noise level can take: what leaving there does to the finished samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.method import Attached, Method, attached
from caches._drawn import drawn, fidelity
from caches._drift import best_steps, measure_drift
from caches._executor import LiveSchedule, Scheduled
from caches._exits import ExitHeads, LiveExit, Rest, as_schedule, exit_columns
from caches._gating import halved
from caches.schedule import Schedule, constant, noise_share, predicted_cost

if TYPE_CHECKING:
    from torch import Tensor

EXITS = 7  # at most
PROBES = 8  # noise levels at which a calibration leaves at each of them
TRIES = 9  # prices it then tries
NEVER = 1e6  # an age that no price is worth


# -- the maths --------------------------------------------------------------------------------


def spaced_exits(blocks: int, most: int = EXITS, first: int = 1) -> tuple[int, ...]:
    """How many blocks run before each exit: `first` or more, not all, evenly spaced."""
    count = min(most, blocks - first)
    return tuple(sorted({round(x) for x in np.linspace(first, blocks - 1, count)}))


def harm(answers: np.ndarray, at: Sequence[float], shares: Sequence[float]) -> np.ndarray:
    """What leaving does to the finished sample, (steps, exits), in a run over noise shares.

    answers: (probes, exits), by unit of a step's length, at the noise shares `at`, which fall;
    linear between them, constant beyond.
    """
    lengths = -np.diff([*shares, 0.0])
    columns = [np.interp(shares, at[::-1], column[::-1]) for column in answers.T]
    return np.stack(columns, axis=1) * lengths[:, None]


def chosen_depths(
    harms: np.ndarray, exits: Sequence[int], blocks: int, price: float
) -> tuple[int, ...]:
    """Blocks that run at each step: what costs least at a price of a block, in units of harm.

    Harms of several steps add up: they are of one sign. The deeper exit where two cost the same.
    """
    depths = np.array([blocks, *exits[::-1]])
    costs = np.hstack([0 * harms[:, :1], harms[:, ::-1]]) + price * depths
    return tuple(depths[costs.argmin(1)].tolist())


def aged(shares: Sequence[float], order: int) -> np.ndarray:
    """How much older what is kept gets, [a, b, s]: at step s, with a < b the last full steps.

    The error of what is repeated (order 0) grows with the distance, that of what is continued in a
    line (1) with the product of both distances. Nothing continues one point.
    """
    away = np.subtract.outer(shares, shares)  # [full step, step]
    if order == 0:
        return np.broadcast_to(away, (len(shares),) * 3)
    both = away[:, None] * away[None]
    both[np.arange(len(shares)), np.arange(len(shares))] = NEVER
    return both


def chosen_depths_of_kept(
    harms: np.ndarray, ages: np.ndarray, exits: Sequence[int], blocks: int, price: float
) -> tuple[int, ...]:
    """The same where what stands in is kept from full steps, and harm is by unit of `ages`.

    The first step is full, and of the others those that make it cheapest.
    """
    depths = np.array(exits[::-1])
    costs = harms[:, ::-1] * ages[..., None] + price * depths  # [a, b, step, exit]
    full = best_steps(costs.min(3), np.ones(len(harms)), price * blocks)
    found, last = [], [0, 0]
    for step in range(len(harms)):
        if step in full:
            last = [last[1] if step else 0, step]
        leaves = depths[costs[last[0], last[1], step].argmin()]
        found.append(blocks if step in full else int(leaves))
    return tuple(found)


# -- on a pipeline ----------------------------------------------------------------------------


class Found(NamedTuple):
    """A calibrated schedule with the noise levels, exits, heads' tensors and guidance it is for."""

    schedule: Schedule
    grid: tuple[float, ...]
    exits: tuple[int, ...]
    tensors: dict[str, Tensor]
    guided: bool | None


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
    return Found(schedule, live.grid, trial.exits, trial.tensors, live.guided)


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
        self.denoiser, *others = denoisers(pipe)
        self.blocks = live.blocks(self.denoiser.slot)
        if any(live.blocks(other.slot) != self.blocks for other in others):
            raise ValueError("EarlyExit.calibrate wants denoisers of equally many blocks")
        # with nothing in the place of all blocks nothing is left
        self.exits = spaced_exits(self.blocks, first=0 if live.points else 1)
        self.tensors = {}
        if trained is not None:
            trained.check_model(self.denoiser.module)
            self.exits = tuple(trained.settings["exits"])
            self.tensors = {k: v for k, v in trained.tensors.items() if k.startswith("heads.")}
            live.heads = ExitHeads.of(self.tensors, self.exits)
        self.plain = drawn(pipe, inputs)
        self.shares = noise_share(live.grid)
        self.harms = self._harms()

    def _harms(self) -> np.ndarray:
        """Root mean square error of the finished samples for every step and exit (``harm``)."""
        steps, first = len(self.shares), self.live.points
        lengths = -np.diff([*self.shares, 0.0])
        some = np.linspace(min(first, steps - 1), steps - 1, PROBES).round().astype(int)
        units = {s: lengths[s] * self._age(s) for s in some.tolist() if s >= first}
        probes = [s for s, unit in units.items() if unit > 0]
        if not probes:
            raise ValueError(f"EarlyExit.calibrate: {steps} steps leave none to exit early at")
        answers = [[self._error(s, d) / units[s] for d in self.exits] for s in probes]
        return harm(np.array(answers), [self.shares[s] for s in probes], self.shares)

    def _age(self, step: int) -> float:
        """Of what stands in at a step behind full ones."""
        if not self.live.points:
            return 1.0
        return float(aged(self.shares, self.live.points - 1)[step - 2, step - 1, step])

    def _error(self, step: int, depth: int) -> float:
        """Of the finished samples, where one step alone leaves at an exit."""
        depths = [self.blocks] * len(self.shares)
        depths[step] = depth
        self.live.trial = as_schedule(self.live.columns, depths)
        made = drawn(self.pipe, self.inputs)
        moved = [(a - b).square().mean() for a, b in zip(made, self.plain, strict=True)]
        return float(sum(moved) / len(moved)) ** 0.5

    def schedule(self, price: float) -> Schedule:
        """The schedule of a price of a block."""
        rest = (self.exits, self.blocks, price)
        if self.live.points:
            ages = aged(self.shares, self.live.points - 1)
            depths = chosen_depths_of_kept(self.harms, ages, *rest)
        else:
            depths = chosen_depths(self.harms, *rest)
        return as_schedule(self.live.columns, depths)

    def as_good(self, quality: float) -> Schedule:
        """The boldest that keeps a fidelity."""

        def keeps(price: float) -> bool:
            self.live.trial = self.schedule(price)
            return fidelity(drawn(self.pipe, self.inputs), self.plain) >= quality

        return self._found(halved(keeps, TRIES)[0], f"{quality} dB")

    def as_fast(self, speed: float) -> Schedule:
        """The most careful of a predicted speed-up."""
        self.live.trial = None
        drift = measure_drift(self.pipe, self.inputs[0], self.live.columns)
        costs = (drift.seconds, drift.rest)
        full = predicted_cost(self.schedule(0.0), *costs)

        def is_slow(price: float) -> bool:
            return full / predicted_cost(self.schedule(price), *costs) < speed

        return self._found(halved(is_slow, TRIES)[1], f"{speed}x")

    def _found(self, price: float | None, asked: str) -> Schedule:
        schedule = self.schedule(price or 0.0)
        if schedule.is_neutral():
            raise ValueError(f"EarlyExit.calibrate: no exits give {asked}")
        return schedule
