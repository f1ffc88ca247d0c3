"""The Search tab: candidates with their scores as they are found; pick one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.checks import sentence
from apps.web.job_fields import JobFields
from apps.web.recipe_view import choices
from apps.web.searches import MAX_RENDERS, VERIFIERS, Hunt
from apps.web.site import PLAIN, Refused

if TYPE_CHECKING:
    from apps.web.page import App

REFRESH = 0.2  # seconds between two looks at a running search
SHOWN = 60  # candidates, the newest
ALGORITHMS = {
    "random: draw, keep the best": "random",
    "zero-order: neighbours of the best": "zero-order",
    "draft and commit: drafts with the recipe, the best without": "draft-commit",
}
NOTHING_YET = markup.empty(
    "No search yet",
    "Choose what to draw, what makes a sample good and how many renders that may cost, then press "
    "Search. Candidates appear with their scores as they are found, and you can pick any of them.",
)


class SearchTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app
        self.job = JobFields(app, "search-")

    def build(self) -> None:
        """Lay the tab out."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self.job.build()
                self.verifier = gr.Dropdown(list(VERIFIERS.items()), value="judge", label="Good is")
                self.algorithm = gr.Dropdown(
                    list(ALGORITHMS.items()), value="random", label="Algorithm"
                )
                self.renders = gr.Number(
                    12, label="Budget, in renders", precision=0, minimum=2, maximum=MAX_RENDERS
                )
                self.recipe = gr.Dropdown(
                    [("nothing", PLAIN)], value=PLAIN, label="Accelerate with"
                )
                with gr.Accordion("More settings", open=False):
                    self.job.build_more()
                with gr.Row():
                    self.go = gr.Button(
                        "Search", variant="primary", elem_id="start-search", min_width=110
                    )
                    self.stop = gr.Button("Cancel", interactive=False, min_width=90)
                self.notice = gr.HTML()
            with gr.Column(scale=9, min_width=300):
                self.shown = gr.HTML(NOTHING_YET, elem_id="search")
                with gr.Row(visible=False) as self.picking:
                    self.index = gr.Dropdown([], label="Pick a candidate", elem_id="pick")
                    self.pick = gr.Button("Render this one", min_width=140, scale=0)
        self.hunt = gr.BrowserState("", storage_key="accel-search")

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        job = self.job
        chosen = [*job.following, self.recipe, self.verifier, self.notice]
        gr.on([self.tab.select, job.model.change], self._choose_model,
              [job.model, self.recipe], chosen, **quiet)  # fmt: skip
        asked = [self.algorithm, self.verifier, self.renders, self.recipe, *job.all]
        watched = [self.shown, self.go, self.stop, self.picking, self.index]
        watch = (self._watch, self.hunt, watched)
        self.go.click(self._start, asked, [self.hunt, self.notice], **quiet).then(
            *watch, concurrency_limit=None, **quiet
        )
        blocks.load(*watch, concurrency_limit=None, **quiet)
        self.stop.click(lambda one: self._app.searches.cancel(one), self.hunt, None,
                        queue=False, **quiet)  # fmt: skip
        self.pick.click(self._pick, [self.hunt, self.index], self.notice, **quiet).then(
            *watch, concurrency_limit=None, **quiet
        )

    def _choose_model(self, model: str, recipe: str) -> list[Any]:
        try:
            fields = self.job.follow(model)
            fit, _ = choices(self._app, model)
        except (Refused, OSError, ValueError) as error:
            nothing = [gr.update(visible=False)] * len(self.job.following)
            return [*nothing, gr.skip(), gr.skip(), markup.notice(sentence(str(error)))]
        known = [name for _, name in fit]
        verifier = "judge" if model.startswith("zoo:") else "sharpness"
        value = recipe if recipe in known else PLAIN
        return [*fields, gr.update(choices=fit, value=value), verifier, ""]

    def _start(
        self, algorithm: str, verifier: str, renders: Any, recipe: str, *values: Any
    ) -> tuple[Any, str]:
        try:
            model, job = self.job.job(list(values))
            path = None if recipe == PLAIN else self._app.site.recipe(recipe)
            if algorithm not in ALGORITHMS.values():
                raise Refused("There is no such algorithm here.")
            asked = {"algorithm": algorithm, "verifier": verifier, "renders": renders}
            return self._app.searches.start(model, path, job, asked).id, ""
        except (Refused, ValueError, OSError) as error:
            return gr.skip(), markup.notice(sentence(str(error)))

    def _pick(self, hunt_id: str, index: Any) -> str:
        hunt = self._app.searches.find(hunt_id)
        if hunt is None:
            return markup.notice("This search is over; start another.")
        try:
            self._app.searches.pick(hunt, index)
        except (Refused, ValueError, OSError) as error:
            return markup.notice(sentence(str(error)))
        return ""

    async def _watch(self, hunt_id: str) -> AsyncIterator[Any]:
        """Show a search until it and everything picked from it is over."""
        hunt = self._app.searches.find(hunt_id)
        if hunt is None:
            yield [NOTHING_YET, gr.update(interactive=True), gr.update(interactive=False),
                   gr.update(visible=False), gr.update(choices=[])]  # fmt: skip
            return
        last: Any = None
        while True:
            ahead = self._app.searches.ahead_of(hunt)
            over, now = hunt.over, (hunt.version, ahead)
            if now != last:
                last = now
                page = await asyncio.to_thread(view, hunt, ahead)
                listed = [(_name(c), c["index"]) for c in hunt.candidates[-SHOWN:]]
                yield [page, gr.update(interactive=over), gr.update(interactive=not over),
                       gr.update(visible=bool(listed)), gr.update(choices=listed)]  # fmt: skip
            rendered = len(hunt.works) - 1 == len(hunt.picked)
            if over and now[0] == hunt.version and (rendered or hunt.error):
                return
            await asyncio.sleep(REFRESH)


