"""The Search tab: candidates with their scores as they are found; pick one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.acting import LAST, QUIET, SECRET
from apps.web.checks import sentence
from apps.web.job_fields import JobFields
from apps.web.method_settings import edited
from apps.web.models import text_first
from apps.web.recipe_view import choices
from apps.web.searches import MAX_RENDERS, PURPOSES, VERIFIERS, Hunt, algorithms
from apps.web.settings_form import Edits, SettingsForm
from apps.web.site import PLAIN, Refused

if TYPE_CHECKING:
    from accel import Search
    from apps.web.page import App

REFRESH = 0.2  # seconds between two looks at a running search
SHOWN = 48  # candidates, the newest
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
        self._algorithms = {one.name: one for one in algorithms()}
        self.job = JobFields(app, "search-", text_first(app.site.models))

    def build(self) -> None:
        """Lay the tab out."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self.job.build()
                self.verifier = gr.Dropdown(list(VERIFIERS.items()), value="judge", label="Good is")
                self.recipe = gr.Dropdown(
                    [("nothing", PLAIN)], value=PLAIN, label="Accelerate with"
                )
                self.algorithm = gr.Dropdown(
                    [(one.label, name) for name, one in self._algorithms.items()],
                    value=next(iter(self._algorithms)), label="Algorithm", elem_id="algorithm",
                )  # fmt: skip
                self.about = gr.HTML(elem_id="about-search")
                self.form = SettingsForm()
                with gr.Column(elem_id="search-settings"):
                    for name, one in self._algorithms.items():
                        self.form.box(name, one.label, one.search)
                self.renders = gr.Number(
                    12, label="Budget, in renders", precision=0, minimum=2, maximum=MAX_RENDERS
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
                with gr.Row(visible=False, equal_height=True) as self.picking:
                    self.index = gr.Dropdown(
                        [], label="Pick a candidate (the best, if none is picked)", elem_id="pick"
                    )
                    self.pick = gr.Button("Render this one", min_width=180, scale=0)
                self.found = gr.HTML(elem_id="candidates")
        self.hunt = gr.BrowserState("", storage_key="accel-search", secret=SECRET)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        job, form = self.job, self.form
        chosen = [*job.following, self.recipe, self.verifier, self.notice]
        asked = [self.algorithm, self.verifier, self.recipe, *job.all, *form.values]
        told = (self._tell, asked, [self.algorithm, self.about])
        gr.on([self.tab.select, job.model.change], self._choose_model,
              [job.model, self.recipe], chosen, **LAST).then(*told, **QUIET)  # fmt: skip
        decide = [self.algorithm, self.verifier, self.recipe, job.steps, job.guidance, *form.values]
        gr.on([one.input for one in decide], *told, **LAST)
        self.algorithm.change(
            lambda name: form.showing([name]), self.algorithm, form.boxes, **QUIET
        )
        watched = [self.shown, self.found, self.go, self.stop, self.picking, self.index]
        watch = (self._watch, self.hunt, watched)
        self.go.click(self._start, [self.renders, *asked], [self.hunt, self.notice], **QUIET).then(
            *watch, concurrency_limit=None, **QUIET
        )
        blocks.load(*watch, concurrency_limit=None, **QUIET)
        self.stop.click(lambda one: self._app.searches.cancel(one), self.hunt, None,
                        queue=False, **QUIET)  # fmt: skip
        self.pick.click(self._pick, [self.hunt, self.index], self.notice, **QUIET).then(
            *watch, concurrency_limit=None, **QUIET
        )

    def _choose_model(self, model: str, recipe: str) -> list[Any]:
        try:
            fields = self.job.follow(model)
            fit, _ = choices(self._app, model)
        except (Refused, OSError, ValueError) as error:
            nothing = [gr.update(visible=False)] * len(self.job.following)
            return [*nothing, gr.skip(), gr.skip(), markup.notice(sentence(str(error)))]
        fit = [("nothing", PLAIN), *fit[1:]]
        known = [name for _, name in fit]
        verifier = "judge" if model.startswith("zoo:") else "sharpness"
        value = recipe if recipe in known else PLAIN
        return [*fields, gr.update(choices=fit, value=value), verifier, ""]

    def _tell(self, algorithm: str, verifier: str, recipe: str, *values: Any) -> tuple[Any, str]:
        """What the algorithm does, which can search what the form asks for, and why others not."""
        try:
            model, job = self.job.job(list(values[: len(self.job.all)]))
            ready, reasons = self._edited(self.form.edits(values[len(self.job.all) :]))
            reasons |= self._problems(model, job, verifier, recipe, ready)
        except (Refused, ValueError, OSError):
            reasons = {}  # it is said when the search is started
        labels = [
            (one.label + (", not here" if name in reasons.keys() - {algorithm} else ""), name)
            for name, one in self._algorithms.items()
        ]
        return gr.update(choices=labels), self._about(algorithm, reasons)

    def _edited(self, edits: Edits) -> tuple[dict[str, Search], dict[str, str]]:
        """Algorithms with the form's settings, and what is wrong with those of the others."""
        ready: dict[str, Search] = {}
        reasons: dict[str, str] = {}
        for name, one in self._algorithms.items():
            try:
                ready[name] = edited(one.search, edits.get(name, {}))
            except ValueError as error:
                reasons[name] = sentence(str(error))
        return ready, reasons

    def _problems(
        self, model: str, job: dict[str, Any], verifier: str, recipe: str, ready: dict[str, Search]
    ) -> dict[str, str]:
        """Why algorithms cannot search a job, by name; those that can are left out.

        Raises:
            Refused: a measure or recipe that is not here.
        """
        if verifier not in VERIFIERS.values():
            raise Refused("There is no such measure here.")
        path = None if recipe == PLAIN else self._app.site.recipe(recipe)
        some = list(ready.values())
        found = self._app.checks.searches(model, job["inputs"], some, verifier, path)
        return {name: why for name, why in zip(ready, found, strict=True) if why is not None}

    def _about(self, algorithm: str, reasons: dict[str, str]) -> str:
        one = self._algorithms.get(algorithm)
        if one is None:
            return ""
        words = f"<p>{markup.text(one.words)}</p>"
        if one.drafts:
            words += "<p>The recipe makes its drafts; what it chooses is rendered without.</p>"
        words = f'<div class="ac-hint">{words}</div>' + markup.notice(reasons.get(algorithm, ""))
        others = [
            f"<li><b>{markup.text(self._algorithms[name].label)}</b>: {markup.text(why)}</li>"
            for name, why in reasons.items()
            if name != algorithm
        ]
        if others:
            title = f"{len(others)} other{'s' * (len(others) > 1)} cannot search this"
            listed = markup.details(title, f"<ul>{''.join(others)}</ul>")
            words += f'<div class="ac-hint">{listed}</div>'
        return words

    def _start(
        self, renders: Any, algorithm: str, verifier: str, recipe: str, *values: Any
    ) -> tuple[Any, str]:
        of_job = len(self.job.all)
        try:
            model, job = self.job.job(list(values[:of_job]))
            path = None if recipe == PLAIN else self._app.site.recipe(recipe)
            if algorithm not in self._algorithms:
                raise Refused("There is no such algorithm here.")
            edits = self.form.edits(values[of_job:]).get(algorithm, {})
            search = edited(self._algorithms[algorithm].search, edits)
            if wrong := self._problems(model, job, verifier, recipe, {algorithm: search}):
                raise Refused(wrong[algorithm])
            asked = {"algorithm": algorithm, "settings": search.to_json()["settings"],
                     "verifier": verifier, "renders": renders}  # fmt: skip
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

    def _gone(self) -> str:
        return markup.empty(
            "Your last search is not shown any more",
            "The app was started again since, or many others came after it. Its candidates are "
            f"gone; the winner of a finished one is kept in {self._app.searches.folder}. Press "
            "Search to search again.",
        )

    async def _watch(self, hunt_id: str) -> AsyncIterator[Any]:
        """Show a search until it and everything picked from it is over."""
        hunt = self._app.searches.find(hunt_id)
        if hunt is None:
            page = self._gone() if hunt_id else NOTHING_YET
            yield [page, "", gr.update(interactive=True), gr.update(interactive=False),
                   gr.update(visible=False), gr.update(choices=[])]  # fmt: skip
            return
        last: Any = None
        while True:
            ahead = self._app.searches.ahead_of(hunt)
            over, now = hunt.over, (hunt.version, ahead)
            if now != last:
                last = now
                page = await asyncio.to_thread(view, hunt, ahead)
                found = await asyncio.to_thread(gallery, hunt)
                listed = [(_name(c), c["index"]) for c in shown(hunt)]
                yield [page, found, gr.update(interactive=over), gr.update(interactive=not over),
                       gr.update(visible=bool(listed)), gr.update(choices=listed)]  # fmt: skip
            rendered = len(hunt.works) - 1 == len(hunt.picked)
            if over and now[0] == hunt.version and (rendered or hunt.error):
                return
            await asyncio.sleep(REFRESH)


def view(hunt: Hunt, ahead: int = 0) -> str:
    """A search as it stands: how far, the winner, and what was picked."""
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
    parts.append(_chosen(hunt))
    return f'<section class="ac-trial" data-state="{hunt.state}">{"".join(parts)}</section>'


def _chosen(hunt: Hunt) -> str:
    """The winner, and what a person picked."""
    drawn = []
    if hunt.winner is not None:
        kept = hunt.winner.content.get("search") or {}
        rows = [("Score", _score(value)) for value in (kept.get("score") or {}).values()]
        for name, value in (kept.get("held_out_score") or {}).items():
            rows.append((f"Not searched: {name}", _score(value)))
        gains = [gain["mean"] for gain in (kept.get("gain") or {}).values() if "mean" in gain]
        rows += [("Mean of plain draws", _score(mean)) for mean in gains[:1]]
        below = markup.facts([(name, markup.text(value)) for name, value in rows])
        drawn.append(markup.figure("Winner", markup.medium(hunt.winner, "winner"), below))
    for number, one in hunt.picked.items():
        title = f"Candidate {number}, rendered"
        drawn.append(markup.figure(title, markup.medium(one, title)))
    return f'<div class="ac-found">{"".join(drawn)}</div>' if drawn else ""


def gallery(hunt: Hunt) -> str:
    """Candidates with their scores."""
    best = hunt.best()
    cells = []
    for one in shown(hunt):
        mark = ' class="ac-best"' if best is not None and one["index"] == best["index"] else ""
        name = markup.text(_name(one))
        image = (
            f'<img src="data:image/png;base64,{markup.text(one["png"])}" alt="candidate" '
            'class="ac-sharp">'
            if one.get("png")
            else ""
        )
        cells.append(f"<li{mark}>{image}<span>{name}</span></li>")
    if not cells:
        return ""
    return markup.gallery(_title(hunt), cells)


def shown(hunt: Hunt) -> list[dict[str, Any]]:
    """The newest candidates, with the best so far."""
    newest, best = hunt.candidates[-SHOWN:], hunt.best()
    return newest if best is None or best in newest else [best, *newest[1:]]


def _title(hunt: Hunt) -> str:
    """How many candidates of which kind: "40 candidates: 4 renders, 36 previews"."""
    kinds = [c["purpose"] for c in hunt.candidates]
    parts = [f"{n} {p}{'s' * (n > 1)}" for p in PURPOSES if (n := kinds.count(p))]
    title = f"{len(kinds)} candidates" + (f": {', '.join(parts)}" if len(parts) > 1 else "")
    return title + (f"; the newest {SHOWN}" if len(kinds) > SHOWN else "")


def _name(candidate: dict[str, Any]) -> str:
    kind = "" if candidate["purpose"] == "render" else f", {candidate['purpose']}"
    return f"{candidate['index']}: {_score(candidate['score'])}{kind}"


def _score(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3g}"
