"""Where weights lie that are not needed now: host memory, or files that are mapped and deleted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accel.patch import Layer, at_home

Place = Literal["host", "disk", "keep"]


class Shelved:
    """The values of one tensor, off its device. A ``Home`` for ``Patch.lend``."""

    def __init__(self, values: Tensor, place: Place) -> None:
        self.place: Place = place
        self.writes = 0  # how often others have changed the values
        held = values.detach().to("cpu", copy=True).contiguous()
        if place == "disk":
            held = _mapped(held)
        elif values.device.type == "cuda":
            held = held.pin_memory()
        self._held = held

    @property
    def nbytes(self) -> int:
        """Bytes of host memory; what is mapped from disk takes none that cannot be had back."""
        return 0 if self.place == "disk" else self._held.nbytes

    def load(self, like: Tensor) -> Tensor:
        return self._held.to(like.device, like.dtype)

    def store(self, values: Tensor) -> None:
        self._held = Shelved(values.to(self._held.dtype), self.place)._held
        self.writes += 1


def with_weights_in_place(module: nn.Module) -> Layer:
    """A layer around ``module.state_dict``: weights that are lent are in it as ever."""

    def state_dict(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        with at_home(list(module.parameters())):
            return call_next(*args, **kwargs)

    return state_dict


def _mapped(values: Tensor) -> Tensor:
    """The same values in a private mapping of a file that has no name any more.

    The mapping begins at a page, so alignment (which some matrix kernels look at) is the best
    there is.
    """
    if not values.numel():
        return values
    with tempfile.NamedTemporaryFile(prefix="accel-weights-") as file:  # gone at the end
        file.write(values.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        flat = torch.from_file(file.name, shared=False, size=values.nbytes, dtype=torch.uint8)
        return flat.view(values.dtype).view(values.shape)
