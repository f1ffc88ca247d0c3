"""Which layers in 4 bits, which in 8, which as they are: measured layer by layer, within a budget.

``measured`` puts one layer at a time into few bits and looks at the denoiser's output (relative
squared error over recorded calls): nothing is known of a layer but what it does. ``steps_down``
orders all changes by what they save for what they spoil (errors of layers add up, to first order),
and a budget says how far to go: bytes of weights, time of layers, or quality, which is measured on
whole runs (``for_quality``). The plan is a file to read and to edit; a calibration follows it.

Weights are rounded to the nearest here, so what a calibration then makes of the plan is no worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from torch.utils._pytree import tree_flatten

from accel import strict_yaml
from accel.denoiser import denoisers
from accel.files import write_atomically
from accel.method import Recipe
from accel.patch import Patch
from accel.settings import settings_json
from quant._parts import Parts, conditions
from quant._quantise import WHOLE, OneDenoiser, Say, check_host
from quant._recording import record
from quant._rounding import nearest

FORMATS = (8, 4)
SMALLEST_ERROR = 1e-12  # so that a layer which changes nothing is the first to go, not a division
Saves = Literal["bytes", "seconds"]


@dataclass(frozen=True)
class LayerCosts:
    """One layer by the bits of its weights: bytes, seconds of a call, and what it spoils."""

    path: str
    bytes: dict[int, int]
    seconds: dict[int, float]
    error: dict[int, float]  # relative squared error of the denoiser's output; 0 for WHOLE


# -- choosing --------------------------------------------------------------------------------


def steps_down(layers: list[LayerCosts], saves: Saves) -> list[tuple[str, int]]:
    """Changes (path, bits) from all layers whole to all in the least, the best bargain first.

    A layer may go down more than once. Only changes that save anything are there.
    """
    now = {layer.path: WHOLE for layer in layers}
    found: list[tuple[str, int]] = []
    while True:
        offers = [
            (_bargain(layer, now[layer.path], bits, saves), layer.path, bits)
            for layer in layers
            for bits in FORMATS
            if bits < now[layer.path]
        ]
        best = max(offers, default=(0.0, "", 0))
        if best[0] <= 0:
            return found
        now[best[1]] = best[2]
        found.append(best[1:])


def _bargain(layer: LayerCosts, now: int, bits: int, saves: Saves) -> float:
    costs: dict[int, Any] = getattr(layer, saves)
    return (costs[now] - costs[bits]) / max(layer.error[bits] - layer.error[now], SMALLEST_ERROR)


def taken(layers: list[LayerCosts], steps: list[tuple[str, int]]) -> dict[str, int]:
    """Bits by path after some changes."""
    return {layer.path: WHOLE for layer in layers} | dict(steps)


def total(layers: list[LayerCosts], plan: Mapping[str, int], what: str) -> float:
    """Bytes, seconds or error of all layers under a plan."""
    return sum(getattr(layer, what)[plan[layer.path]] for layer in layers)


def within(layers: list[LayerCosts], saves: Saves, share: float) -> dict[str, int]:
    """The first plan whose bytes (or seconds) are at most ``share`` of those of whole layers.

    Raises:
        ValueError: nothing is so small (or so fast).
    """
    steps = steps_down(layers, saves)
    most = share * total(layers, taken(layers, []), saves)
    for i in range(len(steps) + 1):
        plan = taken(layers, steps[:i])
        if total(layers, plan, saves) <= most:
            return plan
    least = total(layers, taken(layers, steps), saves) / total(layers, taken(layers, []), saves)
    raise ValueError(
        f"{saves} of the layers can not be brought to {share:.2f} of what they are whole; the "
        f"least is {math.ceil(least * 100) / 100:.2f}"
    )


def for_quality(
    layers: list[LayerCosts], quality: Callable[[dict[str, int]], float], least: float
) -> tuple[dict[str, int], float]:
    """The smallest plan whose measured quality is at least this, and that quality.

    Bisection over the changes in their order, each trial measured; that quality falls along them
    is assumed, that the plan returned has it was seen.

    Raises:
        ValueError: the first change already costs more.
    """
    steps = steps_down(layers, "bytes")
    good, bad, seen = 0, len(steps) + 1, math.inf
    while bad - good > 1:
        middle = (good + bad) // 2
        found = quality(taken(layers, steps[:middle]))
        if found >= least:
            good, seen = middle, found
        else:
            bad = middle
    if good == 0:
        raise ValueError(f"no layer can be quantised at a quality of {least:g}; ask for less")
    return taken(layers, steps[:good]), seen


# -- measuring -------------------------------------------------------------------------------


def measured(
    pipe: Any,
    inputs: list[dict[str, Any]],
    how: Any,
    out: str,
    recipe: Recipe | None = None,
    say: Say = print,
) -> list[LayerCosts]:
    """Costs of every layer that no table of ``TemporalCache`` replaces, first and last among them.

    how: a ``TFMQCalibration``, which says what is done with activations. A layer that was measured
    (with as many threads, which seconds depend on) lies in ``out`` and is not measured again.

    Raises:
        ValueError: no inputs, weights that are not those that run (see ``check_host``), or a folder
            of another measurement.
    """
    if not inputs:
        raise ValueError("mixed_precision.measured: no inputs")
    recipe = recipe or Recipe(())
    check_host(pipe, recipe)
    threads = {"threads": torch.get_num_threads()}
    work = settings_json(how) | threads | conditions(pipe, inputs, recipe)
    folder = Parts(Path(out), work)
    found: list[LayerCosts] = []
    for denoiser in denoisers(pipe):
        seen = record(pipe, denoiser, inputs, recipe, calls=how.calls, seed=how.seed)
        if not seen.calls:
            continue  # never called
        one = OneDenoiser(how, denoiser, seen, None, say)
        wanted = [_outputs(one, call) for call in seen.calls]
        paths = one.candidates()
        for i, path in enumerate(paths):
            name = f"{denoiser.slot}.{path}"
            file = folder.path / f"{name}.json"
            if (kept := _kept(name, file)) is None:
                costs = json.dumps(_costs_of(one, path, wanted))
                write_atomically(file, costs.encode())
                kept = _read_costs(name, costs)
            found.append(kept)
            spoils = ", ".join(f"{b} bits {found[-1].error[b] ** 0.5:.5f}" for b in FORMATS)
            say(f"{denoiser.slot} {i + 1}/{len(paths)} {path}: relative error {spoils}")
    return found


def _costs_of(one: OneDenoiser, path: str, wanted: list[list[Tensor]]) -> dict[str, Any]:
    own: Any = one.teacher.get_submodule(path)
    found: dict[str, Any] = {
        "bytes": {WHOLE: own.weight.nbytes},
        "seconds": {},
        "error": {WHOLE: 0.0},
    }
    for bits in FORMATS:
        scale, weight = one.scale(path, bits), one.weight(path)
        how, tensors = one.stored(path, nearest(weight, scale, bits), scale, bits)
        layer = one.layer(path, how, tensors)
        found["bytes"][bits] = sum(t.nbytes for t in tensors.values())
        found["error"][bits] = _spoils(one, own, layer, wanted)
        if WHOLE not in found["seconds"]:  # the same for all widths: one kernel
            quantised, whole = one.seconds(path, how, tensors)
            found["seconds"] = {WHOLE: whole, **dict.fromkeys(FORMATS, quantised)}
    return found


def _read_costs(name: str, text: str | bytes) -> LayerCosts:
    costs = json.loads(text)
    return LayerCosts(name, **{k: {int(b): x for b, x in v.items()} for k, v in costs.items()})


def _kept(name: str, file: Path) -> LayerCosts | None:
    """``None`` if the layer was not measured, or its file was damaged: then it is done again."""
    try:
        return _read_costs(name, file.read_bytes()) if file.is_file() else None
    except (ValueError, AttributeError, TypeError):
        return None


def _spoils(one: OneDenoiser, own: Any, layer: Any, wanted: list[list[Tensor]]) -> float:
    """Relative squared error of the denoiser's outputs with one layer in few bits."""
    off = whole = 0.0
    bins = one.bins()
    for piece in layer.pieces():
        piece.bins = [bins]
    patch = Patch()
    patch.around_call(own, lambda call_next, x, *args, **kwargs: layer(x))
    try:
        for call, outputs in zip(one.seen.calls, wanted, strict=True):
            bins.set(call.time)
            for a, b in zip(_outputs(one, call), outputs, strict=True):
                off += float((a - b).double().pow(2).sum())
                whole += float(b.double().pow(2).sum())
    finally:
        patch.undo()
    return off / max(whole, 1e-30)


