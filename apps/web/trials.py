"""One try of the Create tab: the same job without and with a recipe, on the device, watched.

A trial belongs to the server, not to the page: a page that is reloaded finds it again by its id.
Planning, rendering and files are the renderer's.
"""

from __future__ import annotations

import functools
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.device import FIRST, Device, Work
from apps.web.imports import once
from apps.web.site import CREATE, PLAIN, Refused, Site

if TYPE_CHECKING:
    from apps.pairs import Pair, Rendered
    from apps.render.executors import Event
    from apps.render.plan import PlannedTask

KEPT = 50  # trials that a page can come back to
WARM_UP_STEPS = 2
BASELINE = "baseline"
WARM_UP_FOLDER = ".warm-up"


@dataclass(eq=False)
class Side:
    """One of the two renders. `rows` has, a step, the batch rows that ran through each part."""

    name: str
    task: PlannedTask
    folder: Path
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    parts: list[str] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    rendered: Rendered | None = None


@dataclass(eq=False)
class Trial:
    """State of one try. `version` goes up with every change; `sides` has the baseline first."""

    id: str
    model: str
    recipe: str
    sides: list[Side]
    loading: bool = False
    error: str | None = None
    cancelled: bool = False
    version: int = 0
    works: list[Work] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.cancelled or self.error is not None or self.finished

    @property
    def finished(self) -> bool:
        return all(side.rendered is not None for side in self.sides)

    @functools.cached_property
    def pair(self) -> Pair:
        """Both results, compared. Only of a finished trial with two sides."""
        from apps.pairs import pair

        one, two = (side.rendered for side in self.sides)
        assert one is not None
        assert two is not None
        return pair([one], [two])[0]


class Trials:
    """Starts, finds and cancels trials."""

    def __init__(self, site: Site, device: Device) -> None:
        self._site, self._device = site, device
        self._known: OrderedDict[str, Trial] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, trial_id: object) -> Trial | None:
        """The trial of this id, if the server still has it."""
        return self._known.get(str(trial_id))

    def start(
        self, model: str, recipe: Path | None, job: dict[str, Any], *, keep: bool = False
    ) -> Trial:
        """Put both renders into the queue; with `keep`, not a baseline that is there already.

        Raises:
            Refused: the job cannot be rendered.
        """
        once()
        folder = self._site.out / CREATE
        names = [BASELINE] + ([recipe.stem] if recipe is not None else [])
        sides = [
            Side(name, self._plan(model, path, job), folder / name)
            for name, path in zip(names, (None, recipe), strict=False)
        ]
        trial = Trial(secrets.token_urlsafe(12), model, recipe.stem if recipe else PLAIN, sides)
        with self._lock:
            self._known[trial.id] = trial
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        warm = [self._warm_up(trial, side) for side in sides]
        if keep:
            _adopt(sides[0], "kept")
        waiting = [side for side in sides if side.rendered is None]
        trial.works = [*warm, *(self._work(trial, side) for side in waiting)]
        for work in trial.works if waiting else []:
            self._device.submit(work)
        return trial

    def cancel(self, trial_id: object) -> None:
        """End a trial now; what is finished of it stays."""
        trial = self.find(trial_id)
        if trial is None or trial.over:
            return
        trial.cancelled = True
        trial.version += 1
        for work in trial.works:
            self._device.end(work, "cancelled")

    def ahead_of(self, trial: Trial) -> int:
        """How many tasks of others run before this trial begins."""
        return self._device.ahead_of(trial.works[0]) if trial.works else 0

    def _plan(self, model: str, recipe: Path | None, job: dict[str, Any]) -> PlannedTask:
        from apps.render.jobs import JobFileError, check_jobs
        from apps.render.plan import Settings, plan

        settings = Settings(
            model=model,
            threads=self._site.threads,
            dtype=self._site.dtype,
            device=self._site.device,
        )
        asked = {**job, "recipe": None if recipe is None else str(recipe.resolve())}
        try:
            return plan(check_jobs([("this form", asked)]), settings, Path())[0]
        except JobFileError as error:
            raise Refused("; ".join(error.problems)) from None

    def _warm_up(self, trial: Trial, side: Side) -> Work:
        """A short run of what is the first of its kind on the device, so that no side pays in time
        for loading the model, or for what a method imports and reads."""
        task = side.task
        job = task.payload["job"]
        inputs = dict(job["inputs"])
        if "num_inference_steps" in inputs:
            inputs["num_inference_steps"] = min(WARM_UP_STEPS, inputs["num_inference_steps"])
        payload = {**task.payload, "job": {**job, "inputs": inputs}, "metadata": False}
        out = self._site.out / WARM_UP_FOLDER
        sink = functools.partial(_on_warm_up, trial, side)
        return Work(task.id, payload, out, sink, FIRST, warm_up=True)

    def _work(self, trial: Trial, side: Side) -> Work:
        sink = functools.partial(self._on_event, trial, side)
        return Work(side.task.id, side.task.payload, side.folder, sink, FIRST, watch=True)

    def _on_event(self, trial: Trial, side: Side, event: Event) -> None:
        kind = event["event"]
        if trial.over and kind != "done":
            return
        if kind == "start":
            side.state = "running"
        elif kind == "loading":
            trial.loading = True
        elif kind == "step":
            trial.loading = False
            side.step, side.steps = event["step"], event["steps"]
            if "rows" in event:
                side.parts = event["parts"]
                side.rows.append(event["rows"])
        elif kind == "stage":
            side.state = "decoding" if event["stage"] == "denoise" else "writing"
        elif kind == "done":
            _adopt(side, "done")
        elif kind in ("failed", "lost"):
            _fail(trial, event["fault"]["message"], self._device)
        elif kind in ("cancelled", "stopped"):
            trial.cancelled = True
        trial.version += 1


def _on_warm_up(trial: Trial, side: Side, event: Event) -> None:
    kind, first = event["event"], side is trial.sides[0]
    if kind in ("start", "done", "skipped"):
        trial.loading = first and kind == "start"
    elif kind == "lost" or (kind == "failed" and first):  # else: the steps may be too few for it
        trial.loading = False
        trial.error = trial.error or (None if trial.over else _told(event["fault"]["message"]))
        for work in trial.works:
            work.asked = work.asked or "cancelled"
    trial.version += 1


def _fail(trial: Trial, message: str, device: Device) -> None:
    trial.error = _told(message)
    for work in trial.works:
        device.end(work, "cancelled")


def _told(message: str) -> str:
    from apps.web.checks import sentence

    return sentence(message.removeprefix("ValueError: "))


def _adopt(side: Side, state: str) -> None:
    """Take over the finished files of a side, if they are there and of this very job."""
    from apps.pairs import Rendered
    from apps.render.outputs import is_complete, read_sidecar

    content = read_sidecar(side.folder / f"{side.task.stem}.json")
    if content is None or content["identity"] != side.task.id:
        return
    if not is_complete(side.folder, content):
        return
    ran = content.get("ran") or {}
    side.parts, side.rows = ran.get("parts", []), ran.get("rows", [])
    side.state = state
    side.rendered = Rendered(side.folder, content)
