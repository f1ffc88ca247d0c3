"""The fields that say what to render: a model, what it should show, seed and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web.models import SIZES, asks
from apps.web.site import Refused

if TYPE_CHECKING:
    from apps.web.page import App

_ARGUMENTS = ("class_label", "prompt", "num_inference_steps", "guidance_scale", *SIZES)


class JobFields:
    """Fields that follow the chosen model: `build` first, `build_more` where there is room."""

    def __init__(self, app: App, prefix: str = "", first: str | None = None) -> None:
        """``first``: the model that is chosen to begin with."""
        self._app, self._prefix = app, prefix
        self._first = first or app.site.models[0]

    def build(self) -> None:
        """Model, what to draw, seed and steps."""
        models = self._app.site.models
        name = self._prefix
        self.model = gr.Dropdown(
            list(models), value=self._first, label="Model", elem_id=f"{name}model"
        )
        self.label = gr.Dropdown([], label="Draw", visible=False, elem_id=f"{name}class")
        self.prompt = gr.Textbox(label="Prompt", lines=2, visible=False, elem_id=f"{name}prompt")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
            self.steps = gr.Number(
                50, label="Steps", precision=0, minimum=1, maximum=1000, min_width=100
            )

    def build_more(self) -> None:
        """Guidance and sizes, which have good defaults."""
        self.guidance = gr.Number(label="Guidance", visible=False, minimum=0)
        self.sizes = [
            gr.Number(label=name, precision=0, minimum=1, visible=False)
            for name in ("Width", "Height", "Frames")
        ]

    @property
    def following(self) -> list[Any]:
        """The fields that change with the model, in the order of `follow`."""
        return [self.label, self.prompt, self.steps, self.guidance, *self.sizes]

    @property
    def all(self) -> list[Any]:
        """All fields, in the order that `job` takes their values."""
        return [self.model, self.seed, *self.following]

    def follow(self, model: object) -> list[Any]:
        """Updates of `following` for a model.

        Raises:
            Refused, OSError, ValueError: the model cannot be described.
        """
        asked = asks(self._app.site.model(model))
        takes = asked.arguments
        label = gr.update(
            choices=list(asked.classes),
            value=_usual(asked.classes),
            visible="class_labels" in takes,
        )
        return [
            label,
            gr.update(value=asked.example, visible="prompt" in takes),
            *(
                gr.update(value=asked.defaults.get(name), visible=name in takes)
                for name in _ARGUMENTS[2:]
            ),
        ]

    def job(self, values: list[Any]) -> tuple[str, dict[str, Any]]:
        """(model, job) from the values of `all`.

        Raises:
            Refused: something that cannot be asked for.
        """
        model, seed, *given = values
        model = self._app.site.model(model)
        if not isinstance(seed, int) or seed < 0:
            raise Refused("The seed must be a whole number from 0 on.")
        inputs = asks(model).inputs(dict(zip(_ARGUMENTS, given, strict=True)))
        return model, {"seed": seed, "inputs": inputs}


def _usual(classes: tuple[tuple[str, int], ...]) -> int | None:
    return classes[min(3, len(classes) - 1)][1] if classes else None
