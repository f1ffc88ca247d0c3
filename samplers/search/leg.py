"""One pipeline call that begins or ends in the middle of its schedule, for any pipeline.

The call starts from a given state (put in place of what ``prepare_latents`` returns), sees only the
timesteps of its window, and is cut off behind its last step. What a scheduler keeps between steps
is found by comparing it with itself as its grid was laid, and carried: a run in two legs equals
one in one, bit for bit, for multistep solvers, too. All through a ``Patch``, outside the clock's
layers, so that attached methods see true step numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.patch import Patch
from samplers.search.branches import Branches
from samplers.search.levels import Levels
from samplers.search.noise import gaussian, key

_PLACE = ("timesteps", "_step_index", "_begin_index")  # where a scheduler is, not what it keeps


@dataclass(frozen=True)
class State:
    """Samples on their way. step: whose input ``sample`` (n, ...) is; clean: the prediction of the
    step before, float32; solver: what the scheduler keeps, ``None`` before the first step and
    after stochastic ones; gained: log-weights (n,) of the last run, if it had a mix."""

    step: int
    sample: Tensor
    clean: Tensor | None = None
    solver: dict[str, Any] | None = None
    gained: Tensor | None = None

    def rows(self) -> list[State]:
        """One state a sample."""
        n = len(self.sample)
        return [
            State(
                self.step,
                self.sample[i : i + 1].clone(),
                None if self.clean is None else self.clean[i : i + 1].clone(),
                None if self.solver is None else _row(self.solver, i, n),
                None if self.gained is None else self.gained[i : i + 1].clone(),
            )
            for i in range(n)
        ]


def packed(states: Sequence[State]) -> State:
    """One state of several at the same step."""
    first = states[0]
    if len(states) == 1:
        return first
    clean = None if first.clean is None else torch.cat([s.clean for s in states])  # type: ignore
    solver = None if first.solver is None else _pack([s.solver for s in states])
    return State(first.step, torch.cat([s.sample for s in states]), clean, solver)


class Cut(Exception):
    """A call was cut off where it was meant to be; never leaves this package."""


class Leg:
    """What one call does differently. Enter ``on(pipe)``, call the pipeline, read the results.

    start: the state to begin from (its rows are the call's samples). stop: cut off before this
    step. eta, keys: make stochastic steps with these keys, one a row. look: predict clean samples.
    mix: of both scores, in place of guidance; the samples' log-weights are summed up.
    """

    def __init__(
        self,
        start: State | None = None,
        stop: int | None = None,
        eta: float | None = None,
        keys: Sequence[int] = (),
        look: bool = False,
        mix: tuple[float, float] | None = None,
    ) -> None:
        self.start, self.stop, self.eta, self.keys = start, stop, eta, list(keys)
        self.look = look or eta is not None
        self.mix, self.gained = mix, None
        self.levels: Levels | None = None
        self.steps = self.at = 0
        self.placed = start is None
        self.first: Tensor | None = None  # what prepare_latents returned
        self.stepped: torch.Size | None = None  # shape of what the scheduler steps
        self.end: State | None = None
        self._laid: dict[str, Any] = {}
        self._window: Patch | None = None
        self._began = False

    @contextmanager
    def on(self, pipe: Any) -> Iterator[Leg]:
        """Install the layers for the length of a ``with`` block; a meant cut ends in silence."""
        patch, scheduler = Patch(), pipe.scheduler
        self._pipe, self._scheduler = pipe, scheduler
        listening = ExitStack()
        if self.mix is not None:
            self._branches = Branches(pipe)
            listening.enter_context(self._branches.heard())
        try:
            if hasattr(pipe, "prepare_latents"):
                patch.around(pipe, "prepare_latents", self._prepare)
            patch.around(scheduler, "set_timesteps", self._set_timesteps, outer=True)
            patch.around(scheduler, "step", self._step, outer=True)
            for name, layer in (("set_begin_index", self._begin), ("scale_model_input", self._on)):
                if hasattr(scheduler, name):
                    patch.around(scheduler, name, layer, outer=True)
            yield self
        except Cut:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()  # what a pipeline does at its own end
        finally:
            self._open_window()
            patch.undo()
            listening.close()
        if not self.placed:
            raise ValueError(
                f"{type(pipe).__name__} took no first noise from outside (no prepare_latents); "
                "search it with algorithms that only draw seeds: Random, DraftCommit"
            )

    # -- layers ------------------------------------------------------------------------------

    def _prepare(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        several = isinstance(result, tuple | list)
        own = result[0] if several else result
        self.first = own.detach().clone()
        if self.stop == -1:
            self._captured()
        if self.start is None:
            return result
        given = self.start.sample
        if given.shape != own.shape:
            raise ValueError(f"search: a state {tuple(given.shape)} for {tuple(own.shape)} latents")
        self.placed = True
        given = given.to(own.device, own.dtype)
        if self.mix is not None and self.start.step == 0:
            given = given / sum(self.mix) ** 0.5  # a power of a Gaussian is a narrower one
        return type(result)([given, *result[1:]]) if several else given

    def _set_timesteps(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        scheduler, order = self._scheduler, self._order
        self.steps = -(-len(scheduler.timesteps) // order)
        self._laid = {k: _shallow(v) for k, v in vars(scheduler).items()}
        if self.look or self.stop == -1:
            self.levels = _levels(scheduler, needed=self.look)
        if self.stop == -1:
            self._captured()
        if self.start is None or self.start.step == 0:
            return result
        self.at = self.start.step * order
        self._window = Patch()
        self._window.swap(scheduler, "timesteps", scheduler.timesteps[self.at :])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return result

    def _captured(self) -> None:
        """All that can be known of this call without computing is: cut it off."""
        noise_known = self.first is not None or not hasattr(self._pipe, "prepare_latents")
        if noise_known and self.steps:
            raise Cut

    @property
    def _order(self) -> int:
        return getattr(self._scheduler, "order", 1)

    def _begin(self, call_next: Callable, begin_index: int = 0) -> Any:
        return call_next(begin_index + self.at if not self._began else begin_index)

    def _on(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scale_model_input``: the first step is about to be made."""
        self._resume()
        return call_next(*args, **kwargs)

    def _open_window(self) -> None:
        if self._window is not None:
            self._window.undo()
            self._window = None

    def _resume(self) -> None:
        """Give the scheduler its whole grid back, and what it kept."""
        if self._began:
            return
        self._began = True
        self._open_window()
        solver = self.start.solver if self.start is not None else None
        for name, value in (solver or {}).items():
            setattr(self._scheduler, name, _fresh(value, self.start.sample.device))  # type: ignore

    def _step(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        self._resume()
        signature = inspect.signature(type(self._scheduler).step)
        given = signature.bind(self._scheduler, *args, **kwargs).arguments
        out, x = given["model_output"], given["sample"]
        self.stepped = x.shape
        step = self.at // self._order
        clean = None
        if self.mix is not None:
            clean = self._mixed(out, x, step)
        elif self.look and self.levels is not None:
            clean = self.levels.clean(out, x, step)
        result = call_next(*args, **kwargs)
        if self.eta is not None:
            result = _with_sample(result, self._follow(x, clean, step))
        self.at += 1
        if self.stop is not None and self.at == self.stop * self._order:
            end = _sample(result).detach()
            self.end = State(self.stop, end, clean, self._kept(), self.gained)
            raise Cut
        return result

    def _mixed(self, out: Tensor, x: Tensor, step: int) -> Tensor:
        assert self.levels is not None
        assert self.mix is not None
        heard = self._branches.taken(x)
        self._branches.check_guided(out, heard, self.mix)
        parts = [self.levels.clean(branch, x, step) for branch in heard]
        clean, gained = self.levels.mixed(parts, x, step, self.mix)
        self.gained = gained if self.gained is None else self.gained + gained
        return clean

    def _follow(self, x: Tensor, clean: Any, step: int) -> Tensor:
        assert self.levels is not None
        assert self.eta is not None
        if len(x) != len(self.keys):
            raise ValueError(f"search: {type(self._pipe).__name__} steps {len(x)} rows a sample")
        fresh, eta = None, self.eta
        if self.mix is not None:
            eta = self.levels.mixed_eta(step, eta, self.mix)
        if self.levels.fresh_noise(step, eta) > 0:
            fresh = torch.stack([gaussian(key(k, step), tuple(x.shape[1:])) for k in self.keys])
        return self.levels.follow(x, clean, step, eta=eta, fresh=fresh)

    def _kept(self) -> dict[str, Any] | None:
        """What the scheduler has changed of itself since it laid its grid, but for its place."""
        if self.eta is not None:
            return None
        return {
            name: _fresh(value, None)
            for name, value in vars(self._scheduler).items()
            if name not in _PLACE and not _same(value, self._laid.get(name))
        }


def capture(pipe: Any, arguments: dict[str, Any]) -> Leg:
    """The first noise of a call (``.first``), its grid (``.steps``, ``.levels``); nothing computed.

    ``.first`` is None where the pipeline has no ``prepare_latents``.
    """
    leg = Leg(stop=-1)
    with leg.on(pipe):
        pipe(**arguments)
    return leg


def _levels(scheduler: Any, *, needed: bool) -> Levels | None:
    try:
        return Levels.of(scheduler)
    except ValueError:
        if needed:
            raise
        return None


# -- what a scheduler keeps ------------------------------------------------------------------


def _shallow(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, list) and isinstance(before, list):
        return len(value) == len(before) and all(map(_same, value, before))
    if isinstance(value, Tensor) or isinstance(before, Tensor) or callable(value):
        return value is before
    return value is before or (type(value) is type(before) and value == before)


def _fresh(value: Any, device: Any) -> Any:
    """A copy whose changes do not show in the original."""
    if isinstance(value, Tensor):
        return (
            value.detach().clone() if device is None or value.ndim < 2 else value.to(device).clone()
        )
    return [_fresh(v, device) for v in value] if isinstance(value, list) else value


def _row(value: Any, i: int, n: int) -> Any:
    if isinstance(value, dict):
        return {k: _row(v, i, n) for k, v in value.items()}
    if isinstance(value, list):
        return [_row(v, i, n) for v in value]
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == n:
        return value[i : i + 1].clone()
    return value


def _pack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {k: _pack([v[k] for v in values]) for k in first}
    if isinstance(first, list):
        return [_pack([v[i] for v in values]) for i in range(len(first))]
    if isinstance(first, Tensor) and first.ndim > 1:
        return torch.cat(values)
    return first


# -- results of a step -----------------------------------------------------------------------


def _sample(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _with_sample(result: Any, sample: Tensor) -> Any:
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def call_parameters(pipe: Any) -> frozenset[str]:
    """Argument names of a pipeline's call."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)