def view(hunt: Hunt, ahead: int = 0) -> str:
    """A search as it stands: how far, the winner, what was picked, and all candidates."""
    parts = []
    if hunt.error:
        parts.append(markup.notice(hunt.error))
    if hunt.state == "cancelled":
        parts.append(markup.notice("Cancelled. What was found is kept.", "info"))
    if ahead:
        parts.append(markup.notice(f"Waiting: {ahead} ahead of yours.", "info"))
    if hunt.state == "loading":
        parts.append(markup.notice(f"Loading {hunt.model} ...", "info"))
    if not hunt.over:
        words = f"{hunt.share:.0%} of the budget, {hunt.evaluations:,} network evaluations"
        parts.append(markup.bar(round(100 * hunt.share), 100, words))
    parts += [_chosen(hunt), _candidates(hunt)]
    return f'<section class="ac-trial" data-state="{hunt.state}">{"".join(parts)}</section>'


def _chosen(hunt: Hunt) -> str:
    """The winner, and what a person picked."""
    drawn = []
    if hunt.winner is not None:
        kept = hunt.winner.content.get("search") or {}
        rows = [("Score", _score(value)) for value in (kept.get("score") or {}).values()]
        for name, value in (kept.get("held_out_score") or {}).items():
            rows.append((f"Not searched: {name}", _score(value)))
        for gain in (kept.get("gain") or {}).values():
            rows.append(("Mean of plain draws", _score(gain.get("mean"))))
            break
        below = markup.facts([(name, markup.text(value)) for name, value in rows])
        drawn.append(markup.figure("Winner", markup.medium(hunt.winner, "winner"), below))
    for number, one in hunt.picked.items():
        title = f"Candidate {number}, rendered"
        drawn.append(markup.figure(title, markup.medium(one, title)))
    return f'<div class="ac-pair">{"".join(drawn)}</div>' if drawn else ""


def _candidates(hunt: Hunt) -> str:
    best = hunt.best()
    cells = []
    for one in hunt.candidates[-SHOWN:]:
        mark = ' class="ac-best"' if best is not None and one["index"] == best["index"] else ""
        name = markup.text(_name(one))
        image = (
            f'<img src="data:image/png;base64,{markup.text(one["png"])}" alt="{name}" '
            'class="ac-sharp">'
            if one.get("png")
            else ""
        )
        cells.append(f"<li{mark}>{image}<span>{name}</span></li>")
    if not cells:
        return ""
    title = f"{len(hunt.candidates)} candidates"
    return f'<h2>{title}</h2><ul class="ac-gallery">{"".join(cells)}</ul>'


def _name(candidate: dict[str, Any]) -> str:
    kind = "" if candidate["purpose"] == "render" else f", {candidate['purpose']}"
    return f"{candidate['index']}: {_score(candidate['score'])}{kind}"


def _score(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3g}"
