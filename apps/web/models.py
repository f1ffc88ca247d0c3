"""What a model can be asked for, read from its folder and its pipeline's class; no weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from apps.render.jobs import RESERVED_INPUTS
from apps.web.imports import LOCK
from apps.web.site import Refused

SIZES = ("width", "height", "num_frames")
FIELDS = ("num_inference_steps", "guidance_scale", *SIZES)


@dataclass(frozen=True)
class Asks:
    """The arguments of a model's call that the form has fields for.

    classes: what can be drawn, in words, with its number; empty for models without classes.
    defaults: value of every field the form shows; None leaves it to the pipeline.
    example: a prompt to begin with.
    """

    kind: str
    arguments: frozenset[str]
    classes: tuple[tuple[str, int], ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    example: str = ""

    def check(self, inputs: dict[str, Any]) -> None:
        """Refused: an argument that the pipeline does not take."""
        for name in inputs:
            if name not in self.arguments:
                known = ", ".join(sorted(self.arguments - {"self", *RESERVED_INPUTS}))
                raise Refused(f"{self.kind} takes no argument {name!r}; it takes {known}")

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Pipeline-call arguments from the form's fields; those it does not take are left out."""
        names = [name for name in ("prompt", *FIELDS) if name in self.arguments]
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        if "class_labels" in self.arguments:
            if given.get("class_label") is None:
                raise Refused("Choose what to draw.")
            inputs["class_labels"] = [int(given["class_label"])]
        if "prompt" in self.arguments and not str(given.get("prompt") or "").strip():
            raise Refused("Write a prompt: what should be seen?")
        return inputs


def folder_of(model: str) -> Path:
    """Where a model's files are."""
    from apps.render.identity import model_folder

    folder = model_folder(model)
    assert folder is not None, "models of the app are zoo names and folders"
    return folder


def text_first(models: Sequence[str]) -> str:
    """The first model that is given a text; else the first."""
    for model in models:
        index = json.loads((folder_of(model) / "model_index.json").read_text("utf-8"))
        if "tokenizer" in index:
            return model
    return models[0]


@cache
def asks(model: str) -> Asks:
    """Describe a model.

    Raises:
        Refused: its pipeline's class is not one of diffusers.
    """
    index = json.loads((folder_of(model) / "model_index.json").read_text("utf-8"))
    kind = index["_class_name"]
    with LOCK:
        import diffusers

        pipeline = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if pipeline is None:
        raise Refused(f"{model} is a {kind}, which this version of diffusers does not have.")
    parameters = inspect.signature(pipeline.__call__).parameters
    arguments = frozenset(parameters)
    labels = index.get("id2label") if "class_labels" in arguments else None
    classes = [(text, int(number)) for number, text in (labels or {}).items()]
    own = _standard(pipeline) if model.startswith("zoo:") else {}
    defaults = {
        name: own.get(name, parameters[name].default) for name in FIELDS if name in arguments
    }
    example = own.get("prompt", "")
    return Asks(
        kind,
        arguments,
        tuple(sorted(classes, key=lambda one: one[1])),
        defaults,
        example if isinstance(example, str) else example[0],
    )


def _standard(pipeline: Any) -> dict[str, Any]:
    """The call that an embedded model is measured with."""
    from apps.digits_referee import standard_inputs

    return standard_inputs(pipeline.__new__(pipeline))[0]
