"""Fields of a page for the settings of methods and searches, a box for each; some are shown."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.method_settings import Field, about, fields

if TYPE_CHECKING:
    from apps.web.method_settings import Settable

Edits = dict[str, dict[str, Any]]  # what the form has, by a box's key and a setting's name


class SettingsForm:
    """`box` for each of them first; then `values` are the fields, in the order `edits` takes."""

    def __init__(self) -> None:
        self._boxes: dict[str, gr.Accordion] = {}
        self._places: list[tuple[str, str]] = []  # a box's key and a setting's name
        self.values: list[Any] = []  # the field of each

    @property
    def boxes(self) -> list[Any]:
        """In the order of `showing`."""
        return list(self._boxes.values())

    def box(self, key: str, label: str, value: Settable, *, visible: bool = False) -> None:
        """A box with a field for every setting of a method or search, and what they are."""
        with gr.Accordion(f"Settings of {label}", open=False, visible=visible) as box:
            words = "".join(f"<p>{markup.code(part)}</p>" for part in about(value))
            gr.HTML(f'<div class="ac-hint">{words}</div>')
            for numbers, some in itertools.groupby(fields(value), lambda f: f.kind == "number"):
                with gr.Row() if numbers else nullcontext():
                    for field in some:
                        self._places.append((key, field.name))
                        self.values.append(_component(field))
        self._boxes[key] = box

    def showing(self, keys: Collection[str]) -> list[Any]:
        """Updates of `boxes` that show those of `keys`."""
        return [gr.update(visible=key in keys) for key in self._boxes]

    def edits(self, values: Collection[Any]) -> Edits:
        """What the fields have, from their values."""
        found: Edits = {}
        for (key, name), value in zip(self._places, values, strict=True):
            found.setdefault(key, {})[name] = value
        return found


def _component(field: Field) -> Any:
    """The field of a form for one setting."""
    value = field.value
    usual: dict[str, Any] = {"label": field.label, "interactive": True}
    if field.kind == "switch":
        return gr.Checkbox(value, **usual)
    if field.kind == "choice":
        empty = [("empty", "")] if field.optional else []
        choices = empty + [(choice, choice) for choice in field.choices]
        return gr.Dropdown(choices, value="" if value is None else value, **usual)
    if field.kind == "number":
        step = 0.01 if isinstance(value, float) else 1
        return gr.Number(value, step=step, min_width=120, **usual)
    return gr.Textbox(value, **usual)
