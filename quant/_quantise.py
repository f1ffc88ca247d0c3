"""One denoiser being quantised: which layers, their weights part by part, what is stored."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from accel.counting import synchronize
from accel.denoiser import Denoiser
from accel.method import Recipe, require_detached
from quant._activations import Groups, activations
from quant._dataflow import watch
from quant._layers import Bins, Layer
from quant._parts import Parts
from quant._program import Program, program
from quant._reconstruction import Rounding, reconstruct, reconstruct_temporal, rounded_by_gptq
from quant._recording import Recording, skip_splits
from quant._rounding import bits_of, largest_scale, nearest, per_channel, searched_scale
from quant._stored import Grids, quantised, refuse_adapters, stored

HELD = 3  # dimensions of arguments that may be conditions; see TemporalCache(hold="text")
TRIALS = 5  # of a kernel against the model's own layer
WHOLE = 16  # bits of a layer that stays as it is, whatever its type

Say = Callable[[str], None]


class OneDenoiser:
    """One denoiser being quantised. The pipeline's own is the teacher; a copy is the student.

    how: a ``TFMQCalibration``. folder: where finished parts lie; without one nothing is kept.
    """

    def __init__(
        self, how: Any, denoiser: Denoiser, seen: Recording, folder: Parts | None, say: Say
    ) -> None:
        self.how, self.denoiser, self.seen, self.folder, self.say = how, denoiser, seen, folder, say
        self.teacher: nn.Module = denoiser.module
        self.student = copy.deepcopy(self.teacher).requires_grad_(False)
        self.plan, self.sources, self.known = self._temporal_plan()
        self.splits = {} if how.skips == "joint" else skip_splits(denoiser)
        self.groups = Groups(seen.times, how.groups)
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.slower: set[str] = set()  # in integers, and whole for that
        self.seconds_before = 0.0  # that parts took which were found done
        self._grids: dict[str, tuple[Any, list[Grids]]] = {}

    # -- which layers --------------------------------------------------------------------------

    def _temporal_plan(self) -> tuple[Program, dict[str, Tensor], frozenset[str]]:
        """What depends on the timestep; its arguments; modules that see nothing of the sample."""
        call = self.seen.calls[0]
        sources = {
            name + keystr(where): leaf
            for name, value in self.denoiser.arguments(call.args, call.kwargs).items()
            for where, leaf in tree_flatten_with_path(value)[0]
            if isinstance(leaf, Tensor) and name != self.denoiser.sample_name and leaf.ndim <= HELD
        }
        with torch.no_grad():
            seen = watch(self.teacher, lambda: self.teacher(*call.args, **call.kwargs), sources)
        known = frozenset(p for p, calls in seen.calls.items() if all(c.known for c in calls))
        return program(seen, self.teacher), sources, known

    def _is_temporal(self, path: str) -> bool:
        served = self.plan.served
        return any(
            (path == p or path.startswith(p + ".")) and "timestep" in served[p].labels
            for p in served
        )

    def _to_be_cached(self, path: str) -> bool:
        """The paper's selection by error; with an exact cache, what is left to weigh is memory."""

        def worth(path: str) -> bool:
            call = self.plan.served[path]
            row = sum(t.nbytes // max(len(t), 1) for t in call.tensors)  # of one condition
            weights = sum(p.numel() for p in self.teacher.get_submodule(path).parameters())
            return row * len(self.seen.times) <= weights * self.how.bits / 8

        return any(
            (path == p or path.startswith(p + ".")) and worth(p)
            for p, call in self.plan.served.items()
            if "timestep" in call.labels
        )

    def candidates(self) -> list[str]:
        """Layers that may be quantised, in the order they run: all that no table replaces."""
        order = sorted(self.seen.layers, key=lambda p: self.seen.layers[p].order)
        if self.how.temporal != "cache":
            return order
        return [p for p in order if not self._to_be_cached(p)]

    def bits(self, path: str) -> int:
        """Of a layer's weights, as the plan or the calibration has it."""
        if self.how.plan is None:
            return self.how.bits
        return dict(self.how.plan).get(f"{self.denoiser.slot}.{path}", WHOLE)

    def chosen(self) -> list[str]:
        """Layers to quantise, in the order they run: the plan's, or all but the first and the last
        that the sample goes through, and perhaps the skips'.

        Raises:
            ValueError: the plan names a layer that no call went through.
        """
        if self.how.plan is not None:
            slot = f"{self.denoiser.slot}."
            unknown = {p.removeprefix(slot) for p in self.how.plan if p.startswith(slot)}
            unknown -= self.seen.layers.keys()
            if unknown:
                raise ValueError(
                    f"the plan has {slot}{min(unknown)}, which is no linear layer or convolution "
                    "that this pipeline uses; make the plan from this model"
                )
            order = sorted(self.seen.layers, key=lambda p: self.seen.layers[p].order)
            return [p for p in order if self.bits(p) < WHOLE]
        order = self.candidates()
        data = [p for p in order if p not in self.known]
        kept = {data[0], data[-1]} if data else set()
        if self.how.skips == "whole":
            kept |= self.splits.keys()
        return [p for p in order if p not in kept]

    def parts(self, layers: list[str]) -> Iterator[tuple[str, list[str]]]:
        """What is reconstructed together: transformer blocks, residual blocks, else one layer."""
        stages = ("unet.down", "unet.mid", "unet.up")
        units = [b.path for b in self.denoiser.blocks if b.kind not in stages]
        named = self.teacher.named_modules()
        units += [p for p, m in named if type(m).__name__.startswith("ResnetBlock")]
        left = list(layers)
        while left:
            first = left[0]
            unit = next((u for u in units if first.startswith(u + ".")), first)
            inside = [p for p in left if p == unit or p.startswith(unit + ".")]
            yield unit, inside
            left = [p for p in left if p not in inside]

    # -- weights -------------------------------------------------------------------------------

    def quantise(self, tensors: dict[str, Tensor], layers: dict[str, Any]) -> None:
        """Fill in what an artifact holds for this denoiser."""
        chosen = self.chosen()
        apart = self.how.temporal != "plain"
        temporal = [p for p in chosen if self._is_temporal(p)] if apart else []
        rest = [p for p in chosen if p not in temporal]
        units = [*([("temporal", temporal)] if temporal else []), *self.parts(rest)]
        slot = self.denoiser.slot
        for i, (unit, inside) in enumerate(units):
            began = time.monotonic()
            error = self._round(unit, inside)
            took = f"{time.monotonic() - began:.1f} s"
            self.say(f"{slot} {i + 1}/{len(units)} {unit}: {error} {took}")
        tensors |= self.times()
        for path in chosen:
            if path in self.slower:
                continue
            how, held = self.stored(path, self.codes[path], self.scales[path], self.bits(path))
            tensors |= held
            layers[f"{slot}.{path}"] = how
        if self.how.only_faster:
            faster = f"{len(chosen) - len(self.slower)} of {len(chosen)} layers"
            self.say(
                f"{slot}: {faster} are faster in integers here; the others stay as they are "
                "(ask for every layer for size)"
            )

    def times(self) -> dict[str, Tensor]:
        """What an artifact holds of this denoiser's timesteps."""
        slot = self.denoiser.slot
        return {
            f"{slot}:times": bits_of(self.groups.times),
            f"{slot}:groups": self.groups.index,
        }

    def bins(self) -> Bins:
        bins = Bins(len(self.groups.times)).fill(self.groups.times, self.groups.index)
        return bins.to(self.device)

    def stored(
        self, path: str, codes: Tensor, scale: Tensor, bits: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """How a layer is made, and its tensors, as in an artifact."""
        scheme, grids = self._activations(path)
        how: dict[str, Any] = {"bits": bits, "scheme": scheme}
        if path in self.splits:
            how["split"] = self.splits[path]
        return how, stored(f"{self.denoiser.slot}.{path}", how, codes, scale, grids)

    def layer(self, path: str, how: dict[str, Any], tensors: dict[str, Tensor]) -> Layer:
        """A layer as it would run, but for its groups of timesteps."""
        own = self.teacher.get_submodule(path)
        return quantised(own, tensors, f"{self.denoiser.slot}.{path}", how)

    def _activations(self, path: str) -> tuple[Any, list[Grids]]:
        """The scheme of a layer, and static grids of each of its pieces; chosen once."""
        if path not in self._grids:
            weight, pieces = self.weight(path), [self.seen.layers[path]]
            weights = [weight]
            if path in self.splits:
                pieces = list(self.seen.pieces[path])
                weights = list(weight.tensor_split([self.splits[path]], 1))
            found = [
                activations(self.how.activations, w, seen, self.groups)
                for w, seen in zip(weights, pieces, strict=True)
            ]
            self._grids[path] = found[0][0], [grids for _, grids in found]
        return self._grids[path]

    def scale(self, path: str, bits: int) -> Tensor:
        """Of a layer's weights: (o), or one for each value where two pieces have their own."""
        weight = self.weight(path)
        search = largest_scale if self.how.rounding == "nearest" else searched_scale
        if path not in self.splits:
            return search(weight, bits)
        both = weight.tensor_split([self.splits[path]], 1)
        return torch.cat([per_channel(search(w, bits), w.ndim).expand_as(w) for w in both], 1)

    def _round(self, unit: str, inside: list[str]) -> str:
        """Codes of the layers in one part, in the student too (but for those that are slower in
        integers, where that matters); kept in the folder."""
        weights = {p: self.weight(p) for p in inside}
        slot = self.denoiser.slot
        kinds = ("codes", "scale", "faster") if self.how.only_faster else ("codes", "scale")
        names = {"seconds"} | {f"{p}:{kind}" for p in inside for kind in kinds}
        found = None if self.folder is None else self.folder.load(slot, unit, names)
        if found is not None:
            self.seconds_before += float(found["seconds"])
            found = {name: t.to(self.device) for name, t in found.items()}
        else:
            began = time.monotonic()
            scales = {p: self.scale(p, self.bits(p)) for p in weights}
            codes = self._codes(unit, weights, scales)
            found = {f"{p}:codes": c.to(torch.int8) for p, c in codes.items()}
            found |= {f"{p}:scale": s for p, s in scales.items()}
            if self.how.only_faster:
                made = {p: self.stored(p, codes[p], scales[p], self.bits(p)) for p in inside}
                found |= {f"{p}:faster": torch.tensor(self.faster(p, *made[p])) for p in inside}
            found["seconds"] = torch.tensor(time.monotonic() - began)
            if self.folder is not None:
                self.folder.save(slot, unit, found)
        total, off = 0.0, 0.0
        for path, weight in weights.items():
            self.codes[path], self.scales[path] = found[f"{path}:codes"], found[f"{path}:scale"]
            made = self.codes[path].float() * per_channel(self.scales[path], weight.ndim)
            off += float((made - weight).pow(2).sum())
            total += float(weight.pow(2).sum())
            if not found.get(f"{path}:faster", True):
                self.slower.add(path)
                continue
            self.student.get_submodule(path).weight.copy_(made)  # type: ignore[operator, union-attr]
        return f"relative weight error {(off / max(total, 1e-30)) ** 0.5:.4f},"

    def _codes(
        self, unit: str, weights: dict[str, Tensor], scales: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        how, bits = self.how.rounding, {p: self.bits(p) for p in weights}
        if unit == "temporal" and how != "nearest":
            return self._tiar(weights, scales, bits)
        if how == "nearest":
            return {p: nearest(w, scales[p], bits[p]) for p, w in weights.items()}
        calls = self.seen.calls
        if how == "gptq":
            codes: dict[str, Tensor] = {}
            for path, weight in weights.items():
                if getattr(self.teacher.get_submodule(path), "groups", 1) > 1 or weight.ndim > 4:
                    codes[path] = nearest(weight, scales[path], bits[path])
                else:
                    codes[path] = rounded_by_gptq(
                        self.student, path, scales[path], bits[path], calls
                    )
            return codes
        inner = {p: f"{p[len(unit) + 1 :]}.weight" if p != unit else "weight" for p in weights}
        rounding = Rounding(
            {inner[p]: w for p, w in weights.items()},
            {inner[p]: s for p, s in scales.items()},
            {inner[p]: b for p, b in bits.items()},
        )
        reconstruct(self.student, self.teacher, unit, rounding, calls, self.how.steps)
        return {p: rounding.codes()[inner[p]] for p in weights}

    def _tiar(
        self, weights: dict[str, Tensor], scales: dict[str, Tensor], bits: dict[str, int]
    ) -> dict[str, Tensor]:
        name = "{}.weight".format
        rounding = Rounding(
            {name(p): w for p, w in weights.items()},
            {name(p): s for p, s in scales.items()},
            {name(p): b for p, b in bits.items()},
        )
        everything = {**dict(self.student.named_parameters()), **dict(self.student.named_buffers())}
        shape = self.sources["timestep"]
        times = [torch.full_like(shape, t) for t in self.seen.times]
        reconstruct_temporal(self.plan, self.sources, times, rounding, everything, self.how.steps)
        return {p: rounding.codes()[name(p)] for p in weights}

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def weight(self, path: str) -> Tensor:
        """A layer's own, float32."""
        weight: Any = self.teacher.get_submodule(path).weight
        return weight.detach().float()

    @torch.no_grad()
    def temporal_error(self) -> float:
        """Relative error of what depends on the timestep, over the grid, by its weights."""
        times = [torch.full_like(self.sources["timestep"], t) for t in self.seen.times]
        made = []
        for model in (self.teacher, self.student):
            weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            made.append(self.plan.play(weights.__getitem__, self.sources, times))
        off, total = 0.0, 0.0
        for whole, rounded in zip(*made, strict=True):
            for path, tensors in whole.items():
                if "timestep" not in self.plan.served[path].labels:
                    continue
                for a, b in zip(tensors, rounded[path], strict=True):
                    off += float((a - b).pow(2).sum())
                    total += float(a.pow(2).sum())
        return (off / max(total, 1e-30)) ** 0.5

    # -- time ----------------------------------------------------------------------------------

    def faster(self, path: str, how: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Whether the integer kernel beats the model's own layer at the shape that was seen."""
        ours, theirs = self.seconds(path, how, tensors)
        return ours < theirs

    @torch.no_grad()
    def seconds(
        self, path: str, how: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[float, float]:
        """Of the quantised layer and the model's own, at the shape that was seen, in turn."""
        layer, own = self.layer(path, how, tensors), self.teacher.get_submodule(path)
        for piece in layer.pieces():
            part: Any = piece
            if part.scheme == "static":  # any group: all take the same time
                part.ascale, part.azero = part.ascale[:1], part.azero[:1]
        weight = self.weight(path)
        x = torch.randn(self.seen.layers[path].shape, device=weight.device)
        x = x.to(own.weight.dtype)  # type: ignore[union-attr, arg-type]
        return _quickest(lambda: layer(x), lambda: own(x))


def _quickest(*fns: Callable[[], Any]) -> Any:
    """Least seconds of each, timed in turn after a first call."""
    seconds: list[list[float]] = [[] for _ in fns]
    for trial in range(TRIALS + 1):
        for fn, kept in zip(fns, seconds, strict=True):
            synchronize()
            began = time.perf_counter()
            fn()
            synchronize()
            if trial:
                kept.append(time.perf_counter() - began)
    return tuple(min(kept) for kept in seconds)


def check_host(pipe: Any, recipe: Recipe) -> None:
    """Raises ``ValueError`` where the weights to quantise would not be those that run: something
    attached, adapters, or a recipe with a student's weights."""
    require_detached(pipe, "calibrating")
    refuse_adapters(pipe)
    for method in recipe.methods:
        if any(slot == "weights" for slot, _ in method.claims(pipe)):
            raise ValueError(
                f"{method.name()} has weights of its own, which quantised layers would not see; "
                "leave it out"
            )
