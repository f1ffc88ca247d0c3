"""The Evaluate tab: reports of `accel evaluate`, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.site import REPORTS, Refused

if TYPE_CHECKING:
    from apps.web.page import App


class EvaluateTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app
        self._nothing = markup.empty(
            "No reports yet",
            "accel evaluate fidelity --model MODEL --recipe RECIPE --out "
            f"{app.site.out / REPORTS}/NAME writes one; it is then shown here.",
        )

    def build(self) -> None:
        """Lay the tab out."""
        self.name = gr.Dropdown([], label="Report", elem_id="report")
        self.shown = gr.HTML(self._nothing)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.tab.select(self._list, self.name, self.name, **quiet).then(
            self._show, self.name, self.shown, **quiet
        )
        self.name.input(self._show, self.name, self.shown, **quiet)

    def _list(self, chosen: str | None) -> Any:
        names = list(self._app.site.reports())
        return gr.update(
            choices=names,
            value=chosen if chosen in names else next(iter(names), None),
            visible=bool(names),
        )

    def _show(self, name: str | None) -> str:
        """The report's page in a frame that may run nothing and ask for nothing."""
        if not name:
            return self._nothing
        try:
            page = (self._app.site.report(name) / "report.html").read_text("utf-8")
        except (Refused, OSError, UnicodeDecodeError) as error:
            return markup.notice(str(error))
        return (
            f'<iframe class="ac-report" sandbox="" title="Report {markup.text(name)}" '
            f'srcdoc="{markup.text(page)}"></iframe>'
        )
