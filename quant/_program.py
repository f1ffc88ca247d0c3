"""Which modules of a watched denoiser a table can serve, and how to compute what they give.

From ``_dataflow.watch``: the outermost known modules that hold weights, those of them whose output
reaches data, and the operations that those outputs follow from (``Program``), which are played for
any timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from quant._dataflow import ModuleCall, Operation, Ref, Watched


@dataclass
class Program:
    """Modules whose outputs are known before the sample is, and how to compute them.

    served: outermost known modules by path, each with its (only) output. needed: those of them
    whose output reaches the data; the others only feed them, and what they return does not matter.
    ops: what computes the needed ones, in order.
    """

    served: dict[str, ModuleCall]
    needed: frozenset[str]
    ops: dict[int, Operation]
    constants: dict[str, Tensor]
    timestep: str = "timestep"

    def labels(self) -> frozenset[str]:
        return frozenset().union(*(self.served[p].labels for p in self.needed))

    def play(
        self,
        weight: Callable[[str], Tensor],
        sources: Mapping[str, Tensor],
        times: list[Tensor],
    ) -> list[dict[str, list[Tensor]]]:
        """Outputs of the needed modules at every time: ``[{path: known leaves}]``.

        What does not depend on the time runs once. All times go through one operation before the
        next one, so a weight (``weight(name)``) is fetched once and let go after its last use.
        """
        given = [{**sources, self.timestep: time} for time in times]
        values: list[dict[tuple[int, int], Tensor]] = [{} for _ in times]
        fetched: dict[str, Tensor] = {}
        once = not any(op.mutates for op in self.ops.values())
        last_use = {r.name: i for i, op in self.ops.items() for r in op.weights()}

        def tensor_of(leaf: Any, i: int) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if leaf.kind == "value":
                return values[i][leaf.op, leaf.out]
            return {"weight": fetched, "constant": self.constants, "source": given[i]}[leaf.kind][
                leaf.name
            ]

        for index, op in self.ops.items():
            fetched |= {r.name: weight(r.name) for r in op.weights() if r.name not in fetched}
            made: list[Any] = []
            for i in range(len(times)):
                if i == 0 or not once or self.timestep in op.labels:
                    args, kwargs = tree_map(lambda x, i=i: tensor_of(x, i), (op.args, op.kwargs))
                    made = tree_flatten(op.func(*args, **kwargs))[0]
                values[i].update({(index, out): tensor for out, tensor in enumerate(made)})
            for name in [n for n in fetched if last_use[n] == index]:
                del fetched[name]
        return [
            {
                path: [tensor_of(r, i) for r in self.served[path].leaves if isinstance(r, Ref)]
                for path in self.needed
            }
            for i in range(len(times))
        ]


def small_enough(
    module: nn.Module, steps: int, largest: float, timestep: str = "timestep"
) -> Callable[[ModuleCall], bool]:
    """Whether a module's part of a table of ``steps`` is at most ``largest`` of its weights."""

    def worth(call: ModuleCall) -> bool:
        weights = sum(p.nbytes for p in module.get_submodule(call.path).parameters())
        return table_bytes(call, steps, timestep) <= largest * weights

    return worth


