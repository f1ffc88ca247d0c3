"""What a calibration sees: calls of the denoiser on the sampler's own way, and layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from accel.clock import clock_of, sampling_grid
from accel.denoiser import Denoiser
from accel.measure import pipeline_samples
from accel.method import Recipe, attached
from accel.patch import Patch
from quant._grid import TIMESTEP, with_tensor_time
from quant._layers import quantisable, splittable

ROWS = 256  # of one layer's inputs at one call that are kept, to choose among activation schemes


@dataclass
class Call:
    """One call of a denoiser, with copies of its arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    time: float


@dataclass
class LayerInputs:
    """What one layer was given: ranges at every timestep, and rows of some calls.

    rows: of what is held out, where there is enough to hold some out; fitted: the ranges without.
    """

    low: dict[float, Tensor] = field(default_factory=dict)
    high: dict[float, Tensor] = field(default_factory=dict)
    rows: list[tuple[float, Tensor]] = field(default_factory=list)  # (time, (n, k))
    fitted: LayerInputs | None = None
    shape: tuple[int, ...] = ()  # of the input, of one call
    order: int = 0  # in which layers are first called

    def see(self, time: float, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach().float())
        self.low[time] = torch.minimum(low, self.low.get(time, low))
        self.high[time] = torch.maximum(high, self.high.get(time, high))


@dataclass
class Recording:
    """All that was seen of one denoiser."""

    calls: list[Call] = field(default_factory=list)
    layers: dict[str, LayerInputs] = field(default_factory=dict)
    pieces: dict[str, tuple[LayerInputs, LayerInputs]] = field(default_factory=dict)  # of splits
    times: list[float] = field(default_factory=list)  # of the grid, in order, each once
    grid: tuple[float, ...] = ()  # noise levels of the newest run's grid
    guided: set[bool | None] = field(default_factory=set)  # as runs say it


def skip_splits(denoiser: Denoiser) -> dict[str, int]:
    """Layers that are fed with a concatenation as it is, with the channels of its first piece.

    Those of a UNet's decoder that pass hidden states and skip by the residual branch; that branch
    itself normalises the concatenation first, which gives both pieces one range.
    """
    found = {f"{s.resnet}.conv_shortcut": s.hidden for s in denoiser.skip_concats}
    parts = dict(denoiser.module.named_modules())
    return {path: n for path, n in found.items() if splittable(parts.get(path))}


