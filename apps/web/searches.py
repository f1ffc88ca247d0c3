"""Searches of the Search tab: a job that asks for one, on the device, its candidates as they come.

The search itself is the renderer's; what is picked is rendered as any job, from its noise.
"""

from __future__ import annotations

import functools
import importlib
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.checks import sentence
from apps.web.device import FIRST, Device, Work
from apps.web.imports import once
from apps.web.site import Refused, Site

if TYPE_CHECKING:
    from accel import Search
    from apps.pairs import Rendered
    from apps.render.executors import Event
    from apps.render.plan import PlannedTask

FOLDER = "search"
KEPT = 20  # searches that a page can come back to
BATCH = 4  # candidates in one call: they appear so many at a time
MAX_RENDERS = 1000
PURPOSES = ("render", "draft", "preview")  # of candidates, nearest to the winner first
# What may score here: nothing that loads files of one's choosing, starts a command, calls a server.
VERIFIERS = {
    "the judge: is it what was asked for?": "judge",
    "sharpness": "sharpness",
    "contrast": "contrast",
    "colourfulness": "colourfulness",
    "brightness": "brightness",
    "darkness": "darkness",
}


@dataclass(frozen=True)
class Algorithm:
    """A way to search. `name`: as jobs have it; `search`: with its own settings; `drafts`: a recipe
    makes its drafts only."""

    name: str
    label: str
    words: str
    search: Search
    drafts: bool


def algorithms() -> list[Algorithm]:
    """All there are, in the words of their modules."""
    once()
    from apps.search import ALGORITHMS, SearchRequest, drafts, search_of

    found = []
    for name in ALGORITHMS:
        request = SearchRequest.model_validate({"algorithm": name, "verifier": "judge"})
        search = search_of(request)
        said = importlib.import_module(type(search).__module__).__doc__ or ""
        label, _, words = " ".join(said.split("\n\n")[0].split()).partition(": ")
        found.append(Algorithm(name, label, sentence(words), search, drafts(request)))
    return found


@dataclass(eq=False)
class Hunt:
    """One search. `candidates`: dicts with index, purpose, score, path and a small picture;
    `drafts`: the recipe makes drafts only, and what is picked is rendered without it."""

    id: str
    model: str
    recipe: Path | None
    job: dict[str, Any]
    folder: Path
    drafts: bool = False
    candidates: list[dict[str, Any]] = field(default_factory=list)
    state: str = "waiting"
    share: float = 0.0
    evaluations: int = 0
    error: str | None = None
    winner: Rendered | None = None
    picked: dict[int, Rendered] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)
    version: int = 0

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def best(self) -> dict[str, Any] | None:
        """The best so far of those that are nearest to what will be delivered."""
        for purpose in PURPOSES:
            own = [c for c in self.candidates if c["purpose"] == purpose and c["score"] is not None]
            if own:
                return max(own, key=lambda c: c["score"])
        return None


