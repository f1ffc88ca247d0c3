"""Make a finished output again from the record it carries, and compare raw frames by SHA-256."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accel.files import write_atomically
from apps.render.driver import RunOptions, Summary, submit
from apps.render.environment import versions
from apps.render.identity import identity, model_revision
from apps.render.jobs import Job
from apps.render.media import embedded_record
from apps.render.naming import stem_problem
from apps.render.outputs import SUFFIXES, read_sidecar
from apps.render.plan import PlannedTask, recipe_sha256
from apps.render.progress import Progress
from samplers.search.path import read_path


class _Payload(BaseModel):
    """What a payload must hold; what else it says, a worker knows or leaves alone."""

    model_config = ConfigDict(strict=True)

    kind: Literal["render"] = "render"
    job: Job
    model: str
    model_revision: str
    recipe: str | None
    recipe_sha256: str | None
    threads: int = Field(ge=1, le=1024)
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str


class _Record(BaseModel):
    """What an output carries."""

    model_config = ConfigDict(strict=True)

    payload: _Payload
    versions: dict[str, str] = {}
    expected: list[str] = Field(min_length=1)


@dataclass
class Verdict:
    """Whether the frames came out the same, and what has changed since if they did not."""

    expected: list[str]
    made: list[str]
    changes: list[str] = field(default_factory=list)
    kept: str | None = None

    @property
    def same(self) -> bool:
        return bool(self.made) and all(digest in self.made for digest in self.expected)

    def lines(self) -> list[str]:
        told = [f"kept in {self.kept}"] if self.kept else []
        told += [f"changed since: {change}" for change in self.changes]
        if self.same:
            return [*told, f"the same frames (SHA-256 {self.expected[0][:16]})"]
        return [*told, f"the frames differ: {self.expected} then, {self.made} now"]


def again(file: Path, out: Path | None, progress: Progress, trust: bool) -> Verdict:
    """Render `file` again in a temporary folder, and copy what came out into `out`.

    Raises:
        ValueError: the file carries no record, its model or recipe is gone, `out` holds files of
            that name, or rendering failed.
    """
    record = read_record(file)
    payload, changes = _current(record)
    task_id = identity(payload)
    task = PlannedTask(task_id, payload["stem"], payload)
    if out is not None and (there := _named(out, task.stem)):
        raise ValueError(f"{out} holds {there[0]} already; give a folder without it")
    with tempfile.TemporaryDirectory(prefix="accel-rerender-") as scratch:
        folder = Path(scratch)
        options = RunOptions(trust_remote_code=trust)
        summary = submit(folder, [task], options, progress)
        made = read_sidecar(folder / f"{task.stem}.json")
        if made is None or made["identity"] != task_id:
            raise ValueError(f"it could not be rendered: {_why(summary)}")
        names = [entry["name"] for entry in made["files"]] + [f"{task.stem}.json"]
        for name in names if out is not None else []:  # the sidecar last, as in `commit`
            write_atomically(out / name, (folder / name).read_bytes())
    digests = [entry["frames_sha256"] for entry in made["files"]]
    return Verdict(record["expected"], digests, changes, None if out is None else str(out))


def read_record(file: Path) -> dict[str, Any]:
    """The record of an output: from inside it, else from the sidecar next to it.

    Returns a dict with payload, versions and `expected` (SHA-256 of the frames of this file, or of
    all files for a sidecar). ValueError when there is none, or it is not one of ours.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    found = None if file.suffix == ".json" else embedded_record(file)
    if found is not None:
        found = {**found, "expected": [found.get("frames_sha256")]}
    else:
        found = _from_sidecar(file)
    if found is None:
        raise ValueError(f"{file}: carries no record of how it was made, and has no sidecar")
    try:
        _Record.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: its record cannot be used: {place}: {first['msg']}") from None
    return found


def _from_sidecar(file: Path) -> dict[str, Any] | None:
    stem = file.stem
    for name in (f"{stem}.json", f"{stem.rpartition('.')[0]}.json"):
        content = read_sidecar(file.with_name(name))
        if content is not None:
            wanted = [f for f in content["files"] if file.name in (f["name"], name)]
            return {**content, "expected": [f["frames_sha256"] for f in wanted or content["files"]]}
    return None


def _current(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The payload with today's model and recipe, and what is different from then."""
    payload = dict(record["payload"])
    changes = [
        f"{name} {then} -> {versions().get(name, 'not installed')}"
        for name, then in record.get("versions", {}).items()
        if versions().get(name) != then
    ]
    revision = model_revision(payload["model"])
    if revision != payload["model_revision"]:
        changes.append(f"model {payload['model']}")
        payload["model_revision"] = revision
    if payload["recipe"] is not None:
        try:
            sha256 = recipe_sha256(payload["recipe"])
        except OSError as error:
            raise ValueError(f"its recipe cannot be read: {error}") from None
        if sha256 != payload["recipe_sha256"]:
            changes.append(f"recipe {payload['recipe']}")
            payload["recipe_sha256"] = sha256
    if "search" in payload["job"]:
        _use_found(payload, record)
    payload.setdefault("strict", False)
    payload.setdefault("metadata", True)
    stem = payload.get("stem")
    if not isinstance(stem, str) or stem_problem(stem) is not None:
        payload["stem"] = "rerender"
    return payload, changes


def _use_found(payload: dict[str, Any], record: dict[str, Any]) -> None:
    """Instead of searching again, begin from the noise that was found."""
    found = record.get("search")
    if not isinstance(found, dict) or "path" not in found:
        raise ValueError("its record does not say which noise its search found")
    kept = {k: v for k, v in payload["job"].items() if k not in ("search", "seed")}
    payload["job"] = {**kept, "seed": 0, "noise": found["path"]}
    read_path(found["path"])
    if found.get("drafts"):  # its recipe made drafts only
        payload["recipe"] = payload["recipe_sha256"] = None


def _named(folder: Path, stem: str) -> list[str]:
    """The outputs and the sidecar of a stem that a folder holds."""
    endings = "|".join(map(re.escape, SUFFIXES))
    own = re.compile(rf"{re.escape(stem)}(\.json|(\.\d+)?({endings}))", re.IGNORECASE)
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in there if own.fullmatch(path.name))


def _why(summary: Summary) -> str:
    if summary.failures:
        return summary.failures[0].error or "unknown"
    return summary.stopped or "it was interrupted"
