"""How a residual gate runs: the evidence, the lines of residuals, and rows that compute alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.clock import Run
from accel.denoiser import Block, Denoiser, denoisers
from accel.method import Attached, Claim, Method
from caches._hookable import call_claim
from caches._outputs import memory_name, passed
from caches.schedule import is_unet, noise_share

if TYPE_CHECKING:
    from torch import Tensor

WARMUP = 2  # calls that compute everything: a line needs two points


# -- the evidence -----------------------------------------------------------------------------


def relative_gap(found: Tensor, forecast: Tensor) -> Tensor:
    """|found - forecast| / |found| of every row, (rows,), in float32."""
    found, forecast = found.flatten(1).float(), forecast.flatten(1).float()
    tiny = 1e-12
    return (found - forecast).norm(dim=1) / found.norm(dim=1).clamp(min=tiny)


def slopes(newest: Tensor, older: Tensor, at: float) -> Tensor:
    """Weights w (rows,) of the line f(at) = f0 + w (f0 - f1); 0 where one point is known.

    newest, older: places of both points (rows,); equal places count as one.
    """
    apart = newest - older
    known = apart.abs() > 0
    return ((at - newest) / apart.where(known, apart.new_ones(()))).where(known, 0.0)


def on_line(newest: Tensor, older: Tensor, weights: Tensor) -> Tensor:
    """f0 + w (f0 - f1) row by row, in float32, in the type of `newest`."""
    shaped = weights.view(-1, *[1] * (newest.ndim - 1))
    line = newest.float() + shaped * (newest.float() - older.float())
    return line.to(newest.dtype)


def response_at(share: float, shares: Sequence[float], responses: Sequence[float]) -> float:
    """The response at a noise share, linear between those measured, constant beyond them."""
    pairs = sorted(zip(shares, responses, strict=True))
    if share <= pairs[0][0]:
        return pairs[0][1]
    for (a, low), (b, high) in itertools.pairwise(pairs):
        if share <= b:
            return low + (high - low) * (share - a) / (b - a)
    return pairs[-1][1]


def stacked_blocks(denoiser: Denoiser, method: str = "ResidualGate") -> tuple[Block, ...]:
    """The blocks whose outputs follow one another, first to last.

    Raises:
        ValueError: a UNet, or fewer than two blocks; says that `method` cannot go on it.
    """
    if is_unet(denoiser) or len(denoiser.blocks) < 2:
        raise ValueError(
            f"{method} cannot go on {denoiser.cls}: it wants a stack of two transformer blocks "
            "or more; use IntervalCache"
        )
    return denoiser.blocks


def gate_claims(pipe: Any) -> frozenset[Claim]:
    """All blocks, and the calls of the denoisers."""
    paths = {f"{d.slot}.{b.path}" for d in denoisers(pipe) for b in stacked_blocks(d)}
    return frozenset({("block.skip", frozenset(paths)), call_claim(pipe)})


def halved(passes: Callable[[float], bool], tries: int) -> tuple[float | None, float | None]:
    """The largest threshold found to pass, and the smallest found not to; None where there is none.

    Halves the range 1e-6 to 1 in its logarithm; what passes is taken to pass with less, too.
    """
    low, high = 1e-6, 1.0
    passed, failed = None, None
    for _ in range(tries):
        threshold = math.sqrt(low * high)
        if passes(threshold):
            low = passed = threshold
        else:
            high = failed = threshold
    return passed, failed


# -- live state ------------------------------------------------------------------------------


@dataclass
class _Line:
    """The two newest computed steps of every row: places (rows,) and residuals by stream.

    `first` is the first block's residual of the hidden tokens, `rest` that of all other blocks.
    """

    newest: Tensor
    older: Tensor
    first: tuple[Tensor, Tensor]
    rest: tuple[dict[str, Tensor], dict[str, Tensor]]
    computed: int = 1  # calls in which every row computed

    def weights(self, at: float) -> Tensor:
        return slopes(self.newest, self.older, at)

    def fits(self, residual: Tensor) -> bool:
        return self.first[0].shape == residual.shape

    def add(self, at: float, first: Tensor, rest: dict[str, Tensor], rows: Tensor | None) -> None:
        """What `rows` (None: all) have computed; `first` is whole, `rest` too."""
        import torch

        place = torch.full_like(self.newest, at)
        if rows is None:
            self.newest, self.older = place, self.newest
            self.first, self.rest = (first, self.first[0]), (rest, self.rest[0])
            self.computed += 1
            return

        def kept(new: Tensor, old: Tensor) -> Tensor:
            return old.index_copy(0, rows, new[rows])

        def shifted(new: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return kept(new, pair[0]), kept(pair[0], pair[1])

        self.newest, self.older = shifted(place, (self.newest, self.older))
        self.first = shifted(first, self.first)
        pairs = {k: shifted(rest[k], (self.rest[0][k], self.rest[1][k])) for k in rest}
        self.rest = {k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()}

    def bytes(self) -> int:
        held = {id(t): t for t in (*self.first, *self.rest[0].values(), *self.rest[1].values())}
        return sum(t.numel() * t.element_size() for t in held.values())


class LiveGate(Attached):
    """Lines by branch and solver stage; of the call being computed, which rows compute."""

    error = 0.0
    shares: Sequence[float] = ()
    responses: Sequence[float] = ()
    only: int | None = None  # calibration: the one step that skips, -1 for none

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.gaps: list[Tensor] = []
        self.grid: tuple[float, ...] = ()
        self.lines: dict[tuple[str, str, int], _Line] = {}
        self.rows: Tensor | None = None  # indices that compute; None is all
        self.entered: dict[str, Tensor] = {}  # what the first block returned
        self.residual: Tensor | None = None
        self.peak, self.where = 0, "bytes_device"

    def adopt_all(self, pipe: Any) -> None:
        for denoiser in denoisers(pipe):
            self.around_denoiser(denoiser.slot, self._whole)
            module = denoiser.module.get_submodule
            first, *others = stacked_blocks(denoiser)
            self.around_call(module(first.path), self._first(first))
            for block in others:
                layer = self._last if block is others[-1] else self._inner
                self.around_call(module(block.path), layer(block))

    def on_run(self, run: Run) -> None:
        self._forget()
        self.peak, self.grid = 0, run.step_sigmas
        self.places = noise_share(self.grid)
        self.lengths = [a - b for a, b in itertools.pairwise((*self.places, 0.0))]
        if self.shares:
            self.response = [
                response_at(place, self.shares, self.responses) * length
                for place, length in zip(self.places, self.lengths, strict=True)
            ]

    def on_run_end(self, run: Run) -> None:
        self._forget()

    def _forget(self) -> None:
        self.lines, self.rows, self.entered, self.residual = {}, None, {}, None

    def memory(self) -> dict[str, int]:
        return {"bytes_device": 0, "bytes_host": 0, self.where: self.peak}

    # -- layers ------------------------------------------------------------------------------

    def _whole(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's call: blocks of it that are not called find nothing of another call."""
        self.rows, self.entered, self.residual = None, {}, None
        return call_next(*args, **kwargs)

    def _first(self, block: Block) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            output = call_next(*args, **kwargs)
            before = _streams(passed(block.output_layout, args, kwargs), block)
            self.entered = _streams(output, block)
            self.residual = self.entered["hidden"] - before["hidden"]
            self.rows = self._that_compute(self.residual)
            return output

        return layer

    def _inner(self, block: Block) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return call_next(*args, **kwargs)
            unchanged = passed(block.output_layout, args, kwargs)
            if not len(self.rows):
                return unchanged
            some = rows_of((args, kwargs), self.rows, len(self.entered["hidden"]))
            done = _streams(call_next(*some[0], **some[1]), block)
            return _replaced(unchanged, block, done, self.rows)

        return layer

    def _last(self, block: Block) -> Callable:
        import torch

        inner = self._inner(block)

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            output = inner(call_next, *args, **kwargs)
            if self.residual is None:
                self.fallback("a call without the first block")  # SD3's skip-layer guidance
                return output
            found = _streams(output, block)
            rest = {k: found[k] - self.entered[k] for k in found}
            now, residual = self.clock.now, self.residual
            assert now is not None
            key, at = (now.denoiser, now.branch, now.stage), self.places[now.step]
            line = self.lines.get(key)
            if line is None or not line.fits(residual):
                place = torch.full((len(residual),), at, device=residual.device)
                self.lines = {k: v for k, v in self.lines.items() if k[0] == now.denoiser}
                self.lines[key] = _Line(place, place, (residual, residual), (rest, rest))
            elif self.rows is None:
                line.add(at, residual, rest, None)
            else:
                weights = line.weights(at)
                guess = {
                    k: self.entered[k] + on_line(newest, line.rest[1][k], weights)
                    for k, newest in line.rest[0].items()
                }
                done = {k: found[k][self.rows] for k in guess}
                output = _replaced(_joined(guess, output, block), block, done, self.rows)
                if len(self.rows):
                    line.add(at, residual, rest, self.rows)
            self.peak = max(self.peak, sum(line.bytes() for line in self.lines.values()))
            self.where = memory_name(residual)
            return output

        return layer

    def _that_compute(self, residual: Tensor) -> Tensor | None:
        """Indices of the rows whose gap is too large; None for all."""
        now, rows = self.clock.now, len(residual)
        assert now is not None
        line = self.lines.get((now.denoiser, now.branch, now.stage))
        if line is None or not line.fits(residual) or line.computed < WARMUP or self.only == -1:
            self.count("computed", rows)
            return None
        weights = line.weights(self.places[now.step])
        gap = relative_gap(residual, on_line(*line.first, weights))
        if self.only is not None:
            if now.step != self.only:
                return None
            self.gaps.append(gap)
            self.count("reused", rows)
            return gap.nonzero().flatten()[:0]
        small = gap * self.response[now.step] <= self.error  # of what is no number: not
        compute = (~small).nonzero().flatten()
        self.count("syncs")
        self.count("computed", len(compute))
        self.count("reused", rows - len(compute))
        return None if len(compute) == rows else compute


