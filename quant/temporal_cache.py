"""Compute once per run, exactly, what does not depend on the sample; its weights may leave.

The cache-based maintenance of TFMQ-DM's journal version (arXiv 2407.19547), kept in the model's own
precision, so its error is zero: modules that depend on the timestep alone, or on it and on what a
call holds fixed (class, guidance, pooled or whole text), give the same outputs in every run over a
grid. They are found by following the tensors of one forward (``quant/_dataflow.py``), never listed.
Their outputs for the steps to come are made by their own operations, at the run's own shapes, the
first time that a grid and its conditions are seen; then they are read from a table, and their
weights lie in host memory or on disk until ``detach``.

Costs: the table on the device. What other runs used stays in it while it is no larger than the
weights it replaces. One synchronisation a denoiser call on an accelerator, to read the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from accel import compat
from accel.clock import Run, denoiser_modules
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from accel.patch import at_home, stand_in, values_of
from quant._dataflow import PLAIN, ModuleCall, watch
from quant._grid import TIMESTEP, Time, steps_to_come, time_key, with_tensor_time
from quant._program import Program, program, small_enough
from quant._samples import Samples
from quant._shelf import Shelved, with_weights_in_place
from quant._table import Condition, Entry, Plan, equal, placeholder, rebuilt, version

Hold = Literal["timestep", "pooled", "text"]
MOST_DIMENSIONS = {"timestep": -1, "pooled": 2, "text": 3}  # of arguments that are held fixed
CONDITIONS_KEPT = PLANS_KEPT = 8  # plans that a run has no use for: of other batches or texts
FILLS = 4  # of the table in one run; conditions that go on changing are computed step by step
OFF_GRID = "some timesteps were not on the sampler's grid: each was computed when it came"
LEAST_ELEMENTS = 64  # of a tensor that is worth moving


@dataclass(frozen=True)
class TemporalCache(Method):
    """Read what depends on timestep and conditions from an exact table; move its weights away.

    hold: what is taken to be fixed in a run beside the timestep: nothing more ("timestep"), one
    vector a sample ("pooled": class, guidance, pooled text), or texts too ("text"). If it changes
    after all it is noticed, and computed. weights: where they lie meanwhile, in host memory (on a
    CPU they stay where they are), mapped from disk, or kept in place; adapters can be fused only
    into weights that are in place. uncalibrated: what to do at a timestep that the sampler's grid
    does not have. largest: a module is left alone if its part of the table would be larger than
    this times its weights.
    """

    SLOTS = ("temporal", "denoiser.call")
    PAPER = "TFMQ-DM's cache-based maintenance, arXiv 2407.19547"

    hold: Hold = "text"
    weights: Literal["host", "disk", "keep"] = "host"
    uncalibrated: Literal["compute", "refuse"] = "compute"
    largest: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest <= 0:
            raise ValueError(f"TemporalCache.largest = {self.largest}: above 0")

    def claims(self, pipe: Any) -> frozenset[Claim]:
        slots = frozenset(d.slot for d in denoisers(pipe))
        return frozenset({("temporal", slots), ("denoiser.call", slots)})

    def new_live(self, pipe: Any) -> Attached:
        return _Live(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _Live)
        for denoiser in denoisers(pipe):
            served = _Served(self, live, denoiser)
            live.served[denoiser.slot] = served
            live.around_call(denoiser.module, served.call)
            whole = with_weights_in_place(denoiser.module)
            live.patch.around(denoiser.module, "state_dict", whole)


class _Live(Attached):
    method: TemporalCache

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.served: dict[str, _Served] = {}

    def on_run(self, run: Run) -> None:
        for slot, module in denoiser_modules(self._pipe()):
            self.served[slot].begin(compiled=compat.is_compiled(module))

    def on_run_end(self, run: Run) -> None:
        self.detail["denoisers"] = {slot: s.end() for slot, s in self.served.items()}
        if any(facts["outside_grid"] for facts in self.detail["denoisers"].values()):
            self._warn_once(OFF_GRID, f"TemporalCache: {OFF_GRID}", UserWarning)

    def memory(self) -> dict[str, int]:
        tables = sum(s.table_bytes() for s in self.served.values())
        on_host = all(s.device.type == "cpu" for s in self.served.values())
        shelves = sum(home.nbytes for s in self.served.values() for home in s.homes.values())
        host = tables if on_host else 0
        return {"bytes_device": tables - host, "bytes_host": host + shelves}

    def detach(self) -> None:
        super().detach()
        for served in self.served.values():
            served.clear()


class _Served:
    """One denoiser: what is known in it, the table, and where its weights are."""

    def __init__(self, method: TemporalCache, live: _Live, denoiser: Denoiser) -> None:
        self.method, self.live, self.denoiser = method, live, denoiser
        self.module: Any = denoiser.module
        self.plans: dict[Any, Plan | None] = {}
        self.homes: dict[str, Shelved] = {}
        self.layers: dict[str, nn.Module] = {}  # which module at a path has a layer
        self.now: dict[str, Callable[[], Any]] = {}
        self.stamp: Any = None
        self.samples: Samples | None = None  # of the weights that are served
        self.hidden = False
        self.fills = self.outside_grid = self.watched = 0

    # -- a run ---------------------------------------------------------------------------------

    def begin(self, compiled: bool) -> None:
        """A run begins: start afresh if weights or modules are others than before."""
        self.fills = self.outside_grid = self.watched = 0
        stamp = self._stamp()
        if compiled and not self.hidden:
            self.live.fallback("the denoiser is compiled as one graph, which hides its modules")
        fused = self.samples is not None and stamp == self.stamp and any(self.samples.changed())
        self.live.count("syncs", int(self.samples is not None and self.device.type == "cuda"))
        if compiled or stamp != self.stamp or fused:
            self.clear()
            stamp = self._stamp()
        self.hidden, self.stamp = compiled, stamp
        for name, parameter in self.module.named_parameters():
            if name in self.homes:
                stand_in(parameter)

    def end(self) -> dict[str, Any]:
        """Forget what this run had no use for; what was served, in numbers."""
        self._shrink()
        for plan in filter(None, self.plans.values()):
            gone = {id(c) for c in plan.conditions if not c.used}
            plan.conditions = [c for c in plan.conditions if c.used]
            plan.table = {k: v for k, v in plan.table.items() if k[2] not in gone}
            for condition in plan.conditions:
                condition.used = False
        served = {p for plan in filter(None, self.plans.values()) for p in plan.program.served}
        return {
            "modules": len(served),
            "weights_bytes": sum(p.nbytes for p in self._weights_of(served).values()),
            "moved_bytes": sum(p.nbytes for n, p in self._named().items() if n in self.homes),
            "table_bytes": self.table_bytes(),
            "watched_calls": self.watched,
            "outside_grid": self.outside_grid,
        }

    def _shrink(self) -> None:
        """Timesteps off the grid; all of other runs, where the table has outgrown the weights."""
        used = {form for form, plan in self.plans.items() if plan is not None and plan.used}
        if not used:
            return
        paths = {path for plan in filter(None, self.plans.values()) for path in plan.program.served}
        weights = sum(p.nbytes for p in self._weights_of(paths).values())
        fits = self.table_bytes() <= self.method.largest * weights
        others = [form for form in self.plans if form not in used] if fits else []
        kept = [*others[-PLANS_KEPT:], *used]
        if len(kept) < len(self.plans):
            self.plans = {form: self.plans[form] for form in kept}
            self.samples = self.samples and Samples(self._served_weights)
            self.live.count("syncs", int(self.device.type == "cuda"))
        for plan in filter(None, self.plans.values()):
            plan.keep(all_of_grids=fits)

    def clear(self) -> None:
        """Weights back in place, nothing known."""
        if self.homes:
            self.live.patch.take_back()
        self.plans, self.homes, self.samples = {}, {}, None

    # -- a call --------------------------------------------------------------------------------

    def call(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser, inside all other methods' layers."""
        if self.hidden:
            return call_next(*args, **kwargs)
        args, kwargs = with_tensor_time(self.denoiser, args, kwargs)
        sources, form = self._sources(args, kwargs)
        if form not in self.plans:
            return self._watch(form, lambda: call_next(*args, **kwargs), sources)
        if self.plans[form] is None:
            return call_next(*args, **kwargs)
        self.now = self._ready(form, sources)
        try:
            return call_next(*args, **kwargs)
        finally:
            self.now = {}

    def _sources(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """Arguments that are held fixed, and the form of the call: everything but values."""
        sources, form = {}, []
        most = MOST_DIMENSIONS[self.method.hold]
        for name, value in self.denoiser.arguments(args, kwargs).items():
            for where, leaf in tree_flatten_with_path(value)[0]:
                label = name + keystr(where)
                if isinstance(leaf, Tensor):
                    form.append((label, leaf.shape, leaf.dtype, leaf.device))
                    fixed = name != self.denoiser.sample_name and leaf.ndim <= most
                    if name == TIMESTEP or fixed:
                        sources[label] = leaf
                else:
                    form.append((label, leaf if isinstance(leaf, PLAIN) else id(leaf)))
        return sources, tuple(form)

    def _watch(self, form: Any, run: Callable[[], Any], sources: Mapping[str, Tensor]) -> Any:
        """Run a call of a new form with all weights in place, and make a plan of what it showed."""
        self.watched += 1
        self.live.count("syncs", int(self.device.type == "cuda"))
        skip = self._inside_graphs()
        with at_home(list(self._named().values())):
            watched = watch(self.module, run, sources, skip)
        self.plans[form] = None
        if watched.read_by_python:
            self.live.fallback(f"the model reads {sorted(watched.read_by_python)} in Python")
            return watched.output
        found = program(watched, self.module, self._worth(), refused=skip)
        if found.needed:
            seen = {p: found.served[p].tensors for p in found.needed}
            self.plans[form] = plan = Plan(found)
            plan.placeholders = {p: placeholder(c) for p, c in found.served.items()}
            ready = self._ready(form, sources)
            if not all(equal(ready[p](), t) for p, t in seen.items()):
                self.plans[form] = None
                self.live.fallback("the model did not do the same again")
            else:
                self._shelve(found)
        return watched.output

    def _worth(self) -> Callable[[ModuleCall], bool]:
        run = self.live.clock.run
        steps = len(set(run.timesteps)) if run is not None else 1
        return small_enough(self.module, steps, self.method.largest)

    def _ready(self, form: Any, sources: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
        """See to it that the table has what this call needs; what each module is to return."""
        plan = self.plans[form]
        assert plan is not None
        labels = plan.program.labels() - {TIMESTEP}
        condition = self._condition(plan, {k: sources[k] for k in sorted(labels)})
        time = time_key(sources[TIMESTEP])
        self.live.count("syncs", int(self.device.type == "cuda"))
        if not plan.has(time, condition):
            self._fill(plan, time, condition, sources)
        served = plan.program.served
        ready: dict[str, Callable[[], Any]] = {}
        for path in served:
            if path in plan.program.needed:
                entry = plan.take(path, time, condition)
                ready[path] = lambda e=entry, c=served[path]: rebuilt(c, e.tensors())
            else:
                ready[path] = lambda made=plan.placeholders[path]: made
        return ready

    def _condition(self, plan: Plan, sources: Mapping[str, Tensor]) -> int:
        found, compared = plan.condition(sources)
        self.live.count("syncs", compared * (self.device.type == "cuda"))
        if found is not None:
            return found
        plan.conditions.append(Condition.of(sources))
        if len(plan.conditions) > CONDITIONS_KEPT:
            gone = id(plan.conditions.pop(0))
            plan.table = {k: v for k, v in plan.table.items() if k[2] != gone}
        return len(plan.conditions) - 1

    def _fill(self, plan: Plan, time: Time, condition: int, sources: Mapping[str, Tensor]) -> None:
        """Compute entries for this step and, where the grid tells them, for those to come."""
        now = sources[TIMESTEP]
        to_come = steps_to_come(self.live.clock.run, self.scheduler, now)
        if not any(time_key(t) == time for t in to_come):
            if self.method.uncalibrated == "refuse":
                raise ValueError(
                    f"TemporalCache(uncalibrated='refuse'): timestep {time[-1]} is not on the grid "
                    "of this run; sample on the scheduler's own grid, or use 'compute'"
                )
            self.outside_grid += 1
            to_come = []
            plan.note_off_grid(time, condition)
        self.fills += 1
        if self.fills > FILLS or not to_come:
            to_come = [now]
        times = {time_key(t): t for t in to_come}
        missing = {k: t for k, t in times.items() if not plan.has(k, condition)}
        weights = {**self._named(), **dict(self.module.named_buffers())}
        made = plan.program.play(
            lambda name: values_of(weights[name]), sources, list(missing.values())
        )
        for key, outputs in zip(missing, made, strict=True):
            for path, tensors in outputs.items():
                place = plan.key(path, key, condition)
                if place not in plan.table or not plan.table[place].intact():
                    plan.table[place] = Entry.of(tensors)
                    self.live.count("computed")

    # -- its modules ---------------------------------------------------------------------------

    def _layer(self, path: str, part: nn.Module) -> Callable[..., Any]:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if path in self.now and self.layers[path] is part:
                self.live.count("reused")
                return self.now[path]()
            with self._in_place(part):
                return call_next(*args, **kwargs)

        return layer

    def _in_place(self, part: nn.Module) -> AbstractContextManager[None]:
        if not self.homes or compat.is_compiling():
            return nullcontext()
        return at_home(list(part.parameters()))

    def _shelve(self, found: Program) -> None:
        """Layers on what is served; its weights off the device, where that frees anything."""
        for path in found.served:
            part = self.module.get_submodule(path)
            if self.layers.get(path) is not part:  # else an adapter was put in its place
                self.layers[path] = part
                self.live.patch.around_call(part, self._layer(path, part))
        stays = self.method.weights == "keep" or (
            self.method.weights == "host" and self.device.type == "cpu"
        )
        if compat.is_offloaded(self.module):
            return
        for name, parameter in self._weights_of(found.served).items():
            if not stays and name not in self.homes and parameter.numel() >= LEAST_ELEMENTS:
                try:
                    home = Shelved(parameter, self.method.weights)
                except OSError as error:
                    self.live.fallback(f"weights stay in place ({error.strerror})")
                    break
                self.homes[name] = home
                self.live.patch.lend(parameter, home)
        self.samples = Samples(self._served_weights)

    def _served_weights(self) -> list[nn.Parameter]:
        """Of all plans' modules, in an order that stays."""
        paths = {p for plan in filter(None, self.plans.values()) for p in plan.program.served}
        parts = [self.module.get_submodule(path) for path in sorted(paths)]
        return [p for part in parts for p in part.parameters()]

    def _weights_of(self, paths: Any) -> dict[str, nn.Parameter]:
        """Parameters that only these modules own."""
        inside = {id(p) for path in paths for p in self.module.get_submodule(path).parameters()}
        named = self.module.named_parameters(remove_duplicate=False)
        prefixes = tuple(f"{path}." for path in paths)
        outside = {id(p) for name, p in named if not name.startswith(prefixes)}
        return {n: p for n, p in self._named().items() if id(p) in inside - outside}

    def _inside_graphs(self) -> set[str]:
        """Modules that are compiled, and what lies in them: no layer is seen there."""
        parts = [(path, part) for path, part in self.module.named_modules() if path]
        graphs = tuple(path for path, part in parts if compat.is_compiled(part))
        return {p for p, _ in parts if any(p == g or p.startswith(g + ".") for g in graphs)}

    def _stamp(self) -> Any:
        """Changes when modules or weights are replaced, written into, or compiled."""
        modules = tuple(
            (id(m), compat.is_compiled(m), *compat.adapter_state(m)) for m in self.module.modules()
        )
        weights = tuple((id(p), version(p)) for p in self.module.parameters())
        return modules, weights, sum(home.writes for home in self.homes.values())

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def table_bytes(self) -> int:
        plans = filter(None, self.plans.values())
        return sum(t.nbytes for p in plans for e in p.table.values() for t, *_ in e.leaves)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def scheduler(self) -> Any:
        pipe: Any = self.live._pipe()
        return pipe.scheduler
