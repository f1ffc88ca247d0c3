"""One denoiser being quantised: which layers, their weights part by part, activation schemes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from accel.artifact import inputs_digest, write_atomically
from accel.denoiser import Denoiser
from accel.settings import settings_json
from quant._dataflow import watch
from quant._layers import Scheme, layer_for
from quant._program import Program, program
from quant._reconstruction import Rounding, reconstruct, reconstruct_temporal, rounded_by_gptq
from quant._recording import LayerInputs, Recording
from quant._rounding import (
    bits_of,
    largest_scale,
    nearest,
    pack4,
    per_channel,
    searched_scale,
    static_grid,
    through_static,
    through_token,
)

HELD = 3  # dimensions of arguments that may be conditions; see TemporalCache(hold="text")
TRIALS = 5  # of a kernel against the model's own layer

Say = Callable[[str], None]


class OneDenoiser:
    """One denoiser being quantised. The pipeline's own is the teacher; a copy is the student."""

    def __init__(
        self, how: Any, denoiser: Denoiser, seen: Recording, folder: Parts, say: Say
    ) -> None:
        self.how, self.denoiser, self.seen, self.folder, self.say = how, denoiser, seen, folder, say
        self.teacher: nn.Module = denoiser.module
        self.student = copy.deepcopy(self.teacher).requires_grad_(False)
        self.plan, self.sources = self._temporal_plan()
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    # -- which layers --------------------------------------------------------------------------

    def _temporal_plan(self) -> tuple[Program, dict[str, Tensor]]:
        call = self.seen.calls[0]
        sources = {
            name + keystr(where): leaf
            for name, value in self.denoiser.arguments(call.args, call.kwargs).items()
            for where, leaf in tree_flatten_with_path(value)[0]
            if isinstance(leaf, Tensor) and name != self.denoiser.sample_name and leaf.ndim <= HELD
        }
        with torch.no_grad():
            seen = watch(self.teacher, lambda: self.teacher(*call.args, **call.kwargs), sources)
        return program(seen, self.teacher), sources

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
            weights = sum(p.nbytes for p in self.teacher.get_submodule(path).parameters())
            return row * len(self.seen.times) <= weights * self.how.bits / 32

        return any(
            (path == p or path.startswith(p + ".")) and worth(p)
            for p, call in self.plan.served.items()
            if "timestep" in call.labels
        )

    def chosen(self) -> list[str]:
        """Layers to quantise, in the order they run."""
        order = sorted(self.seen.layers, key=lambda p: self.seen.layers[p].order)
        data = [p for p in order if not self._is_temporal(p)]
        kept = {data[0], data[-1]} if data else set()
        if self.how.temporal == "cache":
            kept |= {p for p in order if self._to_be_cached(p)}
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
        for i, (unit, inside) in enumerate(units):
            began = time.monotonic()
            error = self._round(unit, inside)
            took = f"{time.monotonic() - began:.1f} s"
            self.say(f"{self.denoiser.slot} {i + 1}/{len(units)} {unit}: {error} {took}")
        times, groups = self._groups()
        slot = self.denoiser.slot
        tensors |= {f"{slot}:times": bits_of(times), f"{slot}:groups": groups}
        for path in chosen:
            scheme, grids = self._activations(path, times, groups)
            if self.how.only_faster and not self._faster(path, scheme, grids):
                continue
            name, codes = f"{slot}.{path}", self.codes[path].to(torch.int8)
            tensors[f"{name}:q"] = pack4(codes) if self.how.bits == 4 else codes
            tensors[f"{name}:wscale"] = bits_of(self.scales[path])
            if grids is not None:
                tensors |= {f"{name}:ascale": bits_of(grids[0]), f"{name}:azero": grids[1]}
            layers[name] = {"bits": self.how.bits, "scheme": scheme}

    def _round(self, unit: str, inside: list[str]) -> str:
        """Codes of the layers in one part, in the student too; kept in the folder."""
        weights = {p: self._weight(p) for p in inside}
        found = self.folder.load(self.denoiser.slot, unit)
        if found is None:
            search = largest_scale if self.how.rounding == "nearest" else searched_scale
            scales = {p: search(w, self.how.bits) for p, w in weights.items()}
            codes = self._codes(unit, weights, scales)
            found = {f"{p}:codes": c.to(torch.int8) for p, c in codes.items()}
            found |= {f"{p}:scale": s for p, s in scales.items()}
            self.folder.save(self.denoiser.slot, unit, found)
        total, off = 0.0, 0.0
        for path, weight in weights.items():
            self.codes[path], self.scales[path] = found[f"{path}:codes"], found[f"{path}:scale"]
            made = self.codes[path].float() * per_channel(self.scales[path], weight.ndim)
            off += float((made - weight).pow(2).sum())
            total += float(weight.pow(2).sum())
            self.student.get_submodule(path).weight.copy_(made)  # type: ignore[operator, union-attr]
        return f"relative weight error {(off / max(total, 1e-30)) ** 0.5:.4f},"

    def _codes(
        self, unit: str, weights: dict[str, Tensor], scales: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        bits, how = self.how.bits, self.how.rounding
        if unit == "temporal" and how != "nearest":
            return self._tiar(weights, scales)
        if how == "nearest":
            return {p: nearest(w, scales[p], bits) for p, w in weights.items()}
        calls = self.seen.calls
        if how == "gptq":
            codes: dict[str, Tensor] = {}
            for path, weight in weights.items():
                if getattr(self.teacher.get_submodule(path), "groups", 1) > 1 or weight.ndim > 4:
                    codes[path] = nearest(weight, scales[path], bits)
                else:
                    codes[path] = rounded_by_gptq(self.student, path, scales[path], bits, calls)
            return codes
        inner = {p: f"{p[len(unit) + 1 :]}.weight" if p != unit else "weight" for p in weights}
        rounding = Rounding(
            {inner[p]: w for p, w in weights.items()},
            {inner[p]: s for p, s in scales.items()},
            bits,
        )
        reconstruct(self.student, self.teacher, unit, rounding, calls, self.how.steps)
        return {p: rounding.codes()[inner[p]] for p in weights}

    def _tiar(self, weights: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{p}.weight": w for p, w in weights.items()}
        rounding = Rounding(named, {f"{p}.weight": scales[p] for p in weights}, self.how.bits)
        everything = {**dict(self.student.named_parameters()), **dict(self.student.named_buffers())}
        shape = self.sources["timestep"]
        times = [torch.full_like(shape, t) for t in self.seen.times]
        reconstruct_temporal(self.plan, self.sources, times, rounding, everything, self.how.steps)
        return {p: rounding.codes()[f"{p}.weight"] for p in weights}

    def _weight(self, path: str) -> Tensor:
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

    # -- activations ---------------------------------------------------------------------------

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Calibrated timesteps, and the group of each: as many groups of neighbours as asked."""
        steps = len(self.seen.times)
        groups = torch.arange(steps) * min(self.how.groups, steps) // steps
        return torch.tensor(self.seen.times), groups

    def _activations(
        self, path: str, times: Tensor, groups: Tensor
    ) -> tuple[Scheme, tuple[Tensor, Tensor] | None]:
        """The scheme of one layer and its static grids."""
        asked, inputs = self.how.activations, self.seen.layers[path]
        linear = isinstance(self.teacher.get_submodule(path), nn.Linear)
        if asked == "whole":
            return "weight", None
        if asked == "token" and linear:
            return "token", None
        one, many = (
            static_grids(inputs, times, torch.zeros_like(groups)),
            static_grids(inputs, times, groups),
        )
        if asked == "static":
            return "static", one
        if asked in ("groups", "token"):
            return "static", many
        group_of = dict(zip(times.tolist(), groups.tolist(), strict=True))
        errors: dict[str, float] = {
            "one": self._error(path, lambda t, x: through_static(x, one[0][0], one[1][0])),
            "many": self._error(
                path,
                lambda t, x: through_static(x, many[0][group_of[t]], many[1][group_of[t]]),
            ),
        }
        if linear:
            errors["token"] = self._error(path, lambda t, x: through_token(x))
        best = min(errors, key=lambda k: errors[k])
        if best == "token":
            return "token", None
        return "static", one if best == "one" else many

    def _error(self, path: str, through: Callable[[float, Tensor], Tensor]) -> float:
        """Squared error of the layer's output, by rows of the second half of the calls."""
        weight: Any = self._weight(path)
        weight = weight if weight.ndim == 2 else weight.flatten(2).abs().sum(2)
        rows = self.seen.layers[path].rows
        total = 0.0
        for when, x in rows[len(rows) // 2 :]:
            if x.shape[1] != weight.shape[1]:  # a grouped convolution
                total += float((through(when, x) - x).pow(2).mean())
            else:
                total += float(F.linear(through(when, x) - x, weight).pow(2).mean())
        return total

    def _faster(self, path: str, scheme: Scheme, grids: tuple[Tensor, Tensor] | None) -> bool:
        """Whether the integer kernel beats the model's own layer at the shape that was seen."""
        own: Any = self.teacher.get_submodule(path)
        groups = 1 if grids is None else len(grids[0])
        layer: Any = layer_for(own, bits=self.how.bits, scheme=scheme, groups=groups)
        layer.fill(self.codes[path], self.scales[path], own.bias, grids)
        if grids is not None:
            layer.ascale, layer.azero = layer.ascale[:1], layer.azero[:1]
        x = torch.randn(self.seen.layers[path].shape)
        with torch.no_grad():
            ours, theirs = _quickest(lambda: layer(x)), _quickest(lambda: own(x))
        return ours < theirs


def static_grids(inputs: LayerInputs, times: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, from its timesteps and the next one either side."""
    known = [t for t in times.tolist() if t in inputs.low]
    low = torch.stack([inputs.low[t] for t in known])
    high = torch.stack([inputs.high[t] for t in known])
    group_of = dict(zip(times.tolist(), groups.tolist(), strict=True))
    own = torch.tensor([group_of[t] for t in known])
    lows, highs = [], []
    for group in range(int(groups.max()) + 1):
        inside = (own == group).nonzero().flatten()
        if not len(inside):
            lows.append(low.min())
            highs.append(high.max())
            continue
        begin, end = max(int(inside[0]) - 1, 0), int(inside[-1]) + 2
        lows.append(low[begin:end].min())
        highs.append(high[begin:end].max())
    return static_grid(torch.stack(lows), torch.stack(highs))


def _quickest(fn: Callable[[], Any]) -> float:
    fn()
    seconds = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# what another run over a folder may change: it has nothing to do with the weights
_NOT_WEIGHTS = ("activations", "groups", "only_faster")


class Parts:
    """Finished parts on disk, of one calibration (``how``)."""

    def __init__(self, path: Path, how: Any, inputs: list[dict[str, Any]]) -> None:
        self.path = path
        weights_only = {k: v for k, v in settings_json(how).items() if k not in _NOT_WEIGHTS}
        text = json.dumps({"how": weights_only, "inputs": inputs_digest(inputs)}, sort_keys=True)
        mark = path / "calibration.json"
        if mark.is_file() and mark.read_text() != text:
            raise ValueError(f"{path} holds another calibration; give another folder")
        write_atomically(mark, text.encode())

    def _file(self, slot: str, unit: str) -> Path:
        return self.path / f"{slot}.{unit}.safetensors"

    def load(self, slot: str, unit: str) -> dict[str, Tensor] | None:
        file = self._file(slot, unit)
        return load_file(file) if file.is_file() else None

    def save(self, slot: str, unit: str, tensors: dict[str, Tensor]) -> None:
        held = {k: v.detach().contiguous() for k, v in tensors.items()}
        write_atomically(self._file(slot, unit), save(held))
