"""How a run leaves its last blocks out: early exits as a schedule, and what stands in for the rest.

A schedule says S for all blocks behind an exit. What they would have added to the hidden tokens is
left out ("skip"), is what they added when they last ran ("residual"), continues the line through
the last two times ("forecast"), or comes from a trained head ("heads"). All samples and guidance
branches of a step leave at the same block. The layers act inside graphs of `torch.compile`, too:
what they do is decided outside, around the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.clock import Now, Run
from accel.denoiser import Block, Denoiser, denoisers
from accel.method import Method
from caches._executor import LiveSchedule
from caches._gating import stacked_blocks
from caches._outputs import combined, hidden_of, memory_name, passed, size_of, with_hidden
from caches.schedule import COMPUTE, SKIP, Schedule, extrapolation

Rest = Literal["skip", "residual", "forecast", "heads"]
POINTS = {"residual": 1, "forecast": 2}  # full steps that what stands in is made of
Head = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
WAVES = 8  # cosines of the noise share that a head is told
NAME = "EarlyExit"


# -- depths and schedules ----------------------------------------------------------------------


def exit_columns(pipe: Any) -> tuple[str, ...]:
    """All blocks, denoiser by denoiser. Raises ValueError where they are no stack."""
    return tuple(f"{d.slot}.{b.path}" for d in denoisers(pipe) for b in stacked_blocks(d, NAME))


def as_schedule(columns: Sequence[str], depths: Iterable[int]) -> Schedule:
    """The schedule in which so many blocks of every denoiser run at each step."""
    slots = [column.partition(".")[0] for column in columns]
    places = [slots[:j].count(slot) for j, slot in enumerate(slots)]  # within the denoiser
    rows = ("".join(COMPUTE if i < depth else SKIP for i in places) for depth in depths)
    return Schedule(tuple(columns), tuple(rows))


def depths_of(schedule: Schedule, slot: str) -> tuple[int, ...]:
    """How many blocks of a denoiser run at each step.

    Raises:
        ValueError: no early exits: a block runs behind one that does not, or branches differ.
    """
    mine = [j for j, column in enumerate(schedule.columns) if column.partition(".")[0] == slot]
    rows = ["".join(row[j] for j in mine) for row in schedule.rows]
    depths = tuple(row.count(COMPUTE) for row in rows)
    wanted = [COMPUTE * depth + SKIP * (len(mine) - depth) for depth in depths]
    if rows != wanted or schedule.branches:
        raise ValueError(f"{NAME}: this schedule leaves out others than the last blocks")
    return depths


def used_later(depths: Sequence[int], blocks: int) -> list[frozenset[int]]:
    """For every step, the exits of the steps after it."""
    return [frozenset(depths[step + 1 :]) - {blocks} for step in range(len(depths))]


# -- heads --------------------------------------------------------------------------------------


class ExitHeads(nn.Module):
    """For each exit a head h(x) = x + (1 + gate) W (LN(x) (1 + scale) + shift) + b of the tokens.

    Gate, scale and shift depend on the noise share (adaptive layer norm). Begins as h(x) = x; the
    model's own last layers come behind it.
    """

    def __init__(self, exits: Sequence[int], width: int) -> None:
        super().__init__()
        self.exits, count = tuple(exits), len(exits)
        self.modulation = nn.Parameter(torch.zeros(count, WAVES, 3 * width))
        self.weight = nn.Parameter(torch.zeros(count, width, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def at(self, depth: int, share: float) -> Head:
        """The head of an exit at a noise share: scale, shift, gate, weight, bias."""
        place = self.exits.index(depth)
        waves = self.weight.new_tensor([math.cos(math.pi * k * share) for k in range(WAVES)])
        scale, shift, gate = (waves @ self.modulation[place]).chunk(3)
        return scale, shift, gate, self.weight[place], self.bias[place]

    def forward(self, x: Tensor, depth: int, share: float) -> Tensor:
        return applied(x, self.at(depth, share))

    def tensors(self) -> dict[str, Tensor]:
        """For an artifact."""
        return {f"heads.{name}": value.half() for name, value in self.state_dict().items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], exits: Sequence[int]) -> ExitHeads:
        """The inverse of ``tensors``."""
        state = {k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")}
        heads = cls(exits, state["bias"].shape[-1])
        heads.load_state_dict(state)
        return heads.requires_grad_(False)


def applied(x: Tensor, head: Head) -> Tensor:
    """x (b, tokens, c) behind a head."""
    scale, shift, gate, weight, bias = head
    normed = F.layer_norm(x, x.shape[-1:]).to(weight.dtype) * (1 + scale) + shift
    return x + ((1 + gate) * F.linear(normed, weight) + bias).to(x.dtype)


# -- live state ---------------------------------------------------------------------------------


@dataclass
class _Kept:
    """Of one denoiser, branch and stage: what the blocks behind exits added, newest first.

    points: (noise share, exit -> tokens); shape: of the calls.
    """

    shape: Any
    points: list[tuple[float, dict[int, Tensor]]] = field(default_factory=list)

    def at(self, share: float, depth: int, count: int) -> Tensor | None:
        """Repeated or continued from `count` points; None where they are fewer."""
        known = [(place, added[depth]) for place, added in self.points if depth in added]
        if len(known) < count:
            return None
        places, added = zip(*known, strict=True)
        return combined(list(added), extrapolation(places, share))


class LiveExit(LiveSchedule):
    """A schedule of exits, with what stands in for the blocks that are left out.

    Of the present call: `whole`, nothing is left out, whatever the schedule says; `leaving`, exits
    whose tokens are noted; `added` or `head`, what stands in.
    """

    rest: Rest = "skip"
    heads: ExitHeads | None = None
    trial: Schedule | None = None  # calibration
    whole = False
    leaving: frozenset[int] = frozenset()
    added: Tensor | None = None
    head: Head | None = None

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.depths: dict[str, tuple[int, ...]] = {}
        self.later: dict[str, list[frozenset[int]]] = {}
        self.entered: dict[int, Tensor] = {}  # tokens at exits of the present call
        self.behind: dict[int, Tensor] = {}  # what the blocks behind those have added
        self.kept_of: dict[tuple[str, str, int], _Kept] = {}

    @property
    def points(self) -> int:
        """Full steps that what stands in is made of."""
        return POINTS.get(self.rest, 0)

    def adopt_exits(self, pipe: Any) -> None:
        """Put layers around blocks and denoisers, outside those of the schedule."""
        for denoiser in (d for d in denoisers(pipe) if self.blocks(d.slot)):
            module = denoiser.module.get_submodule
            blocks = stacked_blocks(denoiser, NAME)
            self.around_denoiser(denoiser.slot, self._decide(denoiser))
            for depth, block in enumerate(blocks if self.points else []):
                note = self._note(depth, block)
                self.around_call(module(block.path), note, note)
            finish = self._finish(blocks[-1])
            self.around_call(module(blocks[-1].path), finish, finish)

    def slots(self) -> tuple[str, ...]:
        """The denoisers of the schedule."""
        return tuple(dict.fromkeys(column.partition(".")[0] for column in self.columns))

    def blocks(self, slot: str) -> int:
        """Blocks of a denoiser."""
        return sum(column.partition(".")[0] == slot for column in self.columns)

    def on_run(self, run: Run) -> None:
        super().on_run(run)
        assert self.schedule is not None
        self.depths = {slot: depths_of(self.schedule, slot) for slot in self.slots()}
        self.later = {s: used_later(d, self.blocks(s)) for s, d in self.depths.items()}

    def _forget(self) -> None:
        super()._forget()
        self.kept_of.clear()

    # -- around a denoiser -------------------------------------------------------------------

    def _decide(self, denoiser: Denoiser) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now, sample = self.clock.now, denoiser.sample(args, kwargs)
            assert now is not None
            depth = self.depths[now.denoiser][now.step]
            if self.points:
                self._decide_kept(now, depth, sample.shape)
            elif self.heads is not None and depth < self.blocks(now.denoiser):
                heads = self.heads.to(sample.device, sample.dtype)
                self.head = heads.at(depth, self.shares[now.step])
            try:
                output = call_next(*args, **kwargs)
                if self.leaving:
                    self._keep_point(now)
                return output
            finally:
                self.whole, self.leaving, self.added, self.head = False, frozenset(), None, None
                self.entered, self.behind = {}, {}

        return layer

    def _decide_kept(self, now: Now, depth: int, shape: Any) -> None:
        """Find what stands in, or run everything and keep what is read later."""
        key = (now.denoiser, now.branch, now.stage)
        if key not in self.kept_of or self.kept_of[key].shape != shape:
            own = {k: v for k, v in self.kept_of.items() if k[0] == now.denoiser}
            self.kept_of = {**own, key: _Kept(shape)}  # another denoiser is done
        if depth < self.blocks(now.denoiser):
            self.added = self.kept_of[key].at(self.shares[now.step], depth, self.points)
            self.whole = self.added is None
        if self.whole:
            self.detail["forced"] = self.detail.get("forced", 0) + 1
        if self.added is None:
            self.leaving = self.later[now.denoiser][now.step]

    def _keep_point(self, now: Now) -> None:
        kept = self.kept_of[now.denoiser, now.branch, now.stage]
        kept.points = [(self.shares[now.step], self.behind), *kept.points][: self.points]
        every = [added for kept in self.kept_of.values() for _, added in kept.points]
        self.bytes, self.where = sum(size_of(added) for added in every), memory_name(self.behind)
        self.peak = max(self.peak, self.bytes)

    # -- around blocks, in graphs and outside --------------------------------------------------

    def _note(self, depth: int, block: Block) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if depth in self.leaving:
                before = passed(block.output_layout, args, kwargs)
                self.entered[depth] = hidden_of(block.output_layout, before)
            return call_next(*args, **kwargs)

        return layer

    def _finish(self, last: Block) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            output = call_next(*args, **kwargs)
            hidden = hidden_of(last.output_layout, output)
            for depth, tokens in self.entered.items():
                self.behind[depth] = hidden - tokens
            if self.added is not None:
                return with_hidden(last.output_layout, output, hidden + self.added)
            if self.head is not None:
                return with_hidden(last.output_layout, output, applied(hidden, self.head))
            return output

        return layer

    # -- of the schedule's executor --------------------------------------------------------------

    def _choose(self, column: str, place: int, now: Any, shape: Any) -> tuple[str, Any]:
        return (COMPUTE, None) if self.whole else super()._choose(column, place, now, shape)

    def _keep(self, column: str, place: int, now: Any, output: Any, shape: Any) -> None:
        """No block's output is read again."""