# -- what blocks take and return --------------------------------------------------------------


def _streams(output: Any, block: Block) -> dict[str, Tensor]:
    """The tensors a block returns, by stream; SD3's last block returns no text."""
    parts = (output,) if len(block.output_layout) == 1 else output
    named = zip(block.output_layout, parts, strict=True)
    return {name: part for name, part in named if part is not None}


def _joined(streams: dict[str, Tensor], like: Any, block: Block) -> Any:
    """Streams as the block returns them."""
    if len(block.output_layout) == 1:
        return streams["hidden"]
    return type(like)(streams.get(name) for name in block.output_layout)


def _replaced(whole: Any, block: Block, done: dict[str, Tensor], rows: Tensor) -> Any:
    """A block's output with other values in some rows; streams that are not `done` are dropped."""
    streams = _streams(whole, block)
    return _joined({k: streams[k].index_copy(0, rows, v) for k, v in done.items()}, whole, block)


def rows_of(arguments: Any, rows: Tensor, total: int) -> Any:
    """Arguments of a block for some rows of a batch of `total`.

    Tensors whose first axis is the batch: those of three axes or more (Flux's rotary tables,
    (tokens, channels) in a tuple, are not), and any other that is an argument itself.
    """

    def part(value: Any, inside: bool) -> Any:
        if isinstance(value, dict):
            return {k: part(v, True) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(part(v, True) for v in value)
        batched = hasattr(value, "ndim") and value.ndim and len(value) == total
        return value[rows] if batched and (value.ndim >= 3 or not inside) else value

    args, kwargs = arguments
    return tuple(part(a, False) for a in args), {k: part(v, False) for k, v in kwargs.items()}
