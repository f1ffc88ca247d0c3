"""What is in force around a call of the pipeline: a recipe, a clock, the noise of a path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import accel
from apps.render.faults import InvalidJob
from samplers.search.path import Path as NoisePath
from samplers.search.player import Player


@contextlib.contextmanager
def from_noise(
    pipe: Any, inputs: dict, recipe: Any, live: Any, path: NoisePath | None
) -> Iterator[dict[str, Any] | None]:
    """Arguments of a call that ends a path; ``None`` without one: the seed says the noise."""
    if path is None:
        yield None
        return
    try:
        player = Player(pipe, inputs, live)
    except ValueError as error:
        raise InvalidJob(str(error)) from error
    with player, player.ending(path, recipe or accel.Recipe(())) as arguments:
        yield arguments


@contextlib.contextmanager
def attached(recipe: Any, pipe: Any, strict: bool, on_event: Callable) -> Iterator[Any]:
    """Attach a recipe and listen to its clock; without a recipe the clock alone, if it can."""
    with contextlib.ExitStack() as stack:
        live = None
        try:
            wanted = accel.attached(recipe or accel.Recipe(()), pipe, strict=strict)
            live = stack.enter_context(wanted)
        except ValueError as error:
            if recipe is not None:  # without one: no clock for this pipeline, no step progress
                raise InvalidJob(str(error)) from error
        if live is not None:
            stack.callback(live.clock.subscribe(on_event))
        yield live


def attached_to_decoder(recipe: Any, pipe: Any, strict: bool) -> Any:
    """The recipe, attached for a decode, if it claims anything of the autoencoder."""
    paths = [path for _, paths in recipe.claims(pipe) for path in paths] if recipe else []
    if not any(path.split(".")[0] == "vae" for path in paths):
        return contextlib.nullcontext()
    return accel.attached(recipe, pipe, strict=strict)
