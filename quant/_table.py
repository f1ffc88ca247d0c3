"""The table of what is known before the sample is: entries, conditions they hold for, a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from quant._dataflow import PLAIN, ModuleCall
from quant._grid import TIMESTEP, Time
from quant._program import Program, rows_alike

OBJECTS_KEPT = 2  # of one value: pipelines give both guidance branches theirs


@dataclass(frozen=True)
class Entry:
    """One module's output: its tensors, with the batch they are spread over (0: as they are)."""

    leaves: tuple[tuple[Tensor, int, int], ...]  # (tensor, rows it is spread over, version)

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Entry:
        """Rows that are all alike are kept once."""
        held = [(t[:1].clone(), len(t)) if rows_alike(t) else (_own(t), 0) for t in tensors]
        return cls(tuple((t, rows, version(t)) for t, rows in held))

    def intact(self) -> bool:
        """Whether nobody has written into what was given out."""
        return all(version(t) == seen for t, _, seen in self.leaves)

    def tensors(self) -> list[Tensor]:
        """The output's tensors: not to be written into, which ``intact`` would tell."""
        return [_spread(*leaf) for leaf in self.leaves]


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of a larger one."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.preserve_format)


def _spread(tensor: Tensor, rows: int, seen: int) -> Tensor:
    if rows:
        return tensor.expand(rows, *tensor.shape[1:]).contiguous()
    if seen < 0:
        return tensor.clone()
    return tensor


@dataclass
class Condition:
    """What a call holds fixed: objects for a quick look, values to be sure."""

    objects: dict[str, list[tuple[Tensor, int]]]  # of each source the latest, with their versions
    values: dict[str, Tensor]
    used: bool = True
    compared: int = 0  # values that were looked at, each of which waits for the device

    @classmethod
    def of(cls, sources: Mapping[str, Tensor]) -> Condition:
        objects = {k: [(v, version(v))] for k, v in sources.items()}
        return cls(objects, {k: v.clone() for k, v in sources.items()})

    def knows(self, sources: Mapping[str, Tensor]) -> bool:
        """Whether it has seen these very objects, which nobody has written into since."""
        return all(self._knows(k, v) for k, v in sources.items())

    def fits(self, sources: Mapping[str, Tensor]) -> bool:
        """Whether these have its values; then it knows them from now on."""
        return all(self._knows(k, v) or self._equals(k, v) for k, v in sources.items())

    def _knows(self, name: str, tensor: Tensor) -> bool:
        known = self.objects[name]
        return any(x is tensor and seen == version(tensor) >= 0 for x, seen in known)

    def _equals(self, name: str, tensor: Tensor) -> bool:
        value = self.values[name]
        if value.shape != tensor.shape:
            return False
        self.compared += 1
        if not torch.equal(value, tensor):
            return False
        self.objects[name] = [*self.objects[name], (tensor, version(tensor))][-OBJECTS_KEPT:]
        return True


def version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass
class Plan:
    """A program for calls of one form, and the table that it filled."""

    program: Program
    table: dict[tuple[Any, ...], Entry] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    placeholders: dict[str, Any] = field(default_factory=dict)
    used: set[tuple[Any, ...]] = field(default_factory=set)  # places in the table, in this run
    off_grid: set[tuple[Any, ...]] = field(default_factory=set)  # places that no grid had told

    def key(self, path: str, time: Time, condition: int) -> tuple[Any, ...]:
        labels = self.program.served[path].labels
        timed = time if TIMESTEP in labels else None
        return path, timed, id(self.conditions[condition]) if labels - {TIMESTEP} else None

    def has(self, time: Time, condition: int) -> bool:
        places = (self.key(p, time, condition) for p in self.program.needed)
        return all(p in self.table and self.table[p].intact() for p in places)

    def take(self, path: str, time: Time, condition: int) -> Entry:
        place = self.key(path, time, condition)
        self.used.add(place)
        return self.table[place]

    def note_off_grid(self, time: Time, condition: int) -> None:
        places = {self.key(path, time, condition) for path in self.program.needed}
        self.off_grid |= {place for place in places if place[1] is not None}

    def condition(self, sources: Mapping[str, Tensor]) -> tuple[int | None, int]:
        """Which of its conditions these are, and how many values were compared to know."""
        for i, known in enumerate(self.conditions):
            if known.knows(sources):
                known.used = True
                return i, 0
        before = sum(known.compared for known in self.conditions)
        found = next((i for i, known in enumerate(self.conditions) if known.fits(sources)), None)
        if found is not None:
            self.conditions[found].used = True
        return found, sum(known.compared for known in self.conditions) - before

    def keep(self, all_of_grids: bool) -> None:
        """Entries that this run used, and perhaps those of other runs' grids; at its end."""
        kept = self.table.keys() & self.used
        if all_of_grids:
            kept |= self.table.keys() - self.off_grid
        self.table = {k: v for k, v in self.table.items() if k in kept}
        self.off_grid &= kept
        self.used = set()


def rebuilt(call: ModuleCall, tensors: list[Tensor]) -> Any:
    """The output of a module call, with these for its tensors."""
    assert call.spec is not None
    left = iter(tensors)
    known = [next(left) if not isinstance(x, PLAIN) else x for x in call.leaves]
    return tree_unflatten(known, call.spec)


def equal(output: Any, tensors: list[Tensor]) -> bool:
    made = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]
    return all(torch.equal(a, b) for a, b in zip(made, tensors, strict=True))


def placeholder(call: ModuleCall) -> Any:
    """What a module returns that nothing but other served modules sees: one NaN of its shape."""
    blank = [t.new_full((), float("nan") if t.is_floating_point() else 0) for t in call.tensors]
    made = [b.expand(t.shape) for b, t in zip(blank, call.tensors, strict=True)]
    call.tensors = []
    return rebuilt(call, made)
