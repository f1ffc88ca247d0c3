"""Which parts of a denoiser really ran in each step, counted at the modules themselves; and what a
search sees.

The layers lie under whatever is attached later, so they see what a cache lets through: what a
method says it reused is not asked. Costs one Python call a module; waits for nothing.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from accel.denoiser import Denoiser, denoisers
from accel.patch import Patch
from caches.schedule import block_columns, is_unet, module_columns
from samplers.search.path import path_json

if TYPE_CHECKING:
    from samplers.search.result import Candidate

THUMBNAIL = 160  # pixels of the longer side of a candidate's picture
MAX_PARTS = 64  # above, whole blocks stand for their attentions and feed-forwards


class Parts:
    """Batch rows that ran through each part: `rows` since they were last taken, `table` by step."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.rows = [0] * len(names)
        self.table: list[list[int]] = []

    def take(self) -> dict[str, Any]:
        """`{"parts": names, "rows": counts}` for an event; counting starts again."""
        rows, self.rows = self.rows, [0] * len(self.names)
        self.table.append(rows)
        return {"parts": list(self.names), "rows": rows}

    def as_json(self) -> dict[str, Any]:
        """What ran, a row a step: `{"parts": names, "rows": [counts, ...]}`."""
        return {"parts": list(self.names), "rows": self.table}

    def layer(self, place: int) -> Callable[..., Any]:
        def counted(call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.rows[place] += _batch(args, kwargs)
            return call_next(*args, **kwargs)

        return counted


@contextlib.contextmanager
def watched(pipe: Any) -> Iterator[Parts | None]:
    """Count what runs; None for a pipeline whose parts are not known."""
    try:
        found = denoisers(pipe)
    except ValueError:
        yield None
        return
    parts = Parts(tuple(name for one in found for name in columns(one)))
    homes = {one.slot: one.module for one in found}
    patch = Patch()
    try:
        for place, name in enumerate(parts.names):
            slot, _, path = name.partition(".")
            patch.around_call(homes[slot].get_submodule(path), parts.layer(place))
        yield parts
    finally:
        patch.undo()


def seen(candidate: Candidate) -> dict[str, Any]:
    """A candidate of a search as plain JSON, with a small picture of it."""
    from PIL import Image

    kept = {key: getattr(candidate, key) for key in ("index", "purpose", "score", "evaluations")}
    found = kept | {"path": path_json(candidate.path), "png": None}
    if candidate.picture is not None:
        pixels = candidate.picture
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        target = io.BytesIO()
        picture.save(target, format="PNG")
        found["png"] = base64.b64encode(target.getvalue()).decode()
    return found


def columns(denoiser: Denoiser) -> tuple[str, ...]:
    """The parts shown of a denoiser: its attentions and feed-forwards, or its blocks or stages."""
    if is_unet(denoiser):
        return block_columns(denoiser)
    modules = module_columns(denoiser)
    return modules if len(modules) <= MAX_PARTS else block_columns(denoiser)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of the first tensor of a call."""
    for value in (*args, *kwargs.values()):
        if getattr(value, "ndim", 0) > 0:
            return int(value.shape[0])
    return 1
