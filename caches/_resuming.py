"""Which work a folder holds: what was cut off goes on, anything else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from accel.artifact import Fingerprint, inputs_digest
from accel.denoiser import denoisers
from accel.method import Recipe, live_on


def work_digest(
    pipe: Any, inputs: Sequence[dict[str, Any]], settings: Any, recipe: Recipe, *more: Any
) -> str:
    """SHA-256 of everything that the result of a search or training depends on.

    The model, its inputs, the settings (a dataclass), what is attached to the pipeline and the
    recipe that will be; `more`: JSON values.
    """
    models = [Fingerprint.of(denoiser.module).digest() for denoiser in denoisers(pipe)]
    methods = [method.digest() for method in (*(live.method for live in live_on(pipe)), recipe)]
    return inputs_digest([*inputs, asdict(settings), {"on": [*models, *methods], "more": more}])


def damaged(file: Any, *more: str) -> ValueError:
    """The refusal of a file that cannot be read; `more`: files that are of no use without it."""
    return ValueError(
        f"{file} is damaged; name another folder, or remove {' and '.join(['this', *more])}"
    )


def other_work(folder: Any, what: str) -> ValueError:
    """The refusal of a folder."""
    return ValueError(
        f"{folder} holds a {what} of another model, other inputs or settings; name another folder"
    )
