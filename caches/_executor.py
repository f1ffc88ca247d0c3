"""Runs a schedule on a pipeline, module by module, on any class of the table of denoisers.

What to do is known before the run starts: a letter a step and column, the weights of every
forecast, and which outputs are read again. So a step compares no tensors and waits for nothing.
An output is kept by guidance branch and solver stage, from the step that computes it to the step
that reads it last. Whatever does not fit computes: nothing kept yet (image to image starts in the
middle), another shape than the kept one (guidance switched off).
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from accel.artifact import Artifact, ArtifactRef
from accel.clock import Run
from accel.denoiser import Denoiser, chunked_feed_forward, denoisers
from accel.method import Attached, Claim, Method
from caches.schedule import (
    COMPUTE,
    REUSE,
    SKIP,
    Schedule,
    constant,
    extrapolation,
    last_reads,
    noise_share,
    of_artifact,
    resampled,
)

OnGrid = Literal["resample", "error", "bypass"]
GRID_TOLERANCE = 1e-3  # relative, between noise levels that count as equal


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
        live.columns = self.columns(pipe)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, [c for c in live.columns if c.split(".")[0] == denoiser.slot])


class FromArtifact(Scheduled):
    """Methods whose schedule is an artifact: with fields `artifact` and `on_grid`.

    on_grid: what to do in a run over other noise levels than the schedule was made for:
    "resample" it, raise an "error", or "bypass" it and compute.
    """

    artifact: ArtifactRef
    on_grid: OnGrid

    def columns(self, pipe: Any) -> tuple[str, ...]:
        artifact = Artifact.load(self.artifact)
        for denoiser in denoisers(pipe):
            artifact.check_model(denoiser.module)
        columns = of_artifact(artifact).columns
        known = {d.slot: dict(d.module.named_modules()) for d in denoisers(pipe)}
        for column in columns:
            slot, _, path = column.partition(".")
            if path not in known.get(slot, ()):
                raise ValueError(f"{self.artifact.path}: this pipeline has no {column!r}")
        return columns

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveSchedule)
        artifact = Artifact.load(self.artifact)
        live.found, live.grid = of_artifact(artifact), artifact.grid
        super().build(pipe, live)
        for j, column in enumerate(live.found.columns):
            skips = any(row[j] == SKIP for rows in live.found.tables() for row in rows)
            if skips and column not in live.skippable:
                raise ValueError(
                    f"{self.artifact.path}: S (skip) at {column!r}, which is no transformer block"
                )

    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        assert live.found is not None
        same = len(live.grid) == len(sigmas) and all(
            abs(a - b) <= GRID_TOLERANCE * max(abs(a), abs(b))
            for a, b in zip(live.grid, sigmas, strict=True)
        )
        if same:
            return live.found
        said = f"the schedule has {len(live.grid)} steps, on other noise levels than this run"
        if self.on_grid == "error":
            raise ValueError(
                f"{type(self).__name__}: {said}, which has {len(sigmas)}; "
                "make one for it, or set on_grid='resample'"
            )
        if self.on_grid == "bypass":
            live.fallback(said)
            return constant(live.found.columns, len(sigmas))
        live.detail["resampled"] = [len(live.grid), len(sigmas)]
        return resampled(live.found, live.grid, sigmas)


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
        self.found: Schedule | None = None  # as it is on disk, for the noise levels `grid`
        self.grid: tuple[float, ...] = ()
        self.schedule: Schedule | None = None
        self.places: dict[str, int] = {}  # column -> place in a row
        self.shares: tuple[float, ...] = ()
        self.rows: dict[str, tuple[str, ...]] = {}
        self.reads: dict[str, dict[tuple[int, int], int]] = {}
        self.kept: dict[tuple[str, str, int], _Kept] = {}
        self.weights: dict[tuple[tuple[int, ...], int], tuple[float, ...]] = {}
        self.bytes = self.peak = 0
        self.repeat_kept = 1  # times along the batch, for a call that stands for several steps

    # -- on the model ------------------------------------------------------------------------

    def adopt(self, denoiser: Denoiser, columns: Iterable[str]) -> None:
        """Put a layer on every column of one denoiser.

        Raises:
            ValueError: its feed-forwards run in chunks, several calls a step.
        """
        blocks = {f"{denoiser.slot}.{block.path}": block for block in denoiser.blocks}
        for column in columns:
            path = column.partition(".")[2]
            if not path:
                self.around_denoiser(denoiser.slot, self._layer(column, _no_skip))
                continue
            module = denoiser.module.get_submodule(path)
            if chunked_feed_forward(module):
                raise ValueError(
                    f"{self.method.name()}: {column} runs its feed-forward in chunks; "
                    "switch chunking off to cache"
                )
            block = blocks.get(column)
            if block is None or not block.ff:
                self.around_call(module, self._layer(column, _no_skip))
            else:
                self.skippable.add(column)
                self.around_call(
                    module, self._layer(column, functools.partial(passed, block.output_layout))
                )

    def _layer(self, column: str, skip: Callable) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now, place = self.clock.now, self.places.get(column)
            assert now is not None
            if place is None:
                return call_next(*args, **kwargs)
            letter = self.rows_of(now.branch)[now.step][place]
            if letter == SKIP:
                self.counts["skipped"] += 1
                return skip(args, kwargs)
            kept = self.kept.get((column, now.branch, now.stage))
            shape = _shape(args, kwargs)
            if kept is not None and kept.outputs and self.repeat_kept > 1:
                self.counts["reused"] += self.repeat_kept
                return map_tensors(self._repeated, kept.outputs[0][2])
            if letter != COMPUTE and kept is not None and kept.outputs and kept.shape == shape:
                if _versions(kept.outputs[0][2]) == kept.versions:
                    if column == now.denoiser:
                        self.clock.answered(len(first_leaf(kept.outputs[0][2])))
                    return self._known(kept, letter, now, place)
                self.fallback(f"{column}: a kept output was changed in place")
            elif letter != COMPUTE:
                self.detail["forced"] = self.detail.get("forced", 0) + 1
            self.counts["computed"] += 1
            output = call_next(*args, **kwargs)
            self._keep(column, place, now, output, shape, forced=letter != COMPUTE)
            return output

        return layer

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
            self.rows, self.reads, self.weights = {}, {}, {}
        if schedule.is_neutral():
            self.places = {}

    def on_run_end(self, run: Run) -> None:
        self._forget()

    def memory(self) -> dict[str, int]:
        return {"bytes_device": self.peak, "bytes_host": 0}

    def rows_of(self, branch: str) -> tuple[str, ...]:
        """The rows of a branch; what it reads later is reckoned with its first call."""
        rows = self.rows.get(branch)
        if rows is None:
            assert self.schedule is not None
            rows = self.rows[branch] = self.schedule.of_branch(branch)
            self.reads[branch] = last_reads(self.schedule, branch)
        return rows

    def _known(self, kept: _Kept, letter: str, now: Any, place: int) -> Any:
        self.counts["reused"] += 1
        if letter == REUSE or len(kept.outputs) == 1:
            output = kept.outputs[0][2]
        else:
            key = (tuple(step for step, _, _ in kept.outputs), now.step)
            if key not in self.weights:
                places = [share for _, share, _ in kept.outputs]
                self.weights[key] = extrapolation(places, self.shares[now.step])
            output = _combined([o for _, _, o in kept.outputs], self.weights[key])
        last = self.reads[now.branch]
        for k in range(len(kept.outputs) - 1, -1, -1):
            step = kept.outputs[k][0]
            if last.get((step, place), -1) == now.step:
                self.bytes -= _size(kept.outputs.pop(k)[2])
        return output

    def _keep(
        self, column: str, place: int, now: Any, output: Any, shape: Any, forced: bool
    ) -> None:
        """Keep an output if it is read later; one computed against the plan always."""
        key = (column, now.branch, now.stage)
        kept = self.kept.setdefault(key, _Kept())
        if kept.shape != shape:
            self._drop(kept)
            kept.shape = shape
        assert self.schedule is not None
        last = self.reads[now.branch]
        room = self.schedule.order + 1
        wanted = forced or (now.step, place) in last
        outputs = [o for o in kept.outputs if last.get((o[0], place), now.step) > now.step]
        outputs = outputs[: room - wanted]
        if wanted:
            outputs = [(now.step, self.shares[now.step], output), *outputs]
            kept.versions = _versions(output)
        elif outputs:
            kept.versions = _versions(outputs[0][2])
        self.bytes += sum(_size(o) for _, _, o in outputs)
        self.bytes -= sum(_size(o) for _, _, o in kept.outputs)
        kept.outputs = outputs
        self.peak = max(self.peak, self.bytes)

    def _drop(self, kept: _Kept) -> None:
        self.bytes -= sum(_size(o) for _, _, o in kept.outputs)
        kept.outputs = []

    def _forget(self) -> None:
        self.kept.clear()
        self.bytes = 0


# -- outputs: tensors, tuples of them, diffusers' output objects ------------------------------


def _leaves(output: Any) -> list[Any]:
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    if isinstance(output, (dict, tuple, list)):
        return [leaf for part in parts for leaf in _leaves(part)]
    return []


def first_leaf(output: Any) -> Any:
    """The first tensor of an output."""
    return _leaves(output)[0]


def _combined(outputs: list[Any], weights: tuple[float, ...]) -> Any:
    """Sum of weighted outputs of one structure, in float32, in their own type."""

    def total(*tensors: Any) -> Any:
        weighted = [w * t.float() for w, t in zip(weights, tensors, strict=True)]
        return functools.reduce(operator.add, weighted).to(tensors[0].dtype)

    return map_tensors(total, *outputs)


def map_tensors(change: Callable, *outputs: Any) -> Any:
    """`change` of the tensors of outputs of one structure, which the result has, too."""
    import torch

    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return change(*outputs)
    if isinstance(first, dict):
        return type(first)(**{k: map_tensors(change, *(o[k] for o in outputs)) for k in first})
    if isinstance(first, (tuple, list)):
        return type(first)(map_tensors(change, *parts) for parts in zip(*outputs, strict=True))
    return first


def _size(output: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in _leaves(output))


def _versions(output: Any) -> tuple[int, ...]:
    """Counters of changes in place; of none in inference mode, which does not count."""
    return tuple(0 if leaf.is_inference() else leaf._version for leaf in _leaves(output))


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shape of the first tensor of a call."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "shape"):
            return value.shape
    return None


def passed(layout: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block returns that does nothing: its inputs, in the order it returns them."""
    names = {"hidden": ("hidden_states", 0), "text": ("encoder_hidden_states", 1)}
    found = []
    for part in layout:
        name, place = names[part]
        found.append(args[place] if place < len(args) else kwargs[name])
    return found[0] if len(found) == 1 else tuple(found)


def _no_skip(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ValueError("a schedule says S (skip) for what is not a block of a transformer")
