"""What the processors share: which attention of the model they are, and whom they ask."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Sparse(Protocol):
    """Attention of one call to kept blocks: q, k and v (b, s, h, d) in the host's token order."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Site(Protocol):
    """One attention module of a model under a method. taken: calls that attended sparsely."""

    taken: int

    def sparse(self) -> Sparse | None:
        """How to attend in the call being computed; None: as the host does."""
        ...


class SparseProcessor:
    """Stands for `stock`; what others set on processors reaches the stock one and stays there."""

    def __init__(self, stock: Any, site: Site) -> None:
        self.stock, self.site = stock, site

    def __reduce__(self) -> Any:
        """A copy of the model, or what it is pickled as, has the stock one."""
        return _itself, (self.stock,)

    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend  # AttributeError where the stock one has none

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.stock._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.stock._parallel_config = value


def _itself(stock: Any) -> Any:
    return stock
