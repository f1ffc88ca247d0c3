"""The Batch tab: a file of jobs, rendered by the ledger; the page only looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import markup
from apps.web.acting import LAST, QUIET, acting, offered
from apps.web.batches import MAX_BYTES, Batches, Status
from apps.web.checks import sentence
from apps.web.recipe_view import choices
from apps.web.site import PLAIN, Refused

if TYPE_CHECKING:
    from apps.web.page import App

PAGE = 24  # pictures of the gallery on a page
REFRESH = 1.0  # seconds
EXAMPLE = (
    '{"seed": 1, "inputs": {"class_labels": [3], "num_inference_steps": 50}}\n'
    '{"seed": 2, "inputs": {"class_labels": [67], "num_inference_steps": 50}}'
)
NO_BATCH = markup.empty(
    "No batch yet",
    "Upload a file with one job a line, or write the lines, and press Start. A batch goes on when "
    "you close this page, and can be paused, resumed and cancelled from any other.",
)


class BatchTab:
    """Builds the tab and answers its events."""

    tab: gr.Tab

    def __init__(self, app: App) -> None:
        self._app = app

    @property
    def _batches(self) -> Batches:
        return self._app.batches

    def build(self) -> None:
        """Lay the tab out."""
        models = list(self._app.site.models)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_classes="ac-form"):
                self.name = gr.Textbox(label="Name", placeholder="made from the date")
                self.model = gr.Dropdown(
                    models, value=models[0], label="Model, for jobs that name none"
                )
                self.recipe = gr.Dropdown(
                    [("nothing (baseline only)", PLAIN)], value=PLAIN,
                    label="Recipe, for jobs that name none", elem_id="batch-recipe",
                )  # fmt: skip
                self.file = gr.File(
                    label=f"Jobs: a .jsonl file of at most {MAX_BYTES >> 20} MB",
                    file_types=[".jsonl"], height=170,
                )  # fmt: skip
                self.lines = gr.Textbox(
                    label="or one job a line, here", lines=4, max_lines=12, placeholder=EXAMPLE,
                    elem_classes="ac-mono",
                )  # fmt: skip
                self.begin = gr.Button("Start", variant="primary", elem_id="start-batch")
                self.refused = gr.HTML()
            with gr.Column(scale=9, min_width=300):
                self.chosen = gr.Dropdown(
                    [], label="Batch", visible=False, elem_id="batch", interactive=True
                )
                self.status = gr.HTML(NO_BATCH, elem_id="batch-status")
                with gr.Row(visible=False) as self.buttons:
                    self.pause = gr.Button("Pause", size="sm", min_width=90)
                    self.resume = gr.Button("Resume", size="sm", min_width=90)
                    self.retry = gr.Button("Try failed again", size="sm", min_width=90)
                    self.cancel = gr.Button("Cancel", size="sm", variant="stop", min_width=90)
                self.said = gr.HTML()
                self.gallery = gr.HTML()
                with gr.Row(visible=False) as self.pages:
                    self.older = gr.Button("Previous page", size="sm", min_width=90)
                    self.newer = gr.Button("Next page", size="sm", min_width=90)
        self.page = gr.State(0)
        self.seen = gr.State("")
        self.timer = gr.Timer(REFRESH, active=False)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        shown = [self.status, self.buttons, self.pause, self.resume, self.retry, self.cancel,
                 self.gallery, self.pages, self.seen]  # fmt: skip
        look = (self._look, [self.chosen, self.page, self.seen], shown)
        self.tab.select(self._list, self.chosen, [self.chosen, self.timer], **QUIET).then(
            *look, **QUIET
        )
        blocks.load(self._list, self.chosen, [self.chosen, self.timer], **QUIET)
        self.timer.tick(*look, **QUIET, trigger_mode="once", concurrency_limit=None)
        gr.on([self.tab.select, self.model.change], self._recipes, [self.model, self.recipe],
              self.recipe, **LAST)  # fmt: skip
        inputs = [self.name, self.model, self.recipe, self.file, self.lines]
        self.begin.click(
            self._start, inputs, [self.chosen, self.refused, self.file, self.name, self.page],
            api_visibility="private", show_progress="minimal",
        ).then(*look, **QUIET)  # fmt: skip
        self.chosen.input(
            lambda: (0, "", ""), None, [self.page, self.seen, self.said], **QUIET
        ).then(*look, **QUIET)
        for button, do in (
            (self.pause, self._batches.pause),
            (self.resume, self._batches.resume),
            (self.retry, lambda name: self._batches.resume(name, failed=True)),
            (self.cancel, self._batches.cancel),
        ):
            button.click(acting(do), self.chosen, self.said, **QUIET).then(*look, **QUIET)
        for button, by in ((self.older, -1), (self.newer, 1)):
            button.click(lambda page, by=by: max(0, page + by), self.page, self.page, **QUIET).then(
                *look, **QUIET
            )

    def _list(self, chosen: str | None) -> list[Any]:
        names = self._batches.names()
        return [offered(names, chosen, visible=bool(names)), gr.Timer(active=True)]

    def _recipes(self, model: str, recipe: str) -> Any:
        try:
            fit, _ = choices(self._app, self._app.site.model(model))
        except (Refused, ValueError, OSError):
            fit = [("nothing (baseline only)", PLAIN)]
        known = [name for _, name in fit]
        return gr.update(choices=fit, value=recipe if recipe in known else PLAIN)

    def _start(self, name: str, model: str, recipe: str, file: str | None, lines: str) -> list[Any]:
        try:
            raw = _uploaded(file) if file else lines.encode("utf-8", "surrogatepass")
            if not raw.strip():
                raise Refused("Upload a file of jobs, or write one job a line.")
            made = self._batches.create(name, raw, model, recipe)
        except (Refused, ValueError, OSError) as error:
            return [gr.skip(), markup.notice(sentence(str(error))), gr.skip(), gr.skip(), 0]
        chosen = gr.update(choices=self._batches.names(), value=made, visible=True)
        return [chosen, "", gr.update(value=None), "", 0]

    def _look(self, name: str | None, page: int, seen: str) -> list[Any]:
        """The chosen batch as it is now; nothing is sent if nothing has changed."""
        try:
            status = self._batches.status(name) if name else None
        except Refused:
            status = None
        if status is None:
            return [NO_BATCH, gr.update(visible=False), *[gr.skip()] * 4, "",
                    gr.update(visible=False), ""]  # fmt: skip
        done = status.counts["done"]
        last = max(0, (done - 1) // PAGE)
        page = min(page, last)
        now = repr((status, page))
        if now == seen:
            return [gr.skip()] * 9
        files = self._batches.finished(name, page * PAGE, PAGE)
        return [
            status_view(status),
            gr.update(visible=True),
            gr.update(interactive=status.running),
            gr.update(interactive=not status.running and not status.elsewhere and status.left > 0),
            gr.update(interactive=not status.running and not status.elsewhere
                      and status.counts["failed"] + status.counts["cancelled"] > 0),
            gr.update(interactive=status.left > 0),
            gallery(files, page, last, done),
            gr.update(visible=last > 0),
            now,
        ]  # fmt: skip


def status_view(status: Status) -> str:
    """How a batch stands, in words, with a bar."""
    done, total = status.counts["done"], status.total
    words = f"{done} of {total} done"
    if status.running and status.left:
        state = "Rendering"
    elif status.elsewhere:
        state = "Rendered by another program"
    elif status.left:
        state = "Paused"
    else:
        state = "Finished" if done == total else "Ended"
    parts = [f"<p class='ac-batch-state'>{markup.text(state)}</p>", markup.bar(done, total, words)]
    if status.doing is not None:
        name, step, steps = status.doing
        label = f"{name}: step {step} of {steps}" if steps else f"{name}: starting"
        parts.append(markup.bar(step, steps or 1, label))
    counted = [(key, status.counts[key]) for key in ("failed", "cancelled") if status.counts[key]]
    if counted:
        parts.append(markup.facts([(key.capitalize(), str(n)) for key, n in counted]))
    for task in status.failed:
        parts.append(markup.notice(f"{task.payload['stem']}: {task.error}", "warning"))
    if state == "Paused":
        parts.append(markup.notice("What was done is kept; Resume does the rest.", "info"))
    parts += [markup.notice(line, "info") for line in status.said]
    word = state.split()[0].lower()
    return f'<section class="ac-batch" data-state="{word}">{"".join(parts)}</section>'


def gallery(files: list[Path], page: int, last: int, done: int) -> str:
    """Finished pictures and videos, each a link to itself."""
    if not files:
        return ""
    cells = []
    for path in files:
        alt = markup.text(path.stem)
        if path.suffix == ".mp4":
            inside = (
                f'<video src="{markup.url(path)}" aria-label="{alt}" controls loop muted '
                'playsinline preload="metadata"></video>'
            )
        else:
            inside = (
                f'<a href="{markup.url(path)}" target="_blank" rel="noopener">'
                f'<img src="{markup.url(path)}" alt="{alt}" class="{markup.sharpness(path)}" '
                'loading="lazy"></a>'
            )
        cells.append(f"<li>{inside}<span>{alt}</span></li>")
    where = f"{done} finished" + (f", page {page + 1} of {last + 1}" if last else "")
    return markup.gallery(where, cells)


def _uploaded(path: str) -> bytes:
    """The bytes of an upload, which is then removed."""
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise Refused(f"The file is larger than {MAX_BYTES >> 20} MB, which is the limit here.")
    raw = file.read_bytes()
    file.unlink()
    return raw
