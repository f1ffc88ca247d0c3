"""Time-Shift Sampler (Li et al. 2024, "Alleviating Exposure Bias in Diffusion Models through
Sampling with Shifted Time Steps", arXiv:2305.15583) as stock-looking schedulers.

A sample whose variance is that of another time than the grid's is treated as if it were at that
time. Variance tells time only while noise is most of the sample, and only where the data's own
variance v0 is not that of the noise: pixels (v0 about 0.25), not latents scaled to unit variance.

``pipe.scheduler = TimeShiftDDIMScheduler.from_config(pipe.scheduler.config, window=40)``

The paper and its two official codes shift different things at different moments. All are here:

| variant  | variance of       | searched around | what is shifted                                 |
| -------- | ----------------- | --------------- | ----------------------------------------------- |
| paper    | the step's result | the next time   | what the network is told, and the next step     |
| pnm      | the step's input  | the next time   | where the step goes; forgotten after it         |
| adm      | the step's input  | the same time   | where the step goes, by a stride of its own     |
| constant | nothing           |                 | as "paper", always by half a window: a control  |

``samplers.shifted_sigmas`` has the schedulers with tables of sigmas, and one more variant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module of a foreign scheduler.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from diffusers.utils import BaseOutput
from torch import Tensor

from samplers.extension import Extension

VARIANTS = ("paper", "pnm", "adm", "constant")
RETIMED = ("paper", "constant")  # variants that tell the network another time
VARIANCE_MODELS = ("noise", "signal")
MAX_V0 = 0.8  # variance changes by a fifth, from noise to data
# Settings of every scheduler here, beside those of the stock class it extends.
SETTINGS: dict[str, Any] = {
    "window": 0,  # timesteps, both sides together; 0: the stock scheduler
    "cutoff": 200,  # no shift to times up to this
    "variant": "paper",
    "variance_model": "noise",  # of x_t: 1 - abar; "signal": abar v0 + 1 - abar
    "v0": None,  # mean variance of one clean sample; for "signal"
    "per_sample": False,  # one decision for each sample, not for the batch
}


class Move(NamedTuple):
    """From one noise level to another, in one step of the scheduler or several.

    first, last: indices of its steps; source, target: times. A target below zero is clean.
    """

    first: int
    last: int
    source: int
    target: int


class Levels:
    """Stands for a scheduler's `alphas_cumprod` during one step: other levels at some times."""

    def __init__(self, table: Tensor, other: dict[int, Tensor]):
        self.table, self.other = table, other

    def __getitem__(self, time: int | Tensor) -> Tensor:
        level = self.other.get(int(time))
        return self.table[time] if level is None else level


