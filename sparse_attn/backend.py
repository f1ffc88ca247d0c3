"""Picks the kernel of dense attention: the first of a list that works on this pipeline, here.

diffusers has 27 of them behind one switch, `set_attention_backend`. It does nothing, silently,
where processors call torch's attention themselves (CogVideoX, DiT, UNets), and moves the default of
the whole process. Here a kernel is tried at attach on a small input of the pipeline's type, device
and head size; those processors are served, too; only this pipeline changes, while it runs.
Attention that a kernel refuses in a run (a mask, a head size) is left to the host's own. Kernels of
few bits overflow on some models, which ends in black videos: what a denoiser gives that is not
finite, or has a frame without any variation, is computed again by the host's kernel, which then
keeps the rest of the run. What a kernel costs in quality, `accel measure` says.
Costs: one flag read for each denoiser call (`watch`); operators are named in a run's first one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from accel import compat
from accel.clock import Run, denoiser_modules
from accel.method import Attached, Claim, Method
from sparse_attn import _dense
from sparse_attn._dense import Attention, attentions, fault

HOST = "host"  # what the pipeline has
FRAMES = {"CogVideoXTransformer3DModel": 1}  # axis of frames in a denoiser's output; else 2


@dataclass(frozen=True)
class AttentionBackend(Method):
    """Attend with the first kernel of `backends` that works on this pipeline, here.

    backends: names as diffusers' `set_attention_backend` has them, without a leading underscore
    ("flash", "flash_3", "sage", "xformers", "native_cudnn", ...); "host" is what the pipeline has.
    watch: compute what comes out broken again, by the host's kernel.
    """

    SLOTS = ("attention.kernel", "denoiser.call")
    PAPER = "diffusers 0.42"

    backends: tuple[str, ...] = ("flash_3", "flash", HOST)
    watch: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.backends:
            raise ValueError('AttentionBackend.backends = (): name at least one, such as "native"')

    def neutral(self) -> AttentionBackend:
        return AttentionBackend((HOST,), self.watch)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        paths = [f"{slot}.{a.path}" for slot, module in _inner(pipe) for a in attentions(module)]
        if not paths:
            raise ValueError(
                f"AttentionBackend: {type(pipe).__name__} has no denoiser with attention "
                "processors, which kernels are given to"
            )
        return frozenset({("attention.kernel", frozenset(paths))})

    def new_live(self, pipe: Any) -> Attached:
        return _Live(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _Live)
        live.choose(pipe, self.backends)
        if live.kernel is not None:
            for slot, module in _inner(pipe):
                live.adopt(slot, module)


def _inner(pipe: Any) -> list[tuple[str, Any]]:
    return [(slot, compat.compiled_entry(module)) for slot, module in denoiser_modules(pipe)]


class _Live(Attached):
    """The kernel that was chosen, where it is set in a run, and what it did."""

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        assert isinstance(method, AttentionBackend)
        self.watch = method.watch
        self.kernel: Any = None
        self.name = HOST
        self.refused: dict[str, str] = {}
        self._by_slot: dict[str, list[Attention]] = {}
        self._names: Counter[str] = Counter()
        self._looking = self._resting = False

    # -- attaching ---------------------------------------------------------------------------

    def choose(self, pipe: Any, names: tuple[str, ...]) -> None:
        """The first that works.

        Raises:
            ValueError: a name that diffusers does not have, or none works; says why each.
        """
        known = compat.attention_kernels()
        for name in names:
            if name not in (HOST, *known):
                raise ValueError(
                    f"AttentionBackend: there is no backend {name!r}; known: {HOST}, "
                    f"{', '.join(sorted(known))}"
                )
        for name in names:
            reason = None if name == HOST else _refusal(pipe, known[name])
            if reason is None:
                self.name, self.kernel = name, known.get(name)
                return
            self.refused[name] = reason
        said = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        raise ValueError(
            f"AttentionBackend: none of {', '.join(names)} works here. {said}. Add {HOST!r} to "
            "the list to go on with what the pipeline has"
        )

    def adopt(self, slot: str, module: Any) -> None:
        """Listen to a denoiser and its attentions."""
        self._by_slot[slot] = attentions(module)
        for attention in self._by_slot[slot]:

            def around(call_next: Callable, *args: Any, mine: Attention = attention, **kw: Any):
                return self._around_attention(mine, call_next, *args, **kw)

            self.around_call(attention.module, around)
        frames = FRAMES.get(type(module).__name__, 2)

        def watched(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            return self._around_denoiser(slot, frames, call_next, *args, **kwargs)

        self.around_denoiser(slot, watched)

    # -- a run -------------------------------------------------------------------------------

    @property
    def _all(self) -> list[Attention]:
        return [attention for found in self._by_slot.values() for attention in found]

    def on_run(self, run: Run) -> None:
        self._give_back()
        self._resting, self._looking = False, True
        self._names.clear()
        self.detail |= {"backend": self.name} | ({"refused": self.refused} if self.refused else {})
        native = compat.attention_kernels()["native"]
        for slot, module in denoiser_modules(self._pipe()):
            graphs = tuple(_dense.compiled_paths(module))
            for attention in self._by_slot.get(slot, ()):
                present = compat.attention_kernel_of(attention.processor)
                attention.left = (native if present is None else present) is self.kernel
                attention.in_graph = f"{attention.path}.".startswith(graphs)
        self._leave_what_graphs_hide()
        for attention in self._all:
            if not (attention.left or attention.direct):  # direct calls are rerouted one by one
                attention.patch.swap(attention.processor, compat.KERNEL_ATTRIBUTE, self.kernel)

    def on_run_end(self, run: Run) -> None:
        self._give_back()
        self.detail["attended"] = self.counts["changed"]  # attentions, by the chosen kernel
        if self._names:
            self.detail["kernels"] = dict(self._names)

    def _give_back(self) -> None:
        for attention in self._all:
            attention.patch.undo()

    def _leave_what_graphs_hide(self) -> None:
        """Graphs read the host's switch, but calls of torch's attention in them go their way."""
        inside = [a for a in self._all if a.in_graph and not a.left]
        for attention in inside:
            attention.left = attention.direct
        hidden = sum(a.left for a in inside)
        if hidden:
            self.fallback(f"{hidden} attentions call torch's own one inside compiled graphs")
        if len(inside) > hidden:
            self.detail["in compiled graphs"] = len(inside) - hidden

    def _hidden_by_compile(self) -> bool:
        return False  # what graphs hide is said above

    # -- an attention ------------------------------------------------------------------------

    def _around_attention(
        self, attention: Attention, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        taken = attention.taken
        if attention.left or self._resting:
            out = self._seen(attention, HOST, call_next, *args, **kwargs)
            self.count("computed", int(attention.taken == taken))
            return out
        route = _dense.Rerouted(self.kernel) if attention.direct else None
        try:
            with route or nullcontext():
                out = self._seen(attention, self.name, call_next, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _dense.REFUSALS as error:
            self._leave(attention)
            out = call_next(*args, **kwargs)  # raises again where the kernel is not to blame
            self.count("computed")
            self.fallback(f"{self.name} refuses an attention: {_dense.in_a_line(error)}")
            return out
        if attention.taken == taken:
            acted = route is None or route.calls > 0
            self.count("changed" if acted else "computed")
        return out

    def _leave(self, attention: Attention) -> None:
        """To the host's kernel for this run, with all that share its processor."""
        processor = attention.processor
        for other in self._all:
            if other.processor is processor:
                other.patch.undo()
                other.left = True

    def _seen(
        self, attention: Attention, name: str, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """In the first denoiser call, with the names of the operators that attend."""
        if not self._looking or attention.in_graph:
            return call_next(*args, **kwargs)
        kernel = compat.attention_kernel_of(attention.processor)
        if "flex" in (name, getattr(kernel, "value", None)):  # which cannot be looked into
            self._names["flex"] += 1
            return call_next(*args, **kwargs)
        taken = attention.taken
        with _dense.Names() as names:
            out = call_next(*args, **kwargs)
        if attention.taken == taken:
            self._names += names.counted(f"{name}, no operator of torch")
        return out

    # -- a denoiser call ---------------------------------------------------------------------

    def _around_denoiser(
        self, slot: str, frames: int, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        in_graphs = 0 if self._resting else sum(a.in_graph for a in self._acting(slot))
        try:
            out = call_next(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except _dense.REFUSALS as error:
            if not in_graphs:  # then attentions answer for themselves
                raise
            why = f"{self.name} refuses an attention in a graph: {_dense.in_a_line(error)}"
            return self._by_host(frames, why, call_next, *args, **kwargs)
        self._looking = False
        if self._resting or not self._acting(slot):
            return out
        self.count("changed", in_graphs)
        if not self.watch:
            return out
        self.count("syncs")
        wrong = fault(_sample(out), frames)
        if wrong is None:
            return out
        return self._by_host(frames, f"{self.name} gave {wrong}", call_next, *args, **kwargs)

    def _acting(self, slot: str) -> list[Attention]:
        return [a for a in self._by_slot[slot] if not a.left]

    def _by_host(
        self, frames: int, why: str, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """The call again, and the rest of the run, by the host's own kernel."""
        self._give_back()
        self._resting, self._looking = True, False
        out = call_next(*args, **kwargs)  # raises again where the kernel is not to blame
        if fault(_sample(out), frames) is not None:
            why += " (the host's own kernel, too)"
        self.fallback(f"{why}: the host's own kernel does the rest of the run")
        return out


def _sample(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


def _refusal(pipe: Any, kernel: Any) -> str | None:
    """For the shape that most attentions have; others find out in a run."""
    shapes: Counter[tuple[torch.dtype, int, int]] = Counter()
    for _, module in _inner(pipe):
        for attention in attentions(module):
            shapes[module.dtype, *attention.shape] += 1
            if compat.cannot_be_spread(attention.processor, kernel):
                return "it does not work with context parallelism, which is on"
    ((dtype, heads, width), _), *_ = shapes.most_common(1)
    device = getattr(pipe, "_execution_device", pipe.device)
    return _dense.refusal(kernel, heads, width, torch.empty((), dtype=dtype, device=device))