def record(
    pipe: Any,
    denoiser: Denoiser,
    inputs: list[dict[str, Any]],
    recipe: Recipe,
    *,
    calls: int,
    seed: int = 0,
) -> Recording:
    """Run the pipeline with ``recipe`` on ``inputs`` and look.

    calls: denoiser calls to keep of each run, evenly over its steps (of a guided step, both). A
    layer's inputs are kept as often, at the next step at which it runs, since ``recipe`` may leave
    it out at some. seed: of the first input's noise; the next ones follow. Every other input is
    held out from what schemes are fitted to; of a single input, every other sample.

    Raises:
        ValueError: the denoiser ran, but in no call that was to be kept.
    """
    seen, patch, splits = Recording(), Patch(), skip_splits(denoiser)
    now: dict[str, Any] = {"time": None, "input": 0}
    clock = clock_of(pipe)
    kept: dict[str, tuple[int, int, int]] = {}  # path -> (input, part of the grid, step)

    def is_due(path: str) -> bool:
        """Of each part of the grid the first step from its middle on that comes here. The middle of
        part p of n is at step (2 p + 1) steps / 2 n; in as many parts as steps, each is its own."""
        run, place = clock.run, clock.now.step if clock.now is not None else 0
        steps = run.steps if run is not None else 1
        part = ((2 * calls * (place + 1) - 1) // steps - 1) // 2
        if part < 0:
            return False
        if kept.get(path, ())[:2] != (now["input"], part):
            kept[path] = now["input"], part, place
        return kept[path][2] == place

    def on_denoiser(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_tensor_time(denoiser, args, kwargs)
        now["time"] = time = _time(denoiser.argument(TIMESTEP, args, kwargs))
        if time not in seen.times:
            seen.times.append(time)
        seen.guided.add(None if clock.run is None else clock.run.guided)
        if is_due(""):
            seen.calls.append(Call(tree_map(_copied, args), tree_map(_copied, kwargs), time))
        return call_next(*args, **kwargs)

    def look(found: LayerInputs, x: Tensor, keep: bool) -> None:
        found.see(now["time"], x)
        found.shape = tuple(x.shape)
        if len(inputs) > 1:
            fitted, held = (x[:0], x) if now["input"] % 2 else (x, x[:0])
        else:
            fitted, held = (x[::2], x[1::2]) if len(x) > 1 else (x, x)
        if len(fitted):
            found.fitted = found.fitted or LayerInputs()
            found.fitted.see(now["time"], fitted)
        if keep and len(held):
            found.rows.append((now["time"], _some_rows(held)))

    def on_layer(path: str) -> Callable[..., Any]:
        def layer(call_next: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if now["time"] is None:
                return call_next(x, *args, **kwargs)
            found = seen.layers.setdefault(path, LayerInputs(order=len(seen.layers)))
            keep = is_due(path)
            look(found, x, keep)
            if path in splits:
                both = seen.pieces.setdefault(path, (LayerInputs(), LayerInputs()))
                for piece, part in zip(both, x.tensor_split([splits[path]], 1), strict=True):
                    look(piece, part, keep)
            return call_next(x, *args, **kwargs)

        return layer

    with attached(recipe, pipe):
        patch.around_call(denoiser.module, on_denoiser)
        for path, part in denoiser.module.named_modules():
            if quantisable(part):
                patch.around_call(part, on_layer(path))
        try:
            for i, call in enumerate(inputs):
                now["input"] = i
                pipeline_samples(pipe, {**call, **recipe.call_changes()}, seed + i)
                now["time"] = None
            seen.grid = sampling_grid(pipe.scheduler)[1]
        finally:
            patch.undo()
    if seen.times and not seen.calls:
        raise ValueError(
            f"{denoiser.slot} ran at {len(seen.times)} timesteps, none of them among those kept; "
            "keep more calls"
        )
    return seen


def _time(timestep: Tensor) -> float:
    """Of a call, in float32, as tables hold it; of several the largest, as ``Bins.set``."""
    return float(timestep.amax().float())


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _some_rows(x: Tensor) -> Tensor:
    """Rows (n, k) of a linear layer's input, or values of a convolution's by channel, evenly."""
    rows = x.detach().flatten(0, -2) if x.ndim < 4 else x.detach().movedim(1, -1).flatten(0, -2)
    return rows[:: max(1, len(rows) // ROWS)][:ROWS].float().clone()


class _Enough(Exception):
    """Raised to leave a forward whose rest is not wanted."""


@torch.no_grad()
def inputs_of(module: nn.Module, path: str, calls: Iterable[Call]) -> Iterator[Tensor]:
    """What the layer at ``path`` is given first in each call; the rest of it is not computed."""
    found: list[Tensor] = []
    patch = Patch()

    def layer(call_next: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(x.detach().clone())
        raise _Enough

    patch.around_call(module.get_submodule(path), layer)
    try:
        for call in calls:
            with suppress(_Enough):
                module(*call.args, **call.kwargs)
            yield from found
            found.clear()
    finally:
        patch.undo()


@torch.no_grad()
def inputs_and_outputs(
    module: nn.Module, path: str, calls: Iterable[Call]
) -> list[tuple[tuple[Any, ...], Mapping[str, Any], Any]]:
    """What the part at ``path`` is given and returns in each call: ``(args, kwargs, output)``."""
    found: list[tuple[tuple[Any, ...], Mapping[str, Any], Any]] = []
    patch = Patch()

    def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        given = tree_map(_copied, (args, kwargs))
        output = call_next(*args, **kwargs)
        found.append((*given, tree_map(_copied, output)))
        return output

    patch.around_call(module.get_submodule(path), layer)
    try:
        for call in calls:
            module(*call.args, **call.kwargs)
    finally:
        patch.undo()
    return found
