"""The Recipes tab: what is in each, what it was measured to do, and the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.acting import LAST, QUIET, offered
from apps.web.recipe_view import inspect, packed
from apps.web.site import Refused

if TYPE_CHECKING:
    from apps.web.page import App

NONE_YET = markup.empty(
    "No recipes here",
    "Start the app with --recipes FOLDER, or tick methods in the Create tab: what you ticked is "
    "kept as a recipe.",
)


class RecipesTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app

    def build(self) -> None:
        """Lay the tab out."""
        names = list(self._app.site.recipes())
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                first = names[0] if names else None
                self.name = gr.Radio(names, value=first, label="Recipes", elem_classes="ac-list")
                self.download = gr.DownloadButton("Download with its artifacts", size="sm")
                gr.HTML(
                    '<p class="ac-note">Use it with <code>accel render --recipe FILE</code> or '
                    "<code>accel.read_recipe(FILE)</code>.</p>"
                )
            with gr.Column(scale=9, min_width=300):
                self.shown = gr.HTML(NONE_YET)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        outputs = [self.shown, self.download]
        self.tab.select(self._list, self.name, self.name, **QUIET)
        gr.on([blocks.load, self.name.change], self._show, self.name, outputs, **LAST)

    def _list(self, chosen: str | None) -> Any:
        return offered(list(self._app.site.recipes()), chosen)

    def _show(self, name: str | None) -> tuple[str, Any]:
        if name is None:
            return NONE_YET, gr.update(value=None, interactive=False)
        try:
            path = self._app.site.recipe(name)
            return inspect(path), gr.update(value=str(self._packed(path)), interactive=True)
        except (Refused, ValueError, OSError) as error:
            return markup.notice(str(error)), gr.update(value=None, interactive=False)

    def _packed(self, path: Path) -> Path:
        target = Path(os.environ["GRADIO_TEMP_DIR"]) / "recipes" / f"{path.stem}.zip"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(packed(path))
        return target