def table_bytes(call: ModuleCall, steps: int, timestep: str = "timestep") -> int:
    """Of one module's outputs, once a step if they depend on it; rows that are alike count once."""
    one = sum(t.nbytes // (t.shape[0] if rows_alike(t) else 1) for t in call.tensors)
    return one * (steps if timestep in call.labels else 1)


def rows_alike(tensor: Tensor) -> bool:
    """Whether all rows of a batch have the same bits."""
    rows = tensor.shape[0] if tensor.ndim else 0
    if rows < 2 or not tensor.is_contiguous():
        return False
    if tensor.is_meta:
        return True
    bits = tensor.view(torch.uint8) if tensor.ndim > 1 else tensor
    return torch.equal(bits, bits[:1].expand_as(bits))


def program(
    watched: Watched,
    module: nn.Module,
    worth: Callable[[ModuleCall], bool] = lambda call: True,
    refused: Collection[str] = (),
    timestep: str = "timestep",
) -> Program:
    """Choose the outermost known modules that hold weights and are ``worth`` it.

    A module that is not worth its output is computed as ever, and what is inside it may be chosen.
    """
    refused = set(refused)
    while True:
        served = _outermost(watched, module, refused)
        needed, escaped = _needed(watched, served)
        bad = escaped | {p for p in needed if not worth(served[p])}
        if not bad:
            break
        refused |= bad
    if _some_module_was_not_called(watched, module):
        needed = frozenset(served)  # it may ask for any of them at another step
    ops = _operations(watched, served, needed)
    used = {r.name for op in ops.values() for r in op.refs() if r.kind == "constant"}
    constants = {k: v for k, v in watched.constants.items() if k in used}
    return Program(served, needed, ops, constants, timestep)


def _outermost(watched: Watched, module: nn.Module, refused: set[str]) -> dict[str, ModuleCall]:
    """Known modules with weights that lie in no other one, each with its first call."""
    found: dict[str, ModuleCall] = {}
    for path, part in module.named_modules():  # parents come before what is in them
        calls = watched.calls.get(path, [])
        above = any(path.startswith(p + ".") for p in found)
        weighs = next(part.parameters(), None) is not None
        if path in refused or above or not weighs or not calls or not all(c.known for c in calls):
            continue
        if all(_same_output(calls[0], c) for c in calls[1:]):
            found[path] = calls[0]
    return found


def _same_output(a: ModuleCall, b: ModuleCall) -> bool:
    """Whether two calls of one module returned the same, so that it matters not which is asked."""
    if a.spec != b.spec or len(a.tensors) != len(b.tensors):
        return False
    for x, y in zip(a.tensors, b.tensors, strict=True):
        if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            return False
        if not x.is_meta and not torch.equal(x, y):
            return False
    return True


def _needed(watched: Watched, served: Mapping[str, ModuleCall]) -> tuple[frozenset[str], set[str]]:
    """Of served modules, whose output reaches data; and those that let something else escape."""
    owner: dict[int, str] = {}
    for path in served:
        for call in watched.calls[path]:
            owner.update(dict.fromkeys(range(call.begin, call.end), path))
    outputs = {
        p: {r for c in watched.calls[p] for r in c.leaves if isinstance(r, Ref)} for p in served
    }
    needed, escaped, seen, todo = set(), set(), set(), list(watched.exposed)
    while todo:
        ref = todo.pop()
        if ref in seen or ref.kind != "value":
            continue
        seen.add(ref)
        path = owner.get(ref.op)
        if path is None:
            todo += watched.ops[ref.op].refs()
        elif ref in outputs[path]:
            needed.add(path)
        else:
            escaped.add(path)
    return frozenset(needed), escaped


def _some_module_was_not_called(watched: Watched, module: nn.Module) -> bool:
    parts = ((path, part) for path, part in module.named_modules() if path)
    own = (path for path, part in parts if next(part.parameters(recurse=False), None) is not None)
    return any(path not in watched.calls for path in own)


def _operations(
    watched: Watched, served: Mapping[str, ModuleCall], needed: Iterable[str]
) -> dict[int, Operation]:
    """What the needed outputs follow from, in order; writes into known tensors always stay."""
    live: set[int] = set()
    todo = [r for path in needed for r in served[path].leaves if isinstance(r, Ref)]
    if todo:
        todo += [Ref("value", op=i) for i, op in enumerate(watched.ops) if op.mutates]
    while todo:
        ref = todo.pop()
        if ref.kind == "value" and ref.op not in live:
            live.add(ref.op)
            todo += watched.ops[ref.op].refs()
    return {i: watched.ops[i] for i in sorted(live)}
