"""How a schedule acts inside graphs of `torch.compile`, of blocks or of a whole denoiser.

A layer cannot decide anything while a graph runs. So whoever calls the graph decides before: every
column inside has a `Port`, through which the graph gets its letter and the kept output, and hands
out what it computed. To the compiler a letter is a constant, a kept output an input, a computed one
an output: one graph for each pattern of letters, without breaks, and shared by blocks that are
alike where blocks are compiled one by one. Nothing is to be switched on.

Many patterns want a higher `torch._dynamo.config.recompile_limit` (8); where it is reached, calls
are computed in full, counted and said. CUDA graphs (`mode="reduce-overhead"`) are no host: they
overwrite an output when its graph runs again, so that nothing can be kept. Not tried on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from caches.schedule import REUSE, SKIP, is_inside


class Port:
    """One column as a graph sees it. Without a letter the graph does what it does by itself."""

    def __init__(self) -> None:
        self.close()

    def open(self, letter: str, kept: Any) -> None:
        """For the next call: what the column does, and its output where that is known."""
        self.letter, self.kept = letter, kept

    def close(self) -> Any:
        """No letter, nothing held; returns what the call found, None where it did not come by."""
        found = getattr(self, "found", None)
        self.letter, self.kept, self.found = "", None, None
        return found


def layer_in_graph(port: Port, skip: Callable) -> Callable:
    """The layer around a column that acts while its call is traced; told apart by letters only."""

    def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        if port.letter == REUSE:
            output = port.kept
        elif port.letter == SKIP:
            output = skip(args, kwargs)
        else:
            output = call_next(*args, **kwargs)
        if port.letter:
            port.found = output
        return output

    return layer


def transparent(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
    """The layer in a graph of what acts outside of it."""
    return call_next(*args, **kwargs)


def inside(path: str, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The columns inside a module, those that contain others first, each with those around it."""
    found = sorted((c for c in columns if is_inside(c, path)), key=lambda c: c.count("."))
    return [(c, [other for other in found if is_inside(c, other)]) for c in found]