@torch.no_grad()
def _outputs(one: OneDenoiser, call: Any) -> list[Tensor]:
    leaves = tree_flatten(one.teacher(*call.args, **call.kwargs))[0]
    return [x.float() for x in leaves if isinstance(x, Tensor)]


# -- the file --------------------------------------------------------------------------------

HEAD = """\
# Bits of each layer's weights: 4, 8, or 16 (left as it is). To be edited at will, then:
#   accel calibrate tfmq --model MODEL --plan THIS_FILE --out RECIPE.yaml
# spoils: relative error of the denoiser's output with this layer alone in so many bits.
"""


def write_plan(
    path: Path, layers: list[LayerCosts], plan: Mapping[str, int], about: Mapping[str, Any]
) -> None:
    """A line a layer, in the order they run; ``about``: what the plan was chosen for."""
    lines = [HEAD + yaml.safe_dump(dict(about), sort_keys=False) + "layers:"]
    for layer in layers:
        spoils = ", ".join(f"{b}: {math.sqrt(layer.error[b]):.2g}" for b in FORMATS)
        kilobytes = layer.bytes[WHOLE] / 1024
        faster = layer.seconds[WHOLE] / layer.seconds[8]
        lines.append(
            f"  {layer.path}: {plan[layer.path]}  # spoils {{{spoils}}}, {kilobytes:.0f} KiB, "
            f"{faster:.1f}x in integers"
        )
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_plan(path: Path) -> dict[str, int]:
    """Bits by layer.

    Raises:
        ValueError: the file is no plan; says where.
    """
    try:
        record = strict_yaml.read(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = record.get("layers") if isinstance(record, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{path} is no plan: it has no `layers`, each with 4, 8 or {WHOLE} bits")
    for name, bits in layers.items():
        if type(bits) is not int or bits not in (*FORMATS, WHOLE):
            raise ValueError(f"{path}: {name} has {bits!r}; bits are 4, 8 or {WHOLE}")
    return {str(name): bits for name, bits in layers.items()}
