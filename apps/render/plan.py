"""From checked jobs to tasks: models and recipes resolved, identities and file stems fixed.

A plan is complete: its payloads say everything a worker needs, so that a render can be resumed from
the folder alone. It is kept as `plan.jsonl` beside the ledger, from which a lost ledger is rebuilt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from apps.render import strict_json
from apps.render.identity import RECIPE_FILE, identity, model_folder, model_revision
from apps.render.jobs import JobFileError, PlacedJob
from apps.render.naming import default_stem, folded, stem_problem
from apps.search import check_request

PLAN_FILE = "plan.jsonl"
STAGES = ("denoise", "decode", "write")


@dataclass(frozen=True)
class Settings:
    """What the command line says about a whole render, and what of it decides pixels."""

    model: str | None = None
    recipe: str | None = None
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    strict: bool = False
    metadata: bool = True
    raw: bool = False  # videos also as exact frames, .npz: an mp4 loses some
    trusted: bool = False  # accept verifiers that start commands; `RunOptions` says if they may
    native: bool = False  # judge videos while their raw frames are there, without any network


@dataclass(frozen=True)
class PlannedTask:
    """One task: its identity, its file stem, and a payload that says everything."""

    id: str
    stem: str
    payload: dict[str, Any]

    @property
    def kind(self) -> str:
        """Of the ledger's kinds."""
        return self.payload.get("kind", "render")

    @property
    def bucket(self) -> str:
        """Tasks in one bucket share a loaded model and an attached recipe."""
        return strict_json.canonical([self.payload["model_revision"], self.payload["recipe"]])


def plan(jobs: Sequence[PlacedJob], settings: Settings, folder: Path) -> list[PlannedTask]:
    """Resolve jobs into tasks. `folder` is the job file's, for recipes named in it.

    Raises:
        JobFileError: a model or recipe that is missing or broken, one line each; two jobs that
            would render the same pixels or write the same file.
    """
    tasks: list[PlannedTask] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    revision = cache(model_revision)  # a thousand jobs look once at the files of their model
    for index, placed in enumerate(jobs, start=1):
        try:
            task = _task(index, placed, settings, folder, revision)
        except (ValueError, OSError) as error:
            problems.append(f"{placed.where}: {' '.join(str(error).split())}")
            continue
        for key in (task.id, folded(task.stem)):
            first = places.setdefault(key, placed.where)
            if first != placed.where:
                problems.append(f"{placed.where}: the same job or file name as {first}")
        tasks.append(task)
    if problems:
        raise JobFileError(problems)
    return tasks


def save_plan(folder: Path, tasks: Sequence[PlannedTask]) -> None:
    """Write the plan file atomically."""
    lines = [
        strict_json.canonical({"id": t.id, "stem": t.stem, "payload": t.payload}) for t in tasks
    ]
    write_atomically(folder / PLAN_FILE, ("\n".join(lines) + "\n").encode())


def load_plan(folder: Path) -> list[PlannedTask]:
    """Read the plan file. FileNotFoundError: the folder holds no render; ValueError: damaged."""
    path = folder / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no render (no {PLAN_FILE})")
    try:
        lines = path.read_bytes().split(b"\n")  # `splitlines` of text breaks at U+2028, too
        rows = [json.loads(line) for line in lines if line.strip()]
        return [_checked(row["id"], row["stem"], row["payload"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({' '.join(str(error).split())}); remove it and run `accel render`"
            " with the job file again: finished work is kept"
        ) from None


def merge_plans(old: Sequence[PlannedTask], new: Sequence[PlannedTask]) -> list[PlannedTask]:
    """Add a plan to what a folder already holds: same identity stays, same stem is replaced.

    What stays is read from where the new plan says: its recipe or model may have moved.
    """
    known = {task.id for task in old}
    again = {(task.id, task.stem): task for task in new}
    stems = {folded(task.stem) for task in new if task.id not in known}
    return [again.get((t.id, t.stem), t) for t in old if folded(t.stem) not in stems] + [
        task for task in new if task.id not in known
    ]


def _checked(task_id: str, stem: str, payload: dict[str, Any]) -> PlannedTask:
    """Ids and stems become file names, so they are checked like those of a job file; and a render
    is what its id says: nothing was put into it afterwards."""
    problem = stem_problem(stem)
    if problem is not None or not re.fullmatch(r"[0-9a-f]{64}", task_id):
        raise ValueError(f"task {task_id[:80]!r} with name {stem[:80]!r}")
    task = PlannedTask(task_id, stem, payload)
    if task.kind == "render" and identity(payload) != task_id:
        raise ValueError(f"task {stem[:80]!r} is not the job that its identity is of")
    return task


def _task(
    index: int,
    placed: PlacedJob,
    settings: Settings,
    folder: Path,
    revision: Callable[[str], str],
) -> PlannedTask:
    job = placed.job
    if job.search is not None:
        check_request(job.search, trusted=settings.trusted)
    model = job.model or settings.model
    if model is None:
        raise ValueError("no model: give the job one, or use --model")
    commit = revision(model)
    recipe, sha256 = _recipe(placed, settings, folder, model, commit)
    payload = {
        "job": job.asked(),
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "model_revision": commit,
        "recipe": recipe,
        "recipe_sha256": sha256,
        "threads": settings.threads,
        "dtype": settings.dtype,
        "device": settings.device,
        "strict": settings.strict,
        "metadata": settings.metadata,
        "raw": settings.raw,
        "native": settings.native,
    }
    own = identity(payload)
    stem = job.name or default_stem(index, own, job.inputs)
    return PlannedTask(own, stem, payload | {"stem": stem})


def _recipe(
    placed: PlacedJob, settings: Settings, folder: Path, model: str, revision: str
) -> tuple[str | None, str | None]:
    """The recipe of a job as (path, sha256): its own, else --recipe, else the model's, if any."""
    if placed.job.chooses_recipe():
        path = None if placed.job.recipe is None else folder / placed.job.recipe
    elif settings.recipe is not None:
        path = Path(settings.recipe)
    else:
        path = (model_folder(model) or _hub_folder(model, revision)) / RECIPE_FILE
        path = path if path.is_file() else None
    if path is None:
        return None, None
    # In a hub's cache files are links, and what a recipe refers to lies beside the link.
    place = str(path.parent.resolve() / path.name)
    return place, recipe_sha256(place)


@cache
def _hub_folder(model: str, revision: str) -> Path:
    """Where the recipe of a hub id lies at "hub:COMMIT"; fetched once for a thousand jobs."""
    from accel.loading import recipe_folder

    return recipe_folder(model, revision=revision.removeprefix("hub:"))


def recipe_sha256(path: str) -> str:
    """Content hash of a recipe file; ValueError or OSError with one line when it is broken."""
    import accel

    key = (path, Path(path).stat().st_mtime_ns if Path(path).exists() else 0)
    if key not in _RECIPES:
        _RECIPES[key] = accel.read_recipe(path).sha256
    return _RECIPES[key]


_RECIPES: dict[tuple[str, int], str] = {}
