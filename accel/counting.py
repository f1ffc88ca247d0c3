"""Work and memory, counted: the same on every machine, however busy it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counted_flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions (masked ones
    in full) that ``fn`` really runs."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        fn()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # of shapes


# torch itself counts the kernels of accelerators only
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def peak_memory(fn: Callable[[], Any], device: str | None = None) -> int:
    """Bytes that ``fn`` needs at most above what is there before.

    On an accelerator: of its allocator. On the CPU (``device`` is "cpu", or there is nothing else):
    of the tensors alive that ``fn`` made, counted storage by storage, whatever the C library keeps
    back; scratch space inside one operation and arrays of other libraries are not in it.
    """
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as counter:
        fn()
    return counter.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are alive, ``now`` and at their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._see(tensor.untyped_storage(), new=False)
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self._see(tensor.untyped_storage(), new=True)
        self.peak = max(self.peak, self.now)
        return output

    def _see(self, storage: Any, *, new: bool) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Of those that have a storage; weights in oneDNN's own layout have none that can be seen."""
    found = (x for x in tree_iter(tree) if isinstance(x, torch.Tensor))
    return [x for x in found if torch._C._has_storage(x)]
