"""The Evaluate tab: start an evaluation, and read its report in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.acting import LAST, QUIET, acting, offered
from apps.web.checks import sentence
from apps.web.evaluations import KINDS, MAX_SAMPLES, Standing
from apps.web.recipe_view import choices
from apps.web.site import PLAIN, Refused

if TYPE_CHECKING:
    from apps.web.page import App

REFRESH = 1.0  # seconds
NOTHING_YET = markup.empty(
    "No evaluation yet",
    "Choose recipes and press Evaluate. The same calls are rendered without and with each, and a "
    "report says what they gain and cost, with intervals, and shows where it hurts most.",
)
PHASES = {
    "render": "Rendering",
    "time": "Timing in turn",
    "look": "Measuring",
    "report": "Writing the report",
}


class EvaluateTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app

    def build(self) -> None:
        """Lay the tab out."""
        models = [name for name in self._app.site.models if name.startswith("zoo:")]
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self.name = gr.Textbox(label="Name", placeholder="made from the date")
                self.model = gr.Dropdown(models, value=models[0], label="Model")
                self.recipes = gr.CheckboxGroup(
                    [], label="Recipes", elem_id="evaluate-recipes", elem_classes="ac-list"
                )
                self.kinds = gr.CheckboxGroup(
                    list(KINDS.items()), value=["fidelity", "judge"], label="Measure"
                )
                self.samples = gr.Number(
                    40, label="Samples", precision=0, minimum=2, maximum=MAX_SAMPLES
                )
                self.begin = gr.Button("Evaluate", variant="primary", elem_id="start-evaluation")
                self.refused = gr.HTML()
            with gr.Column(scale=9, min_width=300):
                self.chosen = gr.Dropdown(
                    [], label="Evaluation", visible=False, elem_id="evaluation", interactive=True
                )
                self.status = gr.HTML(NOTHING_YET, elem_id="evaluation-status")
                with gr.Row(visible=False) as self.buttons:
                    self.pause = gr.Button("Pause", size="sm", min_width=90)
                    self.go_on = gr.Button("Continue", size="sm", min_width=90)
                self.said = gr.HTML()
                self.report = gr.HTML()
        self.seen = gr.State("")
        self.timer = gr.Timer(REFRESH, active=False)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        shown = [self.status, self.buttons, self.pause, self.go_on, self.report, self.seen]
        look = (self._look, [self.chosen, self.seen], shown)
        self.tab.select(self._list, self.chosen, [self.chosen, self.timer], **QUIET).then(
            *look, **QUIET
        )
        gr.on([self.tab.select, self.model.change], self._recipes, [self.model, self.recipes],
              self.recipes, **LAST)  # fmt: skip
        self.timer.tick(*look, **QUIET, trigger_mode="once", concurrency_limit=None)
        inputs = [self.name, self.model, self.recipes, self.kinds, self.samples]
        self.begin.click(
            self._start, inputs, [self.chosen, self.refused, self.name],
            api_visibility="private", show_progress="minimal",
        ).then(*look, **QUIET)  # fmt: skip
        self.chosen.input(lambda: ("", ""), None, [self.seen, self.said], **QUIET).then(
            *look, **QUIET
        )
        evaluations = self._app.evaluations
        for button, do in ((self.pause, evaluations.pause), (self.go_on, evaluations.go_on)):
            button.click(acting(do), self.chosen, self.said, **QUIET).then(*look, **QUIET)

    def _list(self, chosen: str | None) -> list[Any]:
        names = self._app.evaluations.names()
        return [offered(names, chosen, visible=bool(names)), gr.Timer(active=True)]

    def _recipes(self, model: str, ticked: list[str]) -> Any:
        try:
            fit, _ = choices(self._app, self._app.site.model(model))
        except (Refused, ValueError, OSError):
            fit = []
        offered = [(label, name) for label, name in fit if name != PLAIN]
        known = [name for _, name in offered]
        return gr.update(choices=offered, value=[name for name in ticked if name in known])

    def _start(
        self, name: str, model: str, recipes: list[str], kinds: list[str], samples: Any
    ) -> list[Any]:
        try:
            made = self._app.evaluations.create(name, model, recipes, kinds, samples)
        except (Refused, ValueError, OSError) as error:
            return [gr.skip(), markup.notice(sentence(str(error))), gr.skip()]
        names = self._app.evaluations.names()
        return [gr.update(choices=names, value=made, visible=True), "", ""]

    def _look(self, name: str | None, seen: str) -> list[Any]:
        """The chosen evaluation as it is now; nothing is sent if nothing has changed."""
        try:
            now = self._app.evaluations.standing(name) if name else None
        except Refused:
            now = None
        if now is None:
            return [NOTHING_YET, gr.update(visible=False), gr.skip(), gr.skip(), "", ""]
        if repr(now) == seen:
            return [gr.skip()] * 6
        written = f"'{now.name}', {now.written}"
        report = gr.skip() if seen.startswith(written) else self._report(now)
        return [
            standing_view(now),
            gr.update(visible=not now.finished),
            gr.update(interactive=now.running),
            gr.update(interactive=not now.running),
            report,
            repr(now),
        ]

    def _report(self, now: Standing) -> str:
        """The report's page in a frame that may run nothing and ask for nothing."""
        if not now.finished:
            return ""
        try:
            page = self._app.evaluations.page(now.name)
        except (Refused, OSError, UnicodeDecodeError) as error:
            return markup.notice(sentence(str(error)))
        return (
            f'<iframe class="ac-report" sandbox="" title="Report {markup.text(now.name)}" '
            f'srcdoc="{markup.text(page)}"></iframe>'
        )


def standing_view(now: Standing) -> str:
    """How an evaluation stands, in words, with a bar."""
    state = "finished" if now.finished else "running" if now.running else "paused"
    words = PHASES.get(now.phase, "Starting") if now.running else "Not finished"
    words = "Finished" if now.finished else words
    parts = [f"<p class='ac-batch-state'>{markup.text(words)}</p>"]
    if now.total and not now.finished:
        parts.append(markup.bar(now.done, now.total, f"{now.done} of {now.total} tasks"))
    elif state == "paused":
        parts.append(markup.notice("What was done is kept; Continue does the rest.", "info"))
    if now.said:
        parts.append(markup.notice(now.said, "warning"))
    return f'<section class="ac-batch" data-state="{state}">{"".join(parts)}</section>'
