"""Runs a schedule on a pipeline, module by module, on any class of the table of denoisers.

What to do is known before the run starts: a letter a step and column, the weights of every
forecast, and which outputs are read again. So a step compares no tensors and waits for nothing.
An output is kept by guidance branch and solver stage, from the step that computes it to the step
that reads it last. Whatever does not fit computes: nothing kept yet or too little for a forecast
(image to image starts in the middle), another shape than the kept one (guidance switched off). What
lies inside graphs of `torch.compile` acts there (`caches._in_graph`); the output of the whole
network is kept outside. After a call that raised, what is kept stays until the next run or detach.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from accel import compat
from accel.artifact import Artifact
from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from caches._hookable import require_whole_feed_forwards
from caches._in_graph import Port, inside, layer_in_graph, transparent
from caches._outputs import (
    combined,
    first_leaf,
    map_tensors,
    memory_name,
    passed,
    shape_of,
    size_of,
    versions_of,
)
from caches.schedule import (
    COMPUTE,
    FORECAST,
    REUSE,
    SKIP,
    Schedule,
    extrapolation,
    last_reads,
    noise_share,
    sources,
)


class Scheduled(ABC):
    """What methods that run a schedule have in common: `class Mine(Scheduled, Method)`.

    They say which columns they act on, and which schedule a run has, given its noise levels.
    """

    SLOTS = ("block.skip", "denoiser.call")

    @abstractmethod
    def columns(self, pipe: Any) -> tuple[str, ...]:
        """Columns of the schedule on this pipeline. Raises ValueError where it has none of them."""

    @abstractmethod
    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        """The schedule of a run over these noise levels, one a step."""

    def claims(self, pipe: Any) -> frozenset[Claim]:
        columns = self.columns(pipe)
        slots = frozenset(column.partition(".")[0] for column in columns)
        return frozenset({("block.skip", frozenset(columns)), ("denoiser.call", slots)})

    def new_live(self, pipe: Any) -> Attached:
        assert isinstance(self, Method)
        return LiveSchedule(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveSchedule)
        live.adopt_all(pipe, self.columns(pipe))


@dataclass
class _Kept:
    """The newest computed outputs of one column, newest first, with their noise shares."""

    outputs: list[tuple[int, float, Any]] = field(default_factory=list)  # (step, share, output)
    shape: Any = None  # of the call that computed them
    versions: tuple[int, ...] = ()


class LiveSchedule(Attached):
    """The letters of the run, the kept outputs and their bytes."""

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.columns: tuple[str, ...] = ()
        self.skippable: set[str] = set()
        self.artifact: Artifact | None = None
        self.found: Schedule | None = None  # as the artifact has it, for the noise levels `grid`
        self.grid: tuple[float, ...] = ()
        self.schedule: Schedule | None = None
        self.places: dict[str, int] = {}  # column -> place in a row
        self.shares: tuple[float, ...] = ()
        self.rows: dict[str, tuple[str, ...]] = {}
        self.reads: dict[str, dict[tuple[int, int], int]] = {}
        self.needs: dict[str, dict[tuple[int, int], int]] = {}  # (step, place) -> outputs read
        self.kept: dict[tuple[str, str, int], _Kept] = {}
        self.weights: dict[tuple[tuple[int, ...], int], tuple[float, ...]] = {}
        self.slot = ""  # of what is kept
        self.bytes = self.peak = 0
        self.where = "bytes_device"
        self.ports: dict[str, Port] = {}
        self.repeat_kept = 1  # times along the batch, for a call that stands for several steps

    # -- on the model ------------------------------------------------------------------------

    def adopt_all(self, pipe: Any, columns: tuple[str, ...]) -> None:
        """Put a layer on every column. Raises ValueError as `adopt` does."""
        self.columns = columns
        for denoiser in denoisers(pipe):
            self.adopt(denoiser, [c for c in columns if c.partition(".")[0] == denoiser.slot])

    def adopt(self, denoiser: Denoiser, columns: Iterable[str]) -> None:
        """Put a layer on every column of one denoiser.

        Raises:
            ValueError: its feed-forwards run in chunks, several calls a step.
        """
        columns = list(columns)
        if any("." in column for column in columns):
            require_whole_feed_forwards(denoiser, type(self.method).__name__)
        blocks = {f"{denoiser.slot}.{block.path}": block for block in denoiser.blocks}
        self._open_graphs(denoiser, columns)
        for column in columns:
            path = column.partition(".")[2]
            if not path:
                self.around_denoiser(denoiser.slot, self._layer(column, _no_skip))
                continue
            find = functools.partial(denoiser.module.get_submodule, path)
            module = find()
            block, skip = blocks.get(column), _no_skip
            if block is not None and block.ff:
                self.skippable.add(column)
                skip = functools.partial(passed, block.output_layout)
            port = self.ports[column] = Port()
            self.around_call(module, self._layer(column, skip), layer_in_graph(port, skip), find)

    def _layer(self, column: str, skip: Callable) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now, place = self.clock.now, self.places.get(column)
            assert now is not None
            if place is None:
                return call_next(*args, **kwargs)
            shape = shape_of(args, kwargs)
            letter, output = self._choose(column, place, now, shape)
            if letter == COMPUTE:
                output = call_next(*args, **kwargs)
            elif letter == SKIP:
                output = skip(args, kwargs)
            elif column == now.denoiser:
                self.clock.answered(len(first_leaf(output)))
            self._done(column, now, letter, output, shape)
            return output

        return layer

    def _choose(self, column: str, place: int, now: Any, shape: Any) -> tuple[str, Any]:
        """What a column does now, C, R or S, and its output where that is known already."""
        letter = self.rows_of(now.branch)[now.step][place]
        if letter == SKIP:
            return SKIP, None
        kept = self.kept.get((column, now.branch, now.stage))
        if kept is not None and kept.outputs and self.repeat_kept > 1:
            return REUSE, map_tensors(self._repeated, kept.outputs[0][2])
        if letter == COMPUTE:
            return COMPUTE, None
        few = max(1, self.needs[now.branch].get((now.step, place), 1))
        if kept is not None and len(kept.outputs) >= few and kept.shape == shape:
            if versions_of(kept.outputs[0][2]) == kept.versions:
                return REUSE, self._known(kept, letter, now, place)
            self.fallback(f"{column}: a kept output was changed in place")
        else:
            self.detail["forced"] = self.detail.get("forced", 0) + 1
        return COMPUTE, None

    def _done(self, column: str, now: Any, letter: str, output: Any, shape: Any) -> None:
        """Count what a column did, and keep what it computed."""
        if letter == COMPUTE:
            self.counts["computed"] += 1
            self._keep(column, self.places[column], now, output, shape)
        elif letter == SKIP:
            self.counts["skipped"] += 1
        else:
            self.counts["reused"] += self.repeat_kept

    # -- in graphs of torch.compile ----------------------------------------------------------

    def _open_graphs(self, denoiser: Denoiser, columns: list[str]) -> None:
        """Layers around whatever may become one graph: the denoiser, and blocks with columns in."""
        slot = denoiser.slot
        within = inside(slot, columns)
        if within:
            self.around_denoiser(slot, self._graph(lambda: getattr(self._pipe(), slot), within))
        for block in denoiser.blocks:
            within = inside(f"{slot}.{block.path}", columns)
            if within:
                module = denoiser.module.get_submodule(block.path)
                self.around_call(module, self._graph(lambda m=module: m, within), transparent)

    def _graph(self, module: Callable[[], Any], columns: list[tuple[str, list[str]]]) -> Callable:
        """The layer around a module that tells its columns, where it is compiled, what to do."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if not self.places or not compat.is_compiled(module()):
                return call_next(*args, **kwargs)
            now, shape = self.clock.now, shape_of(args, kwargs)
            letters: dict[str, str] = {}
            try:
                for column, around in columns:
                    if all(letters[c] == COMPUTE for c in around if c in letters):
                        letter, kept = self._choose(column, self.places[column], now, shape)
                        letters[column] = letter
                        self.ports[column].open(letter, kept)
                output = call_next(*args, **kwargs)
            except compat.recompile_limit_hit():
                self._close(letters)
                self.fallback("torch._dynamo.config.recompile_limit is too low; raise it")
                with compat.uncompiled():
                    return call_next(*args, **kwargs)
            finally:
                found = self._close(letters)
            for column, value in found.items():
                if value is not None:
                    self._done(column, now, letters[column], value, shape)
            return output

        return layer

    def _close(self, columns: Iterable[str]) -> dict[str, Any]:
        return {column: self.ports[column].close() for column in columns}

    def _repeated(self, tensor: Any) -> Any:
        return tensor.repeat(self.repeat_kept, *[1] * (tensor.ndim - 1))

    # -- in a run ----------------------------------------------------------------------------

    def on_run(self, run: Run) -> None:
        self._forget()
        self.peak = 0
        method = self.method
        assert isinstance(method, Scheduled)
        sigmas = run.step_sigmas
        schedule = method.plan(self, sigmas)
        if schedule != self.schedule or self.shares != noise_share(sigmas):
            self.schedule, self.shares = schedule, noise_share(sigmas)
            self.places = {column: j for j, column in enumerate(schedule.columns)}
            self.rows, self.reads, self.needs, self.weights = {}, {}, {}, {}
        if schedule.is_neutral():
            self.places = {}

    def on_run_end(self, run: Run) -> None:
        named = self.schedule.branches if self.schedule else ()
        if unused := [name for name, _ in named if name not in run.branches]:
            self.detail["unused_branches"] = unused
        self._forget()

    def memory(self) -> dict[str, int]:
        return {"bytes_device": 0, "bytes_host": 0, self.where: self.peak}

    def rows_of(self, branch: str) -> tuple[str, ...]:
        """The rows of a branch; what it reads later is reckoned with its first call."""
        rows = self.rows.get(branch)
        if rows is None:
            assert self.schedule is not None
            rows = self.rows[branch] = self.schedule.of_branch(branch)
            self.reads[branch] = last_reads(self.schedule, branch)
            read = sources(self.schedule, branch)
            self.needs[branch] = {(step, place): len(steps) for step, place, steps in read}
        return rows

    def _known(self, kept: _Kept, letter: str, now: Any, place: int) -> Any:
        if letter == REUSE or len(kept.outputs) == 1:
            output = kept.outputs[0][2]
        else:
            key = (tuple(step for step, _, _ in kept.outputs), now.step)
            if key not in self.weights:
                places = [share for _, share, _ in kept.outputs]
                self.weights[key] = extrapolation(places, self.shares[now.step])
            output = combined([o for _, _, o in kept.outputs], self.weights[key])
        last = self.reads[now.branch]
        for k in range(len(kept.outputs) - 1, -1, -1):
            step = kept.outputs[k][0]
            if last.get((step, place), -1) == now.step:
                self.bytes -= size_of(kept.outputs.pop(k)[2])
        return output

    def _keep(self, column: str, place: int, now: Any, output: Any, shape: Any) -> None:
        """Keep an output if it is read later; one computed against the plan always.

        Such ones make up for those that forecasts would read and that this run never had.
        """
        if now.denoiser != self.slot:  # the noise is low enough for another: the first is done
            self.slot = now.denoiser
            for other in [k for k in self.kept if k[0].partition(".")[0] != self.slot]:
                self._drop(self.kept.pop(other))
        key = (column, now.branch, now.stage)
        kept = self.kept.setdefault(key, _Kept())
        if kept.shape != shape:
            self._drop(kept)
            kept.shape = shape
        assert self.schedule is not None
        last, rows = self.reads[now.branch], self.rows_of(now.branch)

        def is_read(step: int) -> bool:
            if rows[step][place] != COMPUTE:
                return any(row[place] == FORECAST for row in rows[now.step + 1 :])
            return last.get((step, place), now.step) > now.step

        room = self.schedule.order + 1
        wanted = rows[now.step][place] != COMPUTE or (now.step, place) in last
        outputs = [o for o in kept.outputs if is_read(o[0])]
        outputs = outputs[: room - wanted]
        if wanted:
            outputs = [(now.step, self.shares[now.step], output), *outputs]
            kept.versions, self.where = versions_of(output), memory_name(output)
        elif outputs:
            kept.versions = versions_of(outputs[0][2])
        self.bytes += sum(size_of(o) for _, _, o in outputs)
        self.bytes -= sum(size_of(o) for _, _, o in kept.outputs)
        kept.outputs = outputs
        self.peak = max(self.peak, self.bytes)

    def _drop(self, kept: _Kept) -> None:
        self.bytes -= sum(size_of(o) for _, _, o in kept.outputs)
        kept.outputs = []

    def _forget(self) -> None:
        self.kept.clear()
        self.slot, self.bytes = "", 0


def _no_skip(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ValueError("a schedule says S (skip) for what is not a block of a transformer")
