"""Guidance by a tuned model: what it predicts, minus what its base does, enlarged.

RLG (arXiv 2508.21016): out = base + weight (tuned - base), in every guidance branch. For a model
tuned to a reward under a KL penalty, ``weight`` divides the penalty after training: 0 is the base,
1 the tuned model, above 1 more of what it was tuned for. No verifier is needed at sampling.

Mixed inside the denoiser, which equals mixing after guidance, both being linear; not so where a
pipeline's guidance is not (``guidance_rescale``, APG, dynamic thresholding). Costs a second call of
the denoiser where weight is neither 0 nor 1, and memory for a tuned copy of what an artifact
changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel import compat
from accel.artifact import Artifact, ArtifactRef
from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from accel.patch import Patch, exchanged
from samplers.distillation import merge
from samplers.predictions import with_sample

BASE = "base"  # the branch of the second call


def extrapolated(base: Tensor, tuned: Tensor, weight: float, channels: int) -> Tensor:
    """base + weight (tuned - base) in the first ``channels`` of (n, c, ...), float32 inside.

    Further channels are a learned variance: the tuned model's.
    """
    a, b = base[:, :channels].float(), tuned[:, :channels].float()
    mixed = (a + weight * (b - a)).to(tuned.dtype)
    return torch.cat([mixed, tuned[:, channels:]], 1) if tuned.shape[1] > channels else mixed


@dataclass(frozen=True)
class RLG(Method):
    """Guide by the difference that a tuning has made.

    One of: ``artifact``, changes to the pipeline's weights (of a ``Trainer``; the pipeline is the
    base), or ``adapter``, a LoRA that is loaded and on (the pipeline is the tuned model; of it the
    base goes without the denoiser's part alone, not a text encoder's). Guided from share ``start``
    of the steps that are made to ``stop``; outside only the tuned model runs.
    """

    SLOTS = ("denoiser.call", "temporal", "weights")
    PAPER = "arXiv 2508.21016"

    artifact: ArtifactRef | None = None
    adapter: str | None = None
    weight: float = 1.6
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.artifact is None) == (self.adapter is None):
            raise ValueError(f"{self}: give one of artifact, adapter")
        if self.weight < 0 or not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"{self}: weight 0 or more, 0 <= start < stop <= 1")

    def neutral(self) -> RLG:
        """The pipeline as it is: the base of an artifact, the tuned model of an adapter."""
        plain = dataclasses.replace(self, start=0.0, stop=1.0)
        return dataclasses.replace(plain, weight=1.0 if self.artifact is None else 0.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        slots = frozenset(d.slot for d in denoisers(pipe))
        if len(slots) > 1:
            raise ValueError(
                f"RLG: {type(pipe).__name__} has {len(slots)} denoisers, and a tuning is of one"
            )
        claims = {("denoiser.call", slots), ("temporal", slots)}  # what is known of one model
        return frozenset(claims if self.artifact is None else {*claims, ("weights", slots)})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveRLG(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveRLG)
        live.denoiser = denoisers(pipe)[0]
        if self.adapter is not None:
            compat.adapted_layers(live.denoiser.module, self.adapter)  # may refuse
        else:
            live.take(self.artifact)
        live.around_denoiser(live.denoiser.slot, live.call)


class _LiveRLG(Attached):
    denoiser: Denoiser
    changed: Mapping[Any, Tensor]  # parameter -> what it is in the tuned model

    def take(self, artifact: ArtifactRef | None) -> None:
        """Raises ``ValueError`` where an artifact is not for this model or method."""
        assert artifact is not None
        found, module = Artifact.load(artifact), self.denoiser.module
        found.check_method(RLG.name())
        found.check_model(module)
        if compat.is_offloaded(module):
            raise ValueError(
                "RLG: weights that are moved to and fro (offloading) cannot be exchanged; load the "
                "tuning as an adapter"
            )
        own = {n.replace(".base_layer.", "."): p for n, p in module.named_parameters()}
        with torch.no_grad():
            self.changed = {
                own[name]: value.detach().to(own[name]) for name, value in merge(own, found.tensors)
            }

    def on_run(self, run: Run) -> None:
        method = self.method
        assert isinstance(method, RLG)
        if method.artifact is not None and method.weight != 0:
            self.changed = {p: v.to(p.device, p.dtype) for p, v in self.changed.items()}

    def call(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser: the tuned model, and the base as a branch of its own."""
        method, now, run = self.method, self.now, self.clock.run
        assert isinstance(method, RLG)
        assert now is not None
        assert run is not None
        done, steps = run.made(now.step)
        guided = round(method.start * steps) <= done < round(method.stop * steps)
        weight = method.weight if guided else 1.0
        if weight == 0:
            with self.base():
                return self.noted(call_next(*args, **kwargs), method.adapter is not None)
        with self.tuned():
            tuned = self.noted(call_next(*args, **kwargs), method.artifact is not None)
        if weight == 1:
            return tuned
        rows = self.denoiser.batch_rows(args, kwargs)
        # last, because a cache context inside another one leaves none behind
        with self.clock.asked_again(BASE, rows), self.apart(now.branch), self.base():
            base = call_next(*args, **kwargs)
        self.count("changed")
        channels = self.denoiser.sample(args, kwargs).shape[1]
        return with_sample(tuned, extrapolated(base[0], tuned[0], weight, channels))

    def noted(self, output: Any, differs: bool) -> Any:
        self.count("computed")
        if differs:
            self.count("changed")
        return output

    def tuned(self) -> AbstractContextManager[Any]:
        method = self.method
        assert isinstance(method, RLG)
        return nullcontext() if method.artifact is None else exchanged(self.changed)

    def base(self) -> AbstractContextManager[Any]:
        """The denoiser without the tuning, for the length of a ``with`` block."""
        method, stack = self.method, ExitStack()
        assert isinstance(method, RLG)
        if method.adapter is not None:
            patch = Patch()
            stack.callback(patch.undo)
            for layer, name, others in compat.adapted_layers(self.denoiser.module, method.adapter):
                patch.swap(layer, name, others)
        return stack

    def apart(self, branch: str) -> AbstractContextManager[Any]:
        """The model's own caches (``enable_cache``) keep their state by the context's name."""
        context = getattr(self.denoiser.module, "cache_context", None)
        return nullcontext() if context is None else context(f"{branch}.{BASE}")

    def memory(self) -> dict[str, int]:
        """The tuned copy."""
        method = self.method
        assert isinstance(method, RLG)
        held = [] if method.artifact is None else list(self.changed.values())
        host = sum(t.nbytes for t in held if t.device.type == "cpu")
        return {"bytes_device": sum(t.nbytes for t in held) - host, "bytes_host": host}
