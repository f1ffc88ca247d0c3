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
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

VARIANTS = ("paper", "pnm", "adm", "constant")
RETIMED = ("paper", "constant")  # variants that tell the network another time
VARIANCE_MODELS = ("noise", "signal")
# Settings of every scheduler here, beside those of the stock class it extends.
SETTINGS: dict[str, Any] = {
    "window": 0,  # timesteps, both sides together; 0: the stock scheduler
    "cutoff": 200,  # no shift to times up to this
    "variant": "paper",
    "variance_model": "noise",  # of x_t: 1 - abar; "signal": abar v0 + 1 - abar
    "v0": None,  # mean variance of one clean sample; for "signal"
    "per_sample": False,  # one decision for each sample, not for the batch
}


class Levels:
    """Stands for a scheduler's `alphas_cumprod` during one step: other levels at some times."""

    def __init__(self, table: Tensor, other: dict[int, Tensor]):
        self.table, self.other = table, other

    def __getitem__(self, time: int | Tensor) -> Tensor:
        level = self.other.get(int(time))
        return self.table[time] if level is None else level


def _with_settings(stock: Any) -> Any:
    """`stock`, the __init__ of a scheduler, with `SETTINGS` as further parameters.

    The whole signature is spelled out: diffusers carries over only settings that it finds there.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = SETTINGS | {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        _check(type(self).__name__, ours)
        stock(self, *args, **kwargs)

    known = inspect.signature(stock).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [
        inspect.Parameter(name, keyword, default=default)
        for name, default in SETTINGS.items()
        if name not in known
    ]
    __init__.__signature__ = inspect.Signature([*known.values(), *ours])  # type: ignore[attr-defined]
    return __init__


def _check(owner: str, settings: dict[str, Any]) -> None:
    def refuse(name: str, remedy: str) -> None:
        raise ValueError(f"{owner}: {name} = {settings[name]!r}; {remedy}")

    if settings["window"] < 0:
        refuse("window", "0 (off) or a number of timesteps")
    if settings["variant"] not in VARIANTS:
        refuse("variant", f"one of {', '.join(VARIANTS)}")
    if settings["variance_model"] not in VARIANCE_MODELS:
        refuse("variance_model", f"one of {', '.join(VARIANCE_MODELS)}")
    v0 = settings["v0"]
    if settings["variance_model"] == "signal" and not (v0 is not None and 0 <= v0 < 1):
        refuse("v0", "the variance of a clean sample, 0 to 1: at 1 variance does not tell time")


class TimeShift:
    """Mixin before a stock scheduler whose step reads its noise levels from `alphas_cumprod`.

    Settings as in `SETTINGS`. Unless `per_sample`, the batch shifts together by its mean variance.
    Where the network is told another time (`RETIMED`), pipelines learn it from `timesteps`, which
    holds one for all; with `per_sample` somebody has to read `conditioning` in their place, and say
    so by setting `reads_conditioning`.

    Raises ValueError for settings out of range.
    """

    conditioning: Tensor | None = None  # times (n,) that the next network call should be told
    reads_conditioning = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = register_to_config(_with_settings(cls.__init__))  # type: ignore[misc]

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the stock scheduler's; forgets the run before."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        if self.config.per_sample and self._retimes and not self.reads_conditioning:
            raise ValueError(
                f"{type(self).__name__}: with per_sample the network has to be told a time for each "
                f"sample, which no pipeline does by itself; leave it off"
            )
        self._grid = self.timesteps.tolist()
        self._at: int | None = None  # index into the grid; found at the first step
        self._start: Tensor | None = None  # level from which the next step starts
        self.conditioning = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        """As the stock scheduler's, with shifted levels."""
        if not self.config.window:
            return super().step(model_output, timestep, sample, *args, **kwargs)  # type: ignore[misc]
        first = self._at is None
        at = self._grid.index(int(timestep)) if first else self._at + 1
        self._at, time = at, self._grid[at]
        self.timesteps[at] = time  # as it was before the step before
        other = {} if self._start is None else {time: self._start}
        if not self._retimes and not first:
            other |= self._destination(time, sample)
        wide = any(level.ndim for level in other.values())  # else stays in the sample's precision
        kind = sample.dtype
        if wide:
            model_output, sample = model_output.float(), sample.float()
        with self._levels(other):
            out = super().step(model_output, time, sample, *args, **kwargs)  # type: ignore[misc]
        self._retime(out[0])
        return _in_precision(out, kind) if wide else out

    @property
    def _retimes(self) -> bool:
        return self.config.variant in RETIMED

    def _following(self, time: int) -> int:
        """The time a step from `time` goes to; below zero: to the clean sample."""
        raise NotImplementedError

    @contextmanager
    def _levels(self, other: dict[int, Tensor]) -> Iterator[None]:
        table = self.alphas_cumprod
        self.alphas_cumprod = Levels(table, other) if other else table
        try:
            yield
        finally:
            self.alphas_cumprod = table

    def _destination(self, time: int, sample: Tensor) -> dict[int, Tensor]:
        """Level at which the step from `time` should arrive, by the time it is asked for."""
        after = self._following(time)
        adm = self.config.variant == "adm"
        centre = time if adm else after
        if after < 0 or centre <= self.config.cutoff:
            return {}
        picked = self._nearest(sample, centre)
        if adm:  # the official stride, a little longer than the grid's
            picked = picked - len(self.alphas_cumprod) // max(len(self._grid) - 1, 1)
        return {after: self._level(picked.clamp(min=0), sample)}

    def _retime(self, result: Tensor) -> None:
        """Moves the time of the next step, of which `result` is the input."""
        self._start = self.conditioning = None
        last = self._at + 1 == len(self._grid)
        if not self._retimes or last or self._grid[self._at + 1] <= self.config.cutoff:
            return
        picked = self._nearest(result, self._grid[self._at + 1])
        self._start = self._level(picked, result)
        if picked.ndim:
            self.conditioning = picked
        else:
            self.timesteps[self._at + 1] = picked

    def _nearest(self, sample: Tensor, centre: int) -> Tensor:
        """Times in the window whose variance is nearest: (n,), or () for the batch."""
        half, last = self.config.window // 2, len(self.alphas_cumprod) - 1
        if self.config.variant == "constant":
            picked = torch.full((len(sample),), min(centre + half, last), device=sample.device)
            return picked if self.config.per_sample else picked[0]
        low, high = max(centre - half, 0), min(centre + half, last)
        variance = sample.flatten(1).float().var(dim=1)
        if not self.config.per_sample:
            variance = variance.mean()
        expected = self._expected()[low : high + 1].to(sample.device)
        return low + (variance[..., None] - expected).abs().argmin(dim=-1)

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


class TimeShiftDDIMScheduler(TimeShift, DDIMScheduler):
    """`DDIMScheduler` with shifted time; with ``eta=1`` what the official code calls DDPM."""

    def _following(self, time: int) -> int:
        return time - self.config.num_train_timesteps // self.num_inference_steps


class TimeShiftDDPMScheduler(TimeShift, DDPMScheduler):
    """`DDPMScheduler` with shifted time."""

    def previous_timestep(self, timestep: Any) -> Any:
        """As the stock scheduler's, from the grid before any shift."""
        if not self.config.window:
            return super().previous_timestep(timestep)
        return self._following(int(timestep))

    def _following(self, time: int) -> int:
        after = self._grid.index(time) + 1
        return self._grid[after] if after < len(self._grid) else -1


def _in_precision(out: Any, kind: torch.dtype) -> Any:
    """A step's output with its tensors in another precision."""
    if isinstance(out, tuple) and not hasattr(out, "keys"):
        return tuple(part.to(kind) for part in out)
    return type(out)(**{name: value.to(kind) for name, value in out.items()})