class Searches:
    """Starts, finds, cancels searches, and renders what is picked."""

    def __init__(self, site: Site, device: Device) -> None:
        self._site, self._device = site, device
        self._known: OrderedDict[str, Hunt] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where winners and what is picked are kept."""
        return self._site.out / FOLDER

    def find(self, hunt_id: object) -> Hunt | None:
        """The search of this id, if the server still has it."""
        return self._known.get(str(hunt_id))

    def start(
        self, model: str, recipe: Path | None, job: dict[str, Any], asked: dict[str, Any]
    ) -> Hunt:
        """Put a search into the queue. `asked`: algorithm, settings, verifier and renders.

        Raises:
            Refused: it cannot be searched.
        """
        once()
        from apps.search import SearchRequest, drafts

        renders = asked["renders"]
        if not isinstance(renders, int) or not 2 <= renders <= MAX_RENDERS:
            raise Refused(f"The budget must be a whole number of renders, 2 to {MAX_RENDERS:,}.")
        if asked["verifier"] not in VERIFIERS.values():
            raise Refused("There is no such measure here.")
        search = {
            "algorithm": asked["algorithm"],
            "settings": asked["settings"],
            "verifier": asked["verifier"],
            "budget": f"{renders} renders",
            "batch": BATCH,
        }
        hunt = Hunt(secrets.token_urlsafe(12), model, recipe, job, self.folder)
        task = self._plan(hunt, {**job, "search": search})
        hunt.drafts = drafts(SearchRequest.model_validate(search))
        with self._lock:
            self._known[hunt.id] = hunt
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._submit(hunt, task, functools.partial(self._on_search, hunt, task))
        return hunt

    def pick(self, hunt: Hunt, index: object) -> None:
        """Render one candidate in full; for no index, the best.

        Raises:
            Refused: there is none of this index.
        """
        if index is None:
            found = hunt.best()
        else:
            found = next((c for c in hunt.candidates if c["index"] == index), None)
        if found is None:
            raise Refused("Choose one of the candidates.")
        inputs = {"inputs": hunt.job["inputs"], "noise": found["path"]}
        task = self._plan(hunt, inputs, recipe=not hunt.drafts)
        number = found["index"]
        self._submit(hunt, task, functools.partial(self._on_pick, hunt, task, number))

    def cancel(self, hunt_id: object) -> None:
        """End a search now; what it found stays."""
        hunt = self.find(hunt_id)
        if hunt is None or hunt.over:
            return
        hunt.state = "cancelled"
        hunt.version += 1
        for work in hunt.works:
            self._device.end(work, "cancelled")

    def ahead_of(self, hunt: Hunt) -> int:
        """How many tasks of others run before this search begins."""
        return self._device.ahead_of(hunt.works[0]) if hunt.state == "waiting" else 0

    def _plan(self, hunt: Hunt, job: dict[str, Any], *, recipe: bool = True) -> PlannedTask:
        from apps.render.jobs import JobFileError, check_jobs
        from apps.render.plan import Settings, plan

        settings = Settings(
            model=hunt.model,
            threads=self._site.threads,
            dtype=self._site.dtype,
            device=self._site.device,
        )
        used = hunt.recipe if recipe else None
        asked = {**job, "recipe": None if used is None else str(used.resolve())}
        try:
            return plan(check_jobs([("this form", asked)]), settings, Path())[0]
        except JobFileError as error:
            raise Refused("; ".join(error.problems)) from None

    def _submit(self, hunt: Hunt, task: PlannedTask, sink: Any) -> None:
        work = Work(task.id, task.payload, hunt.folder, sink, FIRST, watch=True)
        hunt.works.append(work)
        hunt.version += 1
        self._device.submit(work)

    def _on_search(self, hunt: Hunt, task: PlannedTask, event: Event) -> None:
        kind = event["event"]
        if hunt.over:
            return
        if kind in ("start", "loading"):
            hunt.state = {"start": "running", "loading": "loading"}[kind]
        elif kind == "search":
            hunt.state = "running"
            hunt.share, hunt.evaluations = event["share"], event["evaluations"]
            hunt.candidates += event.get("candidates", [])
        elif kind == "done":
            hunt.winner = _rendered(hunt.folder, task)
            hunt.state = "done"
        else:
            _end(hunt, event)
        hunt.version += 1

    def _on_pick(self, hunt: Hunt, task: PlannedTask, number: int, event: Event) -> None:
        if event["event"] == "done":
            found = _rendered(hunt.folder, task)
            if found is not None:
                hunt.picked[number] = found
        elif event["event"] in ("failed", "lost"):
            hunt.error = sentence(event["fault"]["message"])
        hunt.version += 1


def _end(hunt: Hunt, event: Event) -> None:
    if event["event"] in ("failed", "lost"):
        hunt.error, hunt.state = sentence(event["fault"]["message"]), "failed"
    elif event["event"] in ("cancelled", "stopped"):
        hunt.state = "cancelled"


def _rendered(folder: Path, task: PlannedTask) -> Rendered | None:
    from apps.pairs import Rendered
    from apps.render.outputs import read_sidecar

    content = read_sidecar(folder / f"{task.stem}.json")
    return None if content is None else Rendered(folder, content)
