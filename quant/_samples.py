"""A few values of each weight, to notice that others have changed it.

peft fuses adapters through ``weight.data``, which no version counter sees, and an adapter that was
fused and then unloaded leaves nothing else behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VALUES = 16  # of each weight, evenly over it; an adapter changes nearly all
ROUNDING = 2.0  # an adapter that is fused and unfused again leaves an error in the last place


class Samples:
    """Of the weights that ``weights()`` gives, in an order that stays."""

    def __init__(self, weights: Callable[[], Sequence[Tensor]]) -> None:
        self._weights = weights
        self._seen = self._now()

    def _now(self) -> tuple[list[torch.dtype], Tensor]:
        """Types, and values (n, 16) on the host: n small reads, one wait for the device."""
        held = [w.detach() for w in self._weights()]
        if not held:
            return [], torch.empty(0, VALUES)
        values = [_values(w) for w in held]
        values = [v.to(values[0].device) for v in values]
        return [w.dtype for w in held], torch.stack(values).float().cpu()

    def changed(self) -> list[bool]:
        """Of each weight, whether it is another one than at first. Moved or rounded to another type
        it is the same; so it is while it is lent, or offloaded."""
        (old_types, old), (types, now) = self._seen, self._now()
        if types != old_types:
            self._seen = types, now
            return [False] * len(types)
        eps = torch.tensor([torch.finfo(t).eps if t.is_floating_point else 0.0 for t in types])
        near = (now - old).abs() <= ROUNDING * eps[:, None] * old.abs().amax(1, keepdim=True)
        return (~(near | now.isnan()).all(1)).tolist()


def _values(weight: Tensor) -> Tensor:
    if type(weight) is not Tensor or weight.is_meta or not weight.numel():  # not to be read
        return torch.full((VALUES,), float("nan"))
    places = torch.arange(VALUES) * weight.numel() // VALUES
    return weight[torch.unravel_index(places.to(weight.device), weight.shape)]
