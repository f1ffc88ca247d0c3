"""What in a denoiser depends on which of its arguments: one forward, watched by operations.

``watch`` runs a call under a dispatch mode that follows every tensor from the arguments that are
held fixed (the timestep, a class, a text) and the weights. What an operation makes of such tensors
alone is *known*; one tensor that comes from the sample makes it *data*. No architecture is listed,
no values are compared, and a forward on the meta device does, which is how models that fit no
machine are counted. The operations on known tensors are kept: played again with another timestep
they give, bit for bit, what the modules would give (``_program.Program``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from accel.patch import Patch

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Ref:
    """A known tensor: an argument, a weight, a constant, or output ``out`` of operation ``op``."""

    kind: str  # "source", "weight", "constant", "value"
    name: str = ""
    op: int = -1
    out: int = 0


@dataclass
class Operation:
    """One operator call on known tensors; tensors in its arguments are ``Ref``."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: frozenset[str]  # arguments that it depends on
    mutates: bool

    def refs(self) -> list[Ref]:
        leaves, _ = tree_flatten((self.args, self.kwargs))
        return [x for x in leaves if isinstance(x, Ref)]

    def weights(self) -> list[Ref]:
        return [r for r in self.refs() if r.kind == "weight"]


@dataclass
class ModuleCall:
    """One call of a module: which operations lie in it, and what it returned.

    ``leaves``: of the returned tree; ``Ref`` for a known tensor, ``None`` for data.
    """

    path: str
    begin: int
    end: int = -1
    leaves: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    tensors: list[Tensor] = field(default_factory=list)  # the known leaves, as they were
    known: bool = False
    labels: frozenset[str] = frozenset()


class _Recorder(TorchDispatchMode):
    """Follows known tensors. Keeps them alive until it is dropped; data is never held."""

    def __init__(self, weights: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.ops: list[Operation] = []
        self.exposed: list[Ref] = []  # known tensors that an operation mixed with data
        self.constants: dict[str, Tensor] = {}
        self.read_by_python: set[str] = set()
        self._refs: dict[int, Ref] = {}
        self._labels: dict[int, frozenset[str]] = {}
        self._of_storage: dict[int, set[int]] = {}
        self._alive: list[Tensor] = []
        for name, tensor in weights.items():
            self._know(tensor, Ref("weight", name), frozenset())
        for name, tensor in sources.items():
            self._know(tensor, Ref("source", name), frozenset({name}))

    def ref(self, tensor: Tensor) -> Ref | None:
        return self._refs.get(id(tensor))

    def labels(self, tensor: Tensor) -> frozenset[str]:
        return self._labels[id(tensor)]

    def _know(self, tensor: Tensor, ref: Ref, labels: frozenset[str]) -> None:
        self._alive.append(tensor)
        self._refs[id(tensor)], self._labels[id(tensor)] = ref, labels
        if torch._C._has_storage(tensor):
            self._of_storage.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def _forget_storage(self, tensor: Tensor) -> None:
        for key in self._of_storage.pop(tensor.untyped_storage()._cdata, set()):
            del self._refs[key]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        refs = [self._refs.get(id(x)) for x in tensors]
        written = _written(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...): a constant of the code
            self._constant(output)
        elif (
            None in refs
            or torch.Tag.nondeterministic_seeded in func.tags
            or any(self._refs[id(x)].kind != "value" for x in written)
        ):
            self.exposed += [ref for ref in refs if ref is not None and ref.kind == "value"]
            for target in written:
                self._forget_storage(target)
        else:
            self._record(func, args, kwargs, tensors, output)
        return output

    def _constant(self, tensor: Tensor) -> None:
        name = f"constant {len(self.constants)}"
        self.constants[name] = tensor.clone()
        self._know(tensor, Ref("constant", name), frozenset())

    def _record(
        self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor], output: Any
    ) -> None:
        labels = frozenset().union(*(self._labels[id(x)] for x in tensors))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read_by_python |= labels
            return
        made, _ = tree_flatten(output)
        if not any(isinstance(x, Tensor) for x in made):
            return
        index = len(self.ops)
        named_args, named_kwargs = tree_map(self._named, (args, kwargs))
        mutates = bool(_written(func, args, kwargs))
        self.ops.append(Operation(func, named_args, named_kwargs, labels, mutates))
        for out, tensor in enumerate(made):
            if isinstance(tensor, Tensor):
                self._know(tensor, Ref("value", op=index, out=out), labels)

    def _named(self, leaf: Any) -> Any:
        return self._refs[id(leaf)] if isinstance(leaf, Tensor) else leaf


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Tensors among the arguments that ``func`` writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]
    return found


# -- a watched call --------------------------------------------------------------------------


@dataclass
class Watched:
    """What ``watch`` saw."""

    output: Any
    ops: list[Operation]
    calls: dict[str, list[ModuleCall]]
    exposed: list[Ref]
    constants: dict[str, Tensor]
    read_by_python: set[str]


def watch(
    module: nn.Module,
    run: Callable[[], Any],
    sources: Mapping[str, Tensor],
    skip: Container[str] = (),
) -> Watched:
    """Run a call of ``module`` and follow what it makes of ``sources`` and of its weights alone.

    Calls of modules in ``skip`` (by path) are not told apart.
    """
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recorder, patch = _Recorder(weights, sources), Patch()
    calls: dict[str, list[ModuleCall]] = {}

    def around(path: str) -> Callable[..., Any]:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            call = ModuleCall(path, begin=len(recorder.ops))
            calls.setdefault(path, []).append(call)
            output = call_next(*args, **kwargs)
            _note_output(call, output, recorder)
            return output

        return layer

    try:
        for path, part in module.named_modules():
            if path and path not in skip:
                patch.around_call(part, around(path))
        with recorder:
            output = run()
        leaves, _ = tree_flatten(output)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        recorder.exposed += [r for x in tensors if (r := recorder.ref(x)) is not None]
    finally:
        patch.undo()
    made = recorder.ops, calls, recorder.exposed, recorder.constants, recorder.read_by_python
    return Watched(output, *made)


def _note_output(call: ModuleCall, output: Any, recorder: _Recorder) -> None:
    call.end = len(recorder.ops)
    leaves, call.spec = tree_flatten(output)
    call.tensors = [x for x in leaves if isinstance(x, Tensor) and recorder.ref(x) is not None]
    call.labels = frozenset().union(*(recorder.labels(x) for x in call.tensors))
    call.leaves = [recorder.ref(x) if isinstance(x, Tensor) else x for x in leaves]
    data = any(isinstance(x, Tensor) and recorder.ref(x) is None for x in leaves)
    plain = all(isinstance(x, (Tensor, *PLAIN)) for x in leaves)
    call.known = bool(call.tensors) and not data and plain
