"""Which run, step, solver stage and guidance branch of a pipeline is being computed.

One clock per pipeline, shared by everything attached to it. It listens to three calls and compares
no tensors: ``scheduler.set_timesteps`` begins a run, a denoiser call is one guidance branch of a
solver stage, ``scheduler.step`` ends the stage. So Heun's two calls at one timestep are told apart,
and nothing waits for the device, with one exception: a run that may start in mid-schedule under a
scheduler that keeps no begin index (DDIM, PNDM: image-to-image) reads its first timestep once, if
neither the pipeline's own ``t`` nor what the denoiser is given is a view of the grid itself.

A run is of one call of this pipeline, in one thread. Who shares the denoiser and calls it in
another thread, or from inside that call, is in no run.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import Any, Literal, NamedTuple

from accel import compat
from accel.denoiser import SLOTS
from accel.patch import Patch
from accel.pipeline_calls import calls_of, guidance_asked


def denoiser_modules(pipe: Any) -> tuple[tuple[str, Any], ...]:
    """``(component name, module)`` of the denoisers of ``pipe``, as the pipeline calls them."""
    found = ((slot, getattr(pipe, slot, None)) for slot in SLOTS)
    return tuple((slot, module) for slot, module in found if module is not None)


class Now(NamedTuple):
    """The denoiser call being computed."""

    run: int  # runs of this pipeline since the clock started, from 0
    step: int  # index on the full sampling grid (image-to-image starts above 0)
    stage: int  # solver stage within the step (Heun: 0 and 1)
    call: int  # denoiser calls since the stage began, from 0
    branch: str  # guidance branch: the host's name ("cond", "uncond") or "call0", "call1"
    sigma: float  # noise level: sqrt((1 - a) / a) for variance-preserving, sigma for flow
    denoiser: str  # component name: "unet", "transformer", "transformer_2"
    first: bool  # whether the run has computed no step before this one


@dataclass
class Run:
    """One pass over a sampling grid."""

    index: int
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    order: int = 1  # solver stages per step
    begin: int = 0  # grid position of the first call
    position: int = 0  # grid position being computed
    calls: int = 0  # denoiser calls
    nfe: int = 0  # network evaluations: batch rows summed over calls
    branches: list[str] = field(default_factory=list)
    syncs: int = 0
    finished: bool = False
    thread: int | None = None  # of the pipeline call that it is of; None if it was begun otherwise
    guidance: float | None = None  # scale that call asks for; None if it does not say

    @property
    def guided(self) -> bool | None:
        """Whether the call asked for guidance; ``None`` if it does not say."""
        return None if self.guidance is None else self.guidance > 1

    @property
    def steps(self) -> int:
        """Steps of the whole grid."""
        return -(-len(self.timesteps) // self.order)

    @property
    def step_sigmas(self) -> tuple[float, ...]:
        """The noise level at which each step begins."""
        return self.sigmas[:: self.order][: self.steps]

    def made(self, step: int) -> tuple[int, int]:
        """How many steps come before this one of the grid, and how many there are in all; image to
        image begins inside the grid."""
        begin = self.begin // self.order
        return step - begin, self.steps - begin

    @property
    def steps_done(self) -> int:
        return -(-self.position // self.order) - self.begin // self.order


class Event(NamedTuple):
    """What subscribers get: a run began, a step was finished, a run ended."""

    kind: Literal["run", "step", "end"]
    run: int
    step: int  # grid index of the step just finished; -1 when a run begins
    steps: int  # steps of the grid


_CLOCKS: weakref.WeakKeyDictionary[Any, weakref.ref[Clock]] = weakref.WeakKeyDictionary()


def clock_of(pipe: Any) -> Clock:
    """The one clock of ``pipe``; created on first use, kept alive by whoever holds it."""
    known = _CLOCKS.get(pipe)
    clock = known() if known is not None else None
    if clock is None:
        clock = Clock(pipe)
        _CLOCKS[pipe] = weakref.ref(clock)
    return clock


class Clock:
    """See the module docstring. ``now`` is ``None`` outside a denoiser call of a run."""

    def __init__(self, pipe: Any) -> None:
        import torch

        self._pipe = weakref.ref(pipe)
        self._patch = Patch()
        self._users: list[Any] = []
        self._subscribers: list[Callable[[Event], None]] = []
        self._runs_begun = 0
        self.scheduler: Any = None  # that is listened to
        self._homes: tuple[tuple[str, Any], ...] = ()
        self._context: str | None = None
        self._call = 0
        self._held = self._deaf = False
        self._passing: set[int] = set()  # threads in a denoiser call that is in no run
        self.run: Run | None = None
        self.now: Now | None = None
        with torch.inference_mode(False):  # else it could be set in that mode only
            self.step_tensor = torch.zeros((), dtype=torch.int64)  # for compiled graphs; on CPU

    # -- who uses it -------------------------------------------------------------------------

    def acquire(self, user: Any) -> None:
        """Start listening (first user). ``user`` gets ``run_began(run)`` and ``run_ended(run)``.

        Its ``patch`` is kept installed at every start of a run, and its
        ``denoiser_layers(slot)`` run around the denoiser, wherever that is (compiled, replaced).
        """
        self._users.append(user)
        self.follow()

    def release(self, user: Any) -> None:
        """Stop listening with the last user; also where its end of a run raises."""
        try:
            if self.run is not None:
                user.run_ended(self.run)
        finally:
            self._users.remove(user)
            if self._users:
                self.follow()
            else:
                self._close_run()
                self._patch.undo()
                self.scheduler, self._homes = None, ()

    def subscribe(self, fn: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``fn(event)`` at every event; returns the function that ends it."""
        self._subscribers.append(fn)
        return lambda: self._subscribers.remove(fn)

    def follow(self) -> None:
        """Listen to the scheduler and denoisers that the pipeline has now."""
        pipe = self._pipe()
        if pipe is None:
            return
        if pipe.scheduler is self.scheduler and denoiser_modules(pipe) == self._homes:
            return
        self._patch.undo()
        self.scheduler, self._homes = pipe.scheduler, denoiser_modules(pipe)
        self._patch.around(pipe.scheduler, "set_timesteps", self._set_timesteps, outer=True)
        self._patch.around(pipe.scheduler, "step", self._step, outer=True)
        for slot, module in self._homes:
            self._listen_to(slot, module)

    def _listen_to(self, slot: str, module: Any) -> None:
        def denoise(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            return self._denoise(slot, module, call_next, args, kwargs)

        self._patch.around_call(module, denoise, outer=True)
        inner = compat.compiled_entry(module)
        if hasattr(type(inner), "cache_context"):
            self._patch.around(inner, "cache_context", self._cache_context, outer=True)

    # -- what it hears -----------------------------------------------------------------------

    def _set_timesteps(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        call, other = calls_of(self._pipe())
        if other is None or not (call is not None or _has_users(other)):
            self.begin(self.scheduler)  # else another pipeline's run, with methods of its own
        return result

    def begin(self, scheduler: Any) -> Run:
        """Begin a run over ``scheduler``'s grid; an open run is closed, an unused one replaced.

        Raises ``ValueError`` for a grid without steps, of which some schedulers make no remark.
        """
        unused = self.run is not None and self.run.calls == 0
        if unused:
            self._runs_begun -= 1
        else:
            self._close_run()
        timesteps, sigmas = sampling_grid(scheduler)
        if not timesteps:
            self.run = None
            raise ValueError(
                f"{type(scheduler).__name__} has laid a grid of no steps; ask for 1 or more "
                "(num_inference_steps)"
            )
        self.run = Run(self._runs_begun, timesteps, sigmas, order=getattr(scheduler, "order", 1))
        self._runs_begun += 1
        self._call = 0
        self.now = None
        pipe = self._pipe()
        call, _ = calls_of(pipe)
        if call is not None:
            self.run.thread = get_ident()
            self.run.guidance = guidance_asked(call, denoiser_modules(pipe))
        if pipe is not None and denoiser_modules(pipe) != self._homes:
            self.follow()  # a denoiser was replaced, for example by torch.compile(denoiser)
        for user in list(self._users):
            user.patch.ensure()
        self._patch.ensure()
        for user in list(self._users):
            user.run_began(self.run)
        self._emit("run", self.run, -1)
        return self.run

    def _denoise(
        self, slot: str, module: Any, call_next: Callable, args: tuple, kwargs: dict
    ) -> Any:
        if compat.is_compiling() or self._deaf:
            return call_next(*args, **kwargs)
        if self._held:
            return self._layered(slot, call_next)(*args, **kwargs)
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self.scheduler:
            self.follow()  # the user assigned another scheduler; its run began unheard
            self.begin(self.scheduler)
        run, call = self.run, None
        if self._is_of_another_thread():
            return self._pass(call_next, args, kwargs)
        if run is not None and run.thread is not None:
            call, other = calls_of(pipe)
            if call is None:  # it was cut off; this one is of somebody who shares the module
                self._close_run()
                run = None
            elif other is not None:
                return call_next(*args, **kwargs)
        if run is None or run.finished:
            return call_next(*args, **kwargs)
        if run.calls == 0:
            self._locate_begin(run, args, kwargs, module, call)
        branch = self._context or f"call{self._call}"
        self._tick(run, slot, branch)
        run.calls += 1
        run.nfe += _rows(args, kwargs)
        if branch not in run.branches:
            run.branches.append(branch)
        try:
            return self._layered(slot, call_next)(*args, **kwargs)
        finally:
            self._call += 1
            self.now = None

    def _is_of_another_thread(self) -> bool:
        return self.run is not None and self.run.thread not in (None, get_ident())

    def _pass(self, call_next: Callable, args: tuple, kwargs: dict) -> Any:
        self._passing.add(get_ident())
        try:
            return call_next(*args, **kwargs)
        finally:
            self._passing.discard(get_ident())

    def passes(self) -> bool:
        """Whether this thread is in a denoiser call that is in no run, beside one that is."""
        return bool(self._passing) and get_ident() in self._passing

    def _layered(self, slot: str, call: Callable) -> Callable:
        """``call`` inside the users' denoiser layers, the first user's innermost."""
        for user in self._users:
            for layer in user.denoiser_layers(slot):
                call = functools.partial(layer, call)
        return call

    def _tick(self, run: Run, slot: str, branch: str) -> None:
        k = run.position
        step, stage = divmod(k, run.order)
        self.step_tensor.fill_(step)
        first = k == run.begin
        self.now = Now(run.index, step, stage, self._call, branch, run.sigmas[k], slot, first)

    def _step(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        run = self.run
        if run is None or run.finished or self._call == 0:
            return result  # a second sample stepped by the same scheduler: not a stage of its own
        self._call = 0
        run.position += 1
        if run.position % run.order == 0 or run.position == len(run.timesteps):
            self._emit("step", run, (run.position - 1) // run.order)
        if run.position == len(run.timesteps):
            run.finished = True
            self._close_run()
        return result

    def _cache_context(self, call_next: Callable, name: str, **fields: Any) -> Any:
        if self._is_of_another_thread():
            return call_next(name, **fields)
        return self._named(call_next(name, **fields), name)

    @contextmanager
    def _named(self, host_context: AbstractContextManager, name: str) -> Iterator[Any]:
        previous, self._context = self._context, name
        try:
            with host_context as value:
                yield value
        finally:
            self._context = previous

    def close_if_over(self) -> None:
        """Close a run whose pipeline call ended before its grid did, of which nothing is heard."""
        run, pipe = self.run, self._pipe()
        if run is None or not run.calls or run.thread != get_ident() or pipe is None:
            return
        if calls_of(pipe)[0] is None:
            self._close_run()

    def _close_run(self) -> None:
        run, self.run = self.run, None
        self._context = None
        if run is None:
            return
        with ExitStack() as all_hear_it:  # also where one of them raises, under `strict`
            all_hear_it.callback(self._emit, "end", run, (run.position - 1) // run.order)
            for user in reversed(self._users):
                all_hear_it.callback(user.run_ended, run)

    def _emit(self, kind: Literal["run", "step", "end"], run: Run, step: int) -> None:
        for fn in list(self._subscribers):
            fn(Event(kind, run.index, step, run.steps))

    def _locate_begin(
        self, run: Run, args: tuple, kwargs: dict, module: Any, call: FrameType | None
    ) -> None:
        begin, grid = getattr(self.scheduler, "begin_index", None), self.scheduler.timesteps
        if begin is None:
            first = _timestep(module, args, kwargs)
            begin = place_of_view(first, grid)
            if begin is None and call is not None:  # LTX tells tokens that it was given less
                begin = place_of_view(call.f_locals.get("t"), grid)
            if begin is None:
                time = _number(first)
                begin = run.timesteps.index(time) if time in run.timesteps else 0
                run.syncs += 1
        run.begin = run.position = begin

    # -- without a pipeline ------------------------------------------------------------------

    @contextmanager
    def at(
        self, step: int, stage: int = 0, branch: str = "call0", sigma: float = float("nan")
    ) -> Iterator[Now]:
        """Drive attached methods by hand: every denoiser call inside is this one.

        For trainers, calibration and probes. Opens a run if none is open (``begin`` opens one with
        a grid); methods see ``first`` on the first position used.
        """
        if self.run is None:
            self.begin(self._pipe().scheduler)  # type: ignore[union-attr]
        run = self.run
        assert run is not None
        first = run.calls == 0
        slot = denoiser_modules(self._pipe())[0][0]
        run.calls += 1
        run.position = step * run.order + stage
        self.step_tensor.fill_(step)
        self._held, self.now = True, Now(run.index, step, stage, 0, branch, sigma, slot, first)
        try:
            yield self.now
        finally:
            self._held, self.now = False, None

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Denoiser calls inside are no part of a run; no layer acts on them.

        For what a trainer asks the same network between two calls of its own with ``at``.
        """
        before, self._deaf = self._deaf, True
        try:
            yield
        finally:
            self._deaf = before

    @contextmanager
    def asked_again(self, name: str, rows: int) -> Iterator[Now]:
        """For a layer that asks the network once more: its call inside is a branch of its own.

        The branch is the present one's with ``.name`` behind; its number is below zero and the same
        in every step. So what is attached inside keeps the two apart. ``rows``: of the batch.
        """
        before, run = self.now, self.run
        assert before is not None
        assert run is not None
        again = before._replace(branch=f"{before.branch}.{name}", call=-1 - before.call)
        run.calls += 1
        run.nfe += rows
        if again.branch not in run.branches:
            run.branches.append(again.branch)
        self.now = again
        try:
            yield again
        finally:
            self.now = before

    def answered(self, rows: int) -> None:
        """Rows of the present denoiser call were answered without the network: no evaluations."""
        if self.run is not None:
            self.run.nfe -= rows

    def end(self) -> None:
        """Close the run opened by hand."""
        self._close_run()


def sampling_grid(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Timesteps and noise levels of the grid that ``set_timesteps`` has laid.

    Returns two tuples of equal length. Variance-preserving schedulers without ``sigmas`` get
    sqrt((1 - a) / a) with a interpolated for fractional timesteps.
    """
    import numpy as np

    timesteps = tuple(float(t) for t in scheduler.timesteps.tolist())
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return timesteps, tuple(float(s) for s in sigmas[: len(timesteps)].tolist())
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timesteps, timesteps
    grid = np.interp(timesteps, np.arange(len(alphas)), alphas.double().cpu().numpy())
    return timesteps, tuple(float(s) for s in np.sqrt((1 - grid) / np.maximum(grid, 1e-12)))


def _has_users(pipe: Any) -> bool:
    known = _CLOCKS.get(pipe)
    clock = known() if known is not None else None
    return clock is not None and bool(clock._users)


def _rows(args: tuple, kwargs: dict) -> int:
    """Batch rows of a denoiser call, from its first argument (no sync): a tensor, or a list of one
    sample each (Z-Image)."""
    sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    return len(sample) if sample is not None else 1


def place_of_view(timestep: Any, grid: Any) -> int | None:
    """Which element of a grid (a tensor) a timestep is, if it is a view of one; else ``None``.

    Pipelines walk over the scheduler's own tensor. Its numbers are not looked at, so nothing waits
    for the device, and a time that the grid has twice (PNDM) is told apart.
    """
    if not all(hasattr(x, "untyped_storage") for x in (timestep, grid)):
        return None
    if timestep.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)


def _timestep(module: Any, args: tuple, kwargs: dict) -> Any:
    """The timestep a denoiser is called with."""
    if "timestep" in kwargs:
        return kwargs["timestep"]
    names = list(inspect.signature(type(compat.compiled_entry(module)).forward).parameters)[1:]
    index = names.index("timestep") if "timestep" in names else len(args)
    return args[index] if index < len(args) else None


def _number(timestep: Any) -> float | None:
    """The value of a timestep; waits for the device."""
    if timestep is None:
        return None
    return float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
