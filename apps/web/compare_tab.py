"""The Compare tab: the same job in two renders, on top of each other or in step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.sheet import shown
from apps.web import markup
from apps.web.acting import LAST, QUIET
from apps.web.checks import sentence
from apps.web.site import Refused
from apps.web.trial_view import figures

if TYPE_CHECKING:
    from apps.pairs import Pair, Rendered
    from apps.web.page import App

NOTHING_YET = markup.empty(
    "Nothing to compare yet",
    "Two renders of the same jobs can be compared here. Press Generate in the Create tab, or "
    "render the same file twice in the Batch tab, without and with a recipe.",
)
SLIDER, APART = "Divider", "Side by side"


class CompareTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app

    def build(self) -> None:
        """Lay the tab out."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self.left = gr.Dropdown([], label="Baseline", elem_id="compare-left")
                self.right = gr.Dropdown([], label="Compared with it", elem_id="compare-right")
                self.job = gr.Dropdown([], label="Job", elem_id="compare-job")
                with gr.Row():
                    self.before = gr.Button("Previous job", size="sm", min_width=80)
                    self.after = gr.Button("Next job", size="sm", min_width=80)
                self.way = gr.Radio([SLIDER, APART], value=SLIDER, label="Pictures")
            with gr.Column(scale=9, min_width=300):
                self.shown = gr.HTML(NOTHING_YET, elem_id="comparison")

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        both = [self.left, self.right]
        show = (self._show, [*both, self.job, self.way], self.shown)
        self.tab.select(self._folders, both, both, **QUIET).then(
            self._jobs, [*both, self.job], self.job, **QUIET
        ).then(*show, **QUIET)
        gr.on([self.left.input, self.right.input], self._jobs, [*both, self.job], self.job,
              **LAST).then(*show, **QUIET)  # fmt: skip
        gr.on([self.job.input, self.way.input], *show, **LAST)
        for button, by in ((self.before, -1), (self.after, 1)):
            button.click(self._beside(by), [*both, self.job], self.job, **QUIET).then(
                *show, **QUIET
            )

    def _folders(self, left: str | None, right: str | None) -> list[Any]:
        names = list(self._app.site.renders())
        if left not in names:
            left = next((name for name in names if name.endswith("baseline")), None)
            left = left or next(iter(names), None)
        if right not in names or right == left:
            others = [name for name in names if name != left]
            shared = (name for name in others if self._pairs(left, name))
            right = next(shared, next(iter(others), None))
        return [gr.update(choices=names, value=left), gr.update(choices=names, value=right)]

    def _jobs(self, left: str | None, right: str | None, job: str | None) -> Any:
        labels = list(self._pairs(left, right))
        return gr.update(choices=labels, value=job if job in labels else next(iter(labels), None))

    def _beside(self, by: int) -> Any:
        def chosen(left: str | None, right: str | None, job: str | None) -> Any:
            labels = list(self._pairs(left, right))
            if job not in labels:
                return next(iter(labels), None)
            return labels[(labels.index(job) + by) % len(labels)]

        return chosen

    def _pairs(self, left: object, right: object) -> dict[str, tuple[Rendered, Rendered]]:
        """Jobs that two renders share, by a label that names each."""
        from apps.pairs import finished

        if not left or not right:
            return {}
        try:
            one, two = (finished(self._app.site.render(name)) for name in (left, right))
        except (Refused, ValueError):
            return {}
        other = {rendered.key: rendered for rendered in two}
        shared = [(r, other[r.key]) for r in one if r.key in other]
        found: dict[str, tuple[Rendered, Rendered]] = {}
        for first, second in shared:
            inputs = first.content["payload"]["job"]["inputs"]
            steps = inputs.get("num_inference_steps")
            label = f"{first.label}, seed {first.seed}" + (f", {steps} steps" if steps else "")
            found.setdefault(
                label if label not in found else first.content["stem"], (first, second)
            )
        return found

    def _show(self, left: str | None, right: str | None, job: str | None, way: str) -> str:
        if not left or not right:
            return NOTHING_YET
        pairs = self._pairs(left, right)
        if not pairs:
            words = (
                "These two renders have no job in common. Choose others, or render one file twice."
            )
            return markup.notice(words, "info")
        if job not in pairs:
            return markup.notice("Choose a job.", "info")
        one, two = pairs[job]
        from apps.pairs import pair as paired

        try:
            pair = paired([one], [two])[0]
        except (ValueError, OSError, ImportError) as error:
            return markup.notice(sentence(str(error)))
        return f'<section class="ac-comparison">{_pictures(pair, way)}{_costs(pair)}</section>'


def _costs(pair: Pair) -> str:
    """Fidelity, and what each took; recorded at different times, so no ratio is made of it."""
    rows = [
        (
            title,
            markup.text(shown(one.seconds)),
            "not counted" if one.evaluations is None else f"{one.evaluations:,}",
            markup.text(Path(one.content["payload"]["recipe"] or "none").stem),
        )
        for title, one in (("Baseline", pair.baseline), ("Accelerated", pair.other))
    ]
    head = ("render", "time", "network evaluations", "recipe")
    return figures(pair) + markup.table(head, rows, "Recorded with each, not measured in turn")


def _pictures(pair: Pair, way: str) -> str:
    image, words = markup.difference(pair)
    note = f'<p class="ac-note">{markup.text(words)}</p>'
    shown = markup.figure("Difference", image, note)
    if pair.baseline.is_video:
        return f'{markup.players(pair)}<div class="ac-pair">{shown}</div>'
    if way == APART:
        sides = [
            markup.figure(title, markup.medium(one, f"{one.label}, {title.lower()}"))
            for title, one in (("Baseline", pair.baseline), ("Accelerated", pair.other))
        ]
        return f'<div class="ac-pair">{"".join(sides)}{shown}</div>'
    return f'<div class="ac-beside">{markup.slider(pair)}{shown}</div>'
