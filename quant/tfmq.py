"""Quantisation that knows the timestep: weights in 8 or 4 bits, activations in 8, real kernels.

TFMQ-DM (CVPR 2024, arXiv 2407.19547): modules of the timestep alone are kept apart from the rest
(temporal-information-aware reconstruction; or left whole, for ``TemporalCache`` to remove), static
activation scales for groups of timesteps (finite set calibration), weights by block reconstruction
with AdaRound along the sampler's own trajectory. Ours: symmetric weights, no attention products,
for each linear layer the activation scheme that does best on held-out samples, dynamic rows among
them, because static scales by timestep help UNets and not transformers. First and last layer stay
whole, as in the paper. Costs: packed weights beside the model's own (``weights="disk"`` maps them).
Where activations are whole, a layer's weights are made at each call, and none are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from accel.artifact import Artifact, ArtifactRef
from accel.clock import Run, denoiser_modules
from accel.compat import compiled_entry, is_compiled, unwatched
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from accel.patch import at_home, stand_in
from quant._layers import Bins, Kernel, Layer
from quant._samples import Samples
from quant._shelf import Shelved, with_weights_in_place
from quant._stored import bins_of, check_fits, layers_of, quantised

CLIPPED = 0.05  # share of a layer's inputs; on other noise than was calibrated it is below 0.002


@dataclass(frozen=True)
class TFMQ(Method):
    """Run a calibrated artifact (``quant.calibrate``): quantised layers for the model's own.

    kernel: "auto" uses integers where there are kernels that are fast at them (CPUs with VNNI; on
    GPUs linear layers, no convolutions) and the reference elsewhere, "int8" always, "reference"
    never. weights: the model's own, meanwhile: in place, or mapped from
    disk. What looks wrong is computed with the model's own weights, and counted: a layer whose
    inputs are clipped at the calibrated range by more than 5 %, a whole call whose output is not
    finite, or the same everywhere.
    """

    SLOTS = ("linear", "weights", "denoiser.call")
    PAPER = "TFMQ-DM, arXiv 2407.19547"

    artifact: ArtifactRef
    kernel: Kernel = "auto"
    weights: Literal["keep", "disk"] = "keep"

    def claims(self, pipe: Any) -> frozenset[Claim]:
        """``weights`` too: a student that writes others into the model would not be heard."""
        paths = frozenset(layers_of(Artifact.load(self.artifact)))
        slots = frozenset(d.slot for d in denoisers(pipe))
        return frozenset({("linear", paths), ("weights", paths), ("denoiser.call", slots)})

    def new_live(self, pipe: Any) -> Attached:
        return _Live(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _Live)
        artifact = Artifact.load(self.artifact)
        check_fits(artifact, pipe)
        live.made_with = artifact.guidance
        asked = {path.partition(".")[0] for path in layers_of(artifact)}
        for denoiser in denoisers(pipe):
            if denoiser.slot in asked:
                live.put_on(denoiser, artifact)


class _Live(Attached):
    method: TFMQ

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.layers: dict[str, Layer] = {}
        self.bins: dict[str, Bins] = {}
        self.homes: list[Shelved] = []
        self.whole = False  # whether all layers compute with the model's own weights now
        self.own: dict[str, Any] = {}  # the model's layers, by path as in ``layers``
        self.others: frozenset[str] = frozenset()  # layers whose own weights are others by now
        self.replaced = 0  # bytes of the model's own weights
        self.saturated: Counter[str] = Counter()  # calls in which a layer computed whole, by path

    def put_on(self, denoiser: Denoiser, artifact: Artifact) -> None:
        """Layers around the model's own, which stay in the module tree."""
        module: nn.Module = denoiser.module
        self.bins[denoiser.slot] = bins = bins_of(artifact, denoiser.slot)
        device = next(module.parameters()).device
        bins.to(device)
        for path, how in layers_of(artifact).items():
            slot, _, inner = path.partition(".")
            if slot != denoiser.slot:
                continue
            own: Any = module.get_submodule(inner)
            own = getattr(own, "base_layer", own)  # beside an adapter, which stays as it is
            layer = quantised(own, artifact.tensors, path, how)
            for piece in layer.pieces():
                piece.kernel, piece.bins = self.method.kernel, [bins]
                piece.pack()
            if self.method.kernel == "int8" and layer.pieces()[0].computed_by() == "reference":
                raise ValueError(
                    f"TFMQ(kernel='int8'): {path} has no integer kernel on {device} ({own}); use "
                    "kernel='reference', which is exact and slow, or 'auto'"
                )
            self.layers[path], self.own[path] = layer, own
            self.patch.around_call(own, self._around(path, layer, own))
            self.replaced += own.weight.nbytes
            if self.method.weights == "disk":
                self.homes.append(Shelved(own.weight, "disk"))
                self.patch.lend(own.weight, self.homes[-1])
        if self.homes:
            self.patch.around(module, "state_dict", with_weights_in_place(module))
        self.samples = Samples(lambda: [own.weight for own in self.own.values()])
        self.patch.around_call(denoiser.module, self._around_model(denoiser, bins))
        self.around_denoiser(denoiser.slot, self._watched(denoiser))

    def _around(self, path: str, layer: Layer, own: nn.Module) -> Callable[..., Any]:
        def run(call_next: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.whole or path in self.others:
                return call_next(x, *args, **kwargs)
            if torch.compiler.is_compiling():  # counts would be guards of the graph
                return layer(x)
            if not (self._is_differentiated(layer, x) or self._clips(path, layer, x)):
                self.count("changed")
                return layer(x)
            with at_home([own.weight] if self.homes else []):
                return call_next(x, *args, **kwargs)

        return run

    def _is_differentiated(self, layer: Layer, x: Tensor) -> bool:
        """Whether somebody wants a gradient that would get lost in integers."""
        if layer.scheme == "weight" or not (x.requires_grad and torch.is_grad_enabled()):
            return False
        self.fallback("layers with quantised activations have no gradients")
        return True

    def _clips(self, path: str, layer: Layer, x: Tensor) -> bool:
        """Whether the calibrated range is not one for these inputs."""
        with unwatched():  # a look at values, which decides nothing of what a trace shows
            shares = layer.clipped(x)
        self.count("syncs", len(shares) * x.is_cuda)
        if max(shares, default=0.0) <= CLIPPED:
            return False
        self.saturated[path] += 1
        self.fallback("a layer's inputs lay outside the calibrated range (calibrate on such)")
        return True

    def _around_model(self, denoiser: Denoiser, bins: Bins) -> Callable[..., Any]:
        def call(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.follow(denoiser.slot, denoiser.sample(args, kwargs).device)
            bins.set(denoiser.argument("timestep", args, kwargs))
            return call_next(*args, **kwargs)

        return call

    def follow(self, slot: str, device: torch.device) -> None:
        """To where the model computes: it may be moved, or offloaded, after attaching."""
        bins = self.bins[slot]
        if bins.index.device == device:
            return
        bins.to(device)
        for path, layer in self.layers.items():
            if path.startswith(f"{slot}."):
                layer.to(device)
                for piece in layer.pieces():
                    piece.pack()
        self._say_if_slow()

    def _watched(self, denoiser: Denoiser) -> Callable[..., Any]:
        """Outside a graph, if there is one."""
        weights = [p for p in denoiser.module.parameters() if self.homes]

        def call(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            output = call_next(*args, **kwargs)
            wrong = self._wrong(denoiser, output)
            if wrong is None:
                return output
            self.fallback(wrong)
            self.whole = True
            try:
                with at_home(weights):
                    output = call_next(*args, **kwargs)
            finally:
                self.whole = False
            still = self._wrong(denoiser, output)
            if still is not None:
                self.fallback(f"{still}, with the model's own weights too")
            return output

        return call

    def _wrong(self, denoiser: Denoiser, output: Any) -> str | None:
        self.count("syncs", int(self.bins[denoiser.slot].index.is_cuda))
        return _wrong(output)

    def on_run(self, run: Run) -> None:
        self.saturated.clear()
        for bins in self.bins.values():
            bins.off.zero_()
        for own in self.own.values() if self.homes else ():
            stand_in(own.weight)
        self._say_if_slow()
        parts = {slot: compiled_entry(m) for slot, m in denoiser_modules(self._pipe())}
        pairs = zip(self.own, self.samples.changed(), strict=True)
        self.others = frozenset(p for p, changed in pairs if changed or _is_fused(parts, p))
        self.count("syncs", int(any(b.index.is_cuda for b in self.bins.values())))
        if self.others:
            self.fallback("weights were changed after they were quantised (an adapter, fused?)")

    def _say_if_slow(self) -> None:
        pieces = [layer.pieces()[0] for layer in self.layers.values()]
        slow = any(x.wscale.device.type != "cpu" and x.computed_by() == "reference" for x in pieces)
        if slow and self.method.kernel != "reference":
            self.fallback(
                "no integer kernels on this device for some layers: the reference computes, slowly"
            )

    def on_run_end(self, run: Run) -> None:
        graphs = [slot for slot, module in denoiser_modules(self._pipe()) if is_compiled(module)]
        if graphs:
            self.detail["graphs"] = "ranges of layers' inputs are not looked at in compiled graphs"
            self.count("changed", run.calls)
        self._say_if_off_grid()
        self.detail["layers"] = dict(Counter(_kind(x) for x in self.layers.values()))
        self.detail["weights_bytes"] = self.replaced
        if self.saturated:
            self.detail["clipped_calls"] = dict(self.saturated)
        self.detail["quantised_bytes"] = sum(x.memory() for x in self.layers.values())

    def _say_if_off_grid(self) -> None:
        """Timesteps in between calibrated ones cost little, but a user must be able to see it."""
        by_time = any(p.by_time for layer in self.layers.values() for p in layer.pieces())
        if not by_time:
            return
        self.count("syncs", int(any(b.index.is_cuda for b in self.bins.values())))
        if any(bins.is_off_grid() for bins in self.bins.values()):
            said = "some timesteps were not calibrated: scales of the nearest ones were used"
            self.detail["grid"] = said
            self._warn_once(said, f"TFMQ: {said}", UserWarning)

    def memory(self) -> dict[str, int]:
        held = sum(layer.memory() for layer in self.layers.values())
        on_host = all(b.index.device.type == "cpu" for b in self.bins.values())
        return {"bytes_device": 0 if on_host else held, "bytes_host": held if on_host else 0}


def _kind(layer: Layer) -> str:
    return f"{layer.scheme}, {layer.bits} bits, {layer.pieces()[0].computed_by()}"


def _is_fused(parts: dict[str, Any], path: str) -> bool:
    slot, _, inner = path.partition(".")
    return bool(getattr(parts[slot].get_submodule(inner), "merged_adapters", ()))


def _wrong(output: Any) -> str | None:
    """What is certainly wrong with a denoiser's output, in words."""
    leaves = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]
    for x in leaves:
        if x.is_floating_point() and x.numel() > 1:
            low, high = torch.stack((x.amin(), x.amax())).tolist()  # one wait for the device
            if not (math.isfinite(low) and math.isfinite(high)):
                return "an output was not finite"
            if low == high:
                return "an output was the same everywhere"
    return None
