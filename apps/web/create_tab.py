"""The Create tab: one job, without and with acceleration."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.acting import LAST, QUIET, SECRET
from apps.web.checks import offers, sentence
from apps.web.job_fields import JobFields
from apps.web.method_settings import edited
from apps.web.recipe_view import choices, default_choice, told
from apps.web.settings_form import Edits, SettingsForm
from apps.web.site import PLAIN, RECIPES, Refused
from apps.web.trial_view import GONE, NOTHING_YET, view

if TYPE_CHECKING:
    from pathlib import Path

    from apps.web.page import App

REFRESH = 0.15  # seconds between two looks at a running trial
BY_RECIPE, BY_METHODS = "A recipe", "Methods of my choice"


class CreateTab:
    """Builds the tab inside the Blocks that are open, and answers its events."""

    def __init__(self, app: App) -> None:
        self._app = app

    def build(self) -> None:
        """Lay the tab out. `wire` connects it."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self._form()
            with gr.Column(scale=9, min_width=300):
                self.result = gr.HTML(NOTHING_YET, elem_id="trial")
        self.trial = gr.BrowserState("", storage_key="accel-trial", secret=SECRET)

    def _form(self) -> None:
        self.job = JobFields(self._app)
        self.job.build()
        self.how = gr.Radio([BY_RECIPE, BY_METHODS], value=BY_RECIPE, label="Accelerate with")
        self.recipe = gr.Dropdown([("nothing", PLAIN)], value=PLAIN, label="Recipe")
        self.recipe_note = gr.HTML()
        self.methods = gr.CheckboxGroup([], label="Methods", visible=False, elem_classes="ac-list")
        self.form = SettingsForm()
        with gr.Column(visible=False, elem_id="settings") as self.settings:
            for one in offers(self._app.site.recipes().values()):
                self.form.box(one.key, one.label, one.method)
        self.conflict = gr.HTML()
        with gr.Accordion("More settings", open=False):
            self.job.build_more()
            self.keep = gr.Checkbox(
                False, label="Keep the baseline of an earlier run (no speed is shown then)"
            )
            self.dice = gr.Button("Another seed", size="sm")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=110)
            self.stop = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=90)
        self.notice = gr.HTML()

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        job = self.job
        chosen = [*job.following, self.recipe, self.methods, self.recipe_note, self.conflict]
        gr.on(
            [blocks.load, job.model.change], self._choose_model, job.model, chosen,
            **{**LAST, "show_progress": "minimal"},
        )  # fmt: skip
        ways = [self.recipe, self.recipe_note, self.methods, self.settings, self.conflict]
        self.how.change(self._choose_way, self.how, ways, **QUIET)
        self.recipe.change(self._describe, [self.recipe, job.model], self.recipe_note, **QUIET)
        form = self.form
        self.methods.change(form.showing, self.methods, form.boxes, **QUIET)
        gr.on(
            [self.methods.change, *(one.input for one in form.values)],
            self._check, [job.model, self.methods, *form.values], self.conflict, **LAST,
        )  # fmt: skip
        self.dice.click(lambda: random.randrange(2**31), None, job.seed, **QUIET)
        asked = [self.trial, self.how, self.recipe, self.methods, self.keep, *job.all, *form.values]
        watched = [self.result, self.go, self.stop]
        gr.on(
            [self.go.click, job.prompt.submit],
            self._start, asked, [self.trial, self.notice], **QUIET,
        ).then(self._watch, self.trial, watched, concurrency_limit=None, **QUIET)  # fmt: skip
        self.stop.click(self._cancel, self.trial, None, queue=False, **QUIET)
        blocks.load(self._watch, self.trial, watched, concurrency_limit=None, **QUIET)

    # answers

    def _choose_model(self, model: str) -> list[Any]:
        try:
            fields = self.job.follow(model)
        except (Refused, OSError, ValueError) as error:
            nothing = [gr.update(visible=False)] * len(self.job.following)
            return [*nothing, gr.update(choices=[("nothing", PLAIN)], value=PLAIN),
                    gr.update(choices=[]), "", markup.notice(sentence(str(error)))]  # fmt: skip
        fit, left_out = choices(self._app, model)
        value = default_choice(self._app, model, fit)
        note = told(self._app, value, model, left_out)
        return [*fields, gr.update(choices=fit, value=value),
                gr.update(choices=self._offers(model), value=[]), note, ""]  # fmt: skip

    def _offers(self, model: str) -> list[tuple[str, str]]:
        """Methods that fit the model, each alone."""
        found = offers(self._app.site.recipes().values())
        fit = [one for one in found if self._app.checks.problem(model, [one.method]) is None]
        return [(one.label, one.key) for one in fit]

    def _choose_way(self, how: str) -> list[Any]:
        recipe = how == BY_RECIPE
        return [gr.update(visible=recipe)] * 2 + [gr.update(visible=not recipe)] * 3

    def _describe(self, recipe: str, model: str) -> str:
        return told(self._app, recipe, model)

    def _check(self, model: str, keys: list[str], *values: Any) -> str:
        try:
            methods = self._ticked(keys, self.form.edits(values))
            if not methods:
                return ""
            problem = self._app.checks.problem(self._app.site.model(model), methods)
        except (Refused, ValueError) as error:
            problem = sentence(str(error))
        if problem is None:
            words = "These go together." if len(methods) > 1 else "This fits the model."
            return markup.notice(words, "info")
        return markup.notice(problem)

    def _ticked(self, keys: list[str], edits: Edits) -> list[Any]:
        """The ticked methods with the settings that the form has.

        Raises:
            Refused, ValueError: no such method, or a value that it cannot have.
        """
        known = {one.key: one.method for one in offers(self._app.site.recipes().values())}
        if missing := [key for key in keys if key not in known]:
            raise Refused(f"There is no method {str(missing[0])[:80]!r} here.")
        return [edited(known[key], edits.get(key, {})) for key in keys]

    def _start(
        self, last: str, how: str, recipe: str, keys: list[str], keep: bool, *values: Any
    ) -> tuple[Any, str]:
        """Start a trial; the return key asks for one also while Generate is off."""
        running = self._app.trials.find(last)
        if running is not None and not running.over:
            return gr.skip(), markup.notice("Cancel what is running, or wait until it is done.")
        of_job = len(self.job.all)
        try:
            model, job = self.job.job(list(values[:of_job]))
            path = self._recipe(how, recipe, keys, self.form.edits(values[of_job:]), model)
            trial = self._app.trials.start(model, path, job, keep=keep)
        except (Refused, ValueError, OSError) as error:
            return gr.skip(), markup.notice(sentence(str(error)))
        return trial.id, ""

    def _recipe(
        self, how: str, recipe: str, keys: list[str], edits: Edits, model: str
    ) -> Path | None:
        """The recipe file to use: the chosen one, or the ticked methods written as one."""
        import accel

        if how == BY_RECIPE:
            return None if recipe == PLAIN else self._app.site.recipe(recipe)
        methods = self._ticked(keys, edits)
        if not methods:
            raise Refused("Tick at least one method, or choose a recipe.")
        if problem := self._app.checks.problem(model, methods):
            raise Refused(problem)
        made = accel.Recipe(tuple(methods))
        words = "-".join(type(method).__name__.lower() for method in methods)[:48]
        name = f"{words}-{made.digest()[:8]}"
        path = self._app.site.out / RECIPES / f"{name}.yaml"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            accel.write_recipe(path, made, name=name, description="Ticked in the app.")
        return path

    def _cancel(self, trial_id: str) -> None:
        self._app.trials.cancel(trial_id)

    async def _watch(self, trial_id: str) -> AsyncIterator[Any]:
        """Show a trial until it is over."""
        trial = self._app.trials.find(trial_id)
        if trial is None:
            shown = GONE if trial_id else NOTHING_YET
            yield shown, gr.update(interactive=True), gr.update(interactive=False)
            return
        last: Any = None
        while True:
            over = trial.over
            ahead = 0 if over else self._app.trials.ahead_of(trial)
            now = (trial.version, ahead, over)
            if now != last:
                last = now
                shown = await asyncio.to_thread(view, trial, ahead)
                yield shown, gr.update(interactive=over), gr.update(interactive=not over)
            if over and trial.version == last[0]:
                return
            await asyncio.sleep(REFRESH)
