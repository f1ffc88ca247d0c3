"""Evaluations: folders of `apps.evaluate`, and the threads of this server that work in them."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.web.device import Device, OnDevice
from apps.web.imports import once
from apps.web.site import REPORTS, Refused, Site

MAX_SAMPLES = 50_000
KINDS = {
    "fidelity to the baseline": "fidelity",
    "right by the judge": "judge",
    "distance to real samples": "fid",
}


@dataclass(eq=False)
class _Run:
    """A thread of this server that works on an evaluation."""

    thread: threading.Thread | None = None
    paused: bool = False
    heard: dict[str, Any] = field(default_factory=dict)
    said: str = ""

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass(frozen=True)
class Standing:
    """How an evaluation stands. `phase`, `done` and `total` while it runs; `written`: its page."""

    name: str
    running: bool
    finished: bool
    phase: str = ""
    done: int = 0
    total: int = 0
    said: str = ""
    written: float = 0.0


class Evaluations:
    """Starts, pauses, continues and looks at evaluations."""

    def __init__(self, site: Site, device: Device) -> None:
        self._site, self._device = site, device
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """All evaluations of the output folder, newest first."""
        from apps.evaluate import REQUEST

        found = [path.parent for path in (self._site.out / REPORTS).glob(f"*/{REQUEST}")]
        found.sort(key=lambda folder: (folder / REQUEST).stat().st_mtime, reverse=True)
        return [folder.name for folder in found]

    def folder(self, name: object) -> Path:
        """The folder of an evaluation that exists."""
        if name not in self.names():
            raise Refused(f"There is no evaluation called {str(name)[:80]!r} here.")
        return self._site.out / REPORTS / str(name)

    def create(
        self, name: str, model: str, recipes: list[str], kinds: list[str], samples: object
    ) -> str:
        """Check what is asked and start it; returns its name.

        Raises:
            Refused, ValueError, OSError: it cannot be evaluated; nothing was started.
        """
        from accel.files import write_atomically
        from apps.evaluate import REQUEST, Request, plan
        from apps.render.naming import stem_problem

        once()
        name = name.strip() or time.strftime("evaluation-%Y%m%d-%H%M%S")
        if problem := stem_problem(name):
            raise Refused(f"The name {name[:60]!r} {problem}.")
        if name in self.names():
            raise Refused(f"There is an evaluation called {name!r} already. Choose another name.")
        if not recipes:
            raise Refused("Choose at least one recipe.")
        if not isinstance(samples, int) or not 2 <= samples <= MAX_SAMPLES:
            raise Refused(f"Samples must be a whole number from 2 to {MAX_SAMPLES:,}.")
        if unknown := [kind for kind in kinds if kind not in KINDS.values()]:
            raise Refused(f"There is no measure called {str(unknown[0])[:80]!r}.")
        request = Request(
            model=self._site.model(model),
            recipes=tuple(str(self._site.recipe(recipe)) for recipe in recipes),
            kinds=tuple(kinds),
            samples=samples,
            threads=self._site.threads,
            device=self._site.device,
            dtype=self._site.dtype,
        )
        plan(request)
        folder = self._site.out / REPORTS / name
        folder.mkdir(parents=True)
        write_atomically(folder / REQUEST, json.dumps(request.as_json()).encode())
        self.go_on(name)
        return name

    def go_on(self, name: object) -> None:
        """Do what is left of an evaluation."""
        from apps.evaluate import REQUEST, Request

        folder = self.folder(name)
        request = Request.read(json.loads((folder / REQUEST).read_text("utf-8")))
        with self._lock:
            before = self._runs.get(str(name))
            if before is not None and before.alive:
                raise Refused(f"{name} is being worked on already.")
            run = self._runs[str(name)] = _Run()
            target = threading.Thread(
                target=self._work, args=(run, request, folder), name=f"evaluate {name}", daemon=True
            )
            run.thread = target
            target.start()

    def pause(self, name: object) -> None:
        """Stop after the step it is at; nothing that was done is lost."""
        run = self._runs.get(str(name))
        if run is not None:
            run.paused = True

    def standing(self, name: object) -> Standing:
        """How an evaluation stands."""
        from apps.evaluate import PAGE

        page = self.folder(name) / PAGE
        run = self._runs.get(str(name)) or _Run()
        heard = run.heard
        return Standing(
            str(name),
            run.alive,
            page.is_file() and not run.alive,
            heard.get("phase", ""),
            heard.get("done", 0),
            heard.get("total", 0),
            run.said,
            page.stat().st_mtime if page.is_file() else 0.0,
        )

    def page(self, name: object) -> str:
        """The report of a finished evaluation, as HTML."""
        from apps.evaluate import PAGE

        return (self.folder(name) / PAGE).read_text("utf-8")

    def close(self) -> None:
        """Pause everything, and wait until it is on disk."""
        for run in list(self._runs.values()):
            run.paused = True
        for run in list(self._runs.values()):
            if run.thread is not None:
                run.thread.join(10)

    def _work(self, run: _Run, request: Any, folder: Path) -> None:
        from apps.evaluate import Unfinished
        from apps.evaluate import run as evaluate
        from apps.render.faults import StorageFault
        from apps.render.lock import FolderBusy
        from apps.web.checks import sentence

        def heard(event: dict[str, Any]) -> None:
            run.heard = event
            if "failed" in event:
                run.said = sentence(f"{event.get('name')}: {event['failed']}")

        def executor(place: Path) -> OnDevice:
            return OnDevice(self._device, place)

        try:
            evaluate(request, folder, progress=heard, stop=lambda: run.paused, executor=executor)
        except Unfinished as error:
            run.said = "" if error.interrupted else sentence(str(error))
        except (FolderBusy, StorageFault, ValueError, OSError, sqlite3.Error) as error:
            run.said = sentence(str(error))