def _signed_as(stock: Callable, ours: Callable) -> Callable:
    """`ours` as a method with the signature of `stock`."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return method


class ShiftedTime(Extension):
    """Mixin before a stock scheduler whose step reads its noise levels from `alphas_cumprod`.

    Settings as in `SETTINGS`. Unless `per_sample`, the batch shifts together by its mean variance.
    Where the network is told another time (`RETIMED`), pipelines learn it from `timesteps`, which
    holds one for all; with `per_sample` somebody has to read `conditioning` in their place, and say
    so by setting `reads_conditioning`.

    Raises ValueError for settings out of range.
    """

    config: Any
    timesteps: Tensor
    alphas_cumprod: Any
    settings = SETTINGS
    variants: tuple[str, ...] = VARIANTS  # that make sense for the stock scheduler
    max_v0 = MAX_V0
    conditioning: Tensor | None = None  # times (n,) that the next network call should be told
    reads_conditioning = False
    shifts: int | Tensor = 0  # steps of this run at other times than the grid's; on the device
    _grid: Sequence[int] = ()

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings (all of them) that are out of range."""

        def refuse(name: str, remedy: str) -> None:
            raise ValueError(f"{cls.__name__}: {name} = {settings[name]!r}; {remedy}")

        if settings["window"] < 0 or settings["window"] == 1:
            refuse("window", "0 (off) or a number of timesteps, 2 or more: half of them on a side")
        if settings["variant"] not in cls.variants:
            refuse("variant", f"one of {', '.join(cls.variants)}")
        if settings["variance_model"] not in VARIANCE_MODELS:
            refuse("variance_model", f"one of {', '.join(VARIANCE_MODELS)}")
        if settings["variant"] == "adm" and settings["variance_model"] != "noise":
            refuse("variance_model", "variant 'adm' has its own table of variances, without v0")
        if not 2 <= settings.get("history", 4) <= 4:
            refuse("history", "2, 3 or 4")
        v0 = settings["v0"]
        if settings["variance_model"] == "signal" and not (
            v0 is not None and 0 <= v0 <= cls.max_v0
        ):
            refuse(
                "v0",
                f"the variance of a clean sample, at most {cls.max_v0}: nearer to 1, that of "
                "noise, variance does not tell time",
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Pipelines read the signatures of both: what they do not name is not passed."""
        super().__init_subclass__(**kwargs)
        if not cls.joins_stock():
            return
        for name, ours in (("set_timesteps", cls._set_timesteps), ("step", cls._step)):
            stock = getattr(super(), name)
            setattr(cls, name, _signed_as(stock, ours))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the stock scheduler's; forgets the run before."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._grid = self.timesteps.tolist()
        moves = [self._move(at) for at in range(len(self._grid))]
        tells = self._retimes or any(move.last > move.first > 0 for move in moves)
        if self.config.window and self.config.per_sample and tells and not self.reads_conditioning:
            raise ValueError(
                f"{type(self).__name__}: with per_sample the network has to be told a time for "
                "each sample, which no pipeline does by itself; leave it off"
            )
        self._at = -1  # index into the grid; found at the first step
        self._start: Tensor | None = None  # time from which the next move starts
        self._inside: dict[int, Tensor] = {}  # times of this move, by those of the grid
        self.conditioning, self.shifts = None, 0

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        """As the stock scheduler's, with shifted times."""
        if not self.config.window:
            return super().step(model_output, timestep, sample, *args, **kwargs)  # type: ignore[misc]
        if not self._grid:
            raise ValueError(f"{type(self).__name__} has no grid yet; call set_timesteps first")
        first = self._at < 0
        at = self._advance(timestep)
        self.timesteps[at] = self._grid[at]  # as it was before it was shifted
        move = self._move(at)
        if at == move.first and not self._retimes and not first:
            self._inside = self._to_destination(move, sample)
        times = dict(self._inside) if self._start is None else {move.source: self._start}
        if times:
            moved = torch.stack([(to != time).any() for time, to in times.items()])
            self.shifts = self.shifts + moved.any()
        kind = sample.dtype
        wide = any(time.ndim for time in times.values())  # else stays in the sample's precision
        if wide:
            model_output, sample = model_output.float(), sample.float()
        with self._levels({time: self._level(to, sample) for time, to in times.items()}):
            out = super().step(model_output, self._grid[at], sample, *args, **kwargs)  # type: ignore[misc]
        self._tell_next(move, out[0])
        return _in_precision(out, kind)  # also where a solver remembers wide outputs

    def _advance(self, timestep: Any) -> int:
        """Goes on to the next step. Raises ValueError off the grid and behind its end."""
        at = self._at + 1 if self._at >= 0 else self._first_step(timestep)
        if at == len(self._grid):
            raise ValueError(f"{type(self).__name__} is at its grid's end; call set_timesteps")
        self._at = at
        return at

    def _first_step(self, timestep: Any) -> int:
        """Where in the grid a run begins."""
        if float(timestep) not in self._grid:
            raise ValueError(f"{float(timestep):g} is no time of the grid {list(self._grid)}")
        return self._grid.index(float(timestep))  # type: ignore[arg-type]

    def _move(self, at: int) -> Move:
        """The move between two noise levels that step `at` belongs to."""
        raise NotImplementedError

    @property
    def _retimes(self) -> bool:
        return self.config.variant in RETIMED

    @contextmanager
    def _levels(self, other: dict[int, Tensor]) -> Iterator[None]:
        table = self.alphas_cumprod
        self.alphas_cumprod = Levels(table, other) if other else table
        try:
            yield
        finally:
            self.alphas_cumprod = table

    def _to_destination(self, move: Move, sample: Tensor) -> dict[int, Tensor]:
        """Times of a move from `sample` to where it should arrive; none: as the grid says.

        A window wider than two strides would let it arrive where it is noisier; it stays then.
        """
        adm = self.config.variant == "adm"
        centre = move.source if adm else move.target
        if move.target < 0 or centre <= self.config.cutoff:
            return {}
        end = self._nearest(sample, centre)
        if adm:  # the official stride, a little longer than the grid's
            end = end - len(self.alphas_cumprod) // max(len(self._grid) - 1, 1)
        end = end.clamp(0, move.source)
        between = self._grid[move.first + 1 : move.last]
        return dict.fromkeys(between, (move.source + end) // 2) | {move.target: end}

    def _tell_next(self, move: Move, result: Tensor) -> None:
        """Moves the time of the next step, of which `result` is the input."""
        after, told = self._at + 1, None
        if self._at == move.last:
            self._start, self._inside = None, {}
            ends = after == len(self._grid)
            if self._retimes and not ends and self._grid[after] > self.config.cutoff:
                # at its target at the lowest: from below it would have to go up
                lowest = self._move(after).target
                told = self._start = self._nearest(result, self._grid[after]).clamp(min=lowest)
        else:
            told = self._inside.get(self._grid[after])
        self.conditioning = told if told is not None and told.ndim else None
        if told is not None and not told.ndim:
            self.timesteps[after] = told

    def _nearest(self, sample: Tensor, centre: float) -> Tensor:
        """Times in the window whose variance is nearest: (n,), or () for the batch."""
        middle, half = round(centre), self.config.window // 2
        low, high = max(middle - half, 0), min(middle + half, len(self.alphas_cumprod) - 1)
        if self.config.variant == "constant":
            picked = torch.full((len(sample),), high, device=sample.device)
            return picked if self.config.get("per_sample") else picked[0]
        expected = self._expected()[low : high + 1].to(sample.device)
        return low + (self._variance(sample)[..., None] - expected).abs().argmin(dim=-1)

    def _variance(self, sample: Tensor) -> Tensor:
        """Unbiased, of each sample over all its numbers: (n,), or their mean ()."""
        variance = sample.flatten(1).float().var(dim=1)
        return variance if self.config.get("per_sample") else variance.mean()

    def _expected(self) -> Tensor:
        """Variance of a sample at each time, (T,)."""
        alphas = self.alphas_cumprod
        if self.config.variant == "adm":  # 1 - abar of a schedule that were symmetric, as cosine is
            return alphas.flip(0)
        signal = self.config.v0 if self.config.variance_model == "signal" else 0.0
        return alphas * signal + 1 - alphas

    def _level(self, times: Tensor, sample: Tensor) -> Tensor:
        """abar at `times`, (n, 1, 1, ..) or ()."""
        level = self.alphas_cumprod.to(sample.device)[times]
        return level.view(-1, *[1] * (sample.ndim - 1)) if times.ndim else level


class TimeShiftDDIMScheduler(ShiftedTime, DDIMScheduler):
    """`DDIMScheduler` with shifted time; with ``eta=1`` what the official code calls DDPM."""

    def _move(self, at: int) -> Move:
        time = self._grid[at]
        return Move(at, at, time, time - stride_of(self))


class TimeShiftDDPMScheduler(ShiftedTime, DDPMScheduler):
    """`DDPMScheduler` with shifted time."""

    def previous_timestep(self, timestep: Any) -> Any:
        """As the stock scheduler's, from the grid before any shift."""
        if not self.config.window:
            return super().previous_timestep(timestep)
        return self._move(self._grid.index(int(timestep))).target

    def _move(self, at: int) -> Move:
        return Move(at, at, self._grid[at], self._grid[at + 1] if at + 1 < len(self._grid) else -1)


class TimeShiftPNDMScheduler(ShiftedTime, PNDMScheduler):
    """`PNDMScheduler` (Liu et al. 2022) with shifted time: F-PNDM, and S-PNDM with ``history=2``.

    F-PNDM starts with three moves of four network calls; S-PNDM (``skip_prk_steps=True``) with one
    of two. One shift for each move: the calls between two levels are at the times of the grid.
    """

    settings = SETTINGS | {"history": 4}  # network outputs that a move is made from, 2 to 4

    def step_plms(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock scheduler's, with as many outputs as `history` says."""
        if self.counter != 1:  # then it would add none
            self.ets = self.ets[1 - self.config.history :]
        return super().step_plms(*args, **kwargs)

    def _first_step(self, timestep: Any) -> int:
        """Raises ValueError inside the grid: the stock scheduler takes any first step for the
        grid's first, and is a level ahead of its samples from the second on."""
        if int(timestep) != self._grid[0]:
            raise ValueError(
                f"{type(self).__name__} counts its moves from the first time of its grid "
                f"({self._grid[0]}), and is begun at {int(timestep)}; for image to image use "
                "TimeShiftDDIMScheduler"
            )
        return 0

    def _move(self, at: int) -> Move:
        time, stride = self._grid[at], stride_of(self)
        if at < len(self.prk_timesteps):  # type: ignore[arg-type]
            first = at // 4 * 4
            return Move(first, first + 3, self._grid[first], self._grid[first] - stride)
        if at < 2 and self.config.skip_prk_steps:
            return Move(0, 1, self._grid[0], self._grid[0] - stride)
        return Move(at, at, time, time - stride)


SCHEDULERS = (TimeShiftDDIMScheduler, TimeShiftDDPMScheduler, TimeShiftPNDMScheduler)


def stride_of(scheduler: Any) -> int:
    """Timesteps between two levels of the stock DDIM and PNDM, whatever their spacing."""
    return scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def _in_precision(out: Any, kind: torch.dtype) -> Any:
    """A step's output with its tensors in another precision."""
    if isinstance(out, BaseOutput):
        return type(out)(**{name: value.to(kind) for name, value in out.items()})
    return tuple(part.to(kind) for part in out)
