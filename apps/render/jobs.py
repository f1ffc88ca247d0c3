"""What a job is: the schema, and the reader of a job file.

A job file is JSON Lines (one job per line) or YAML (see `matrix.py`). Everything wrong with it is
found before anything starts, one line per problem, with the line number. A job holds numbers,
text and lists only: it cannot name code, and nothing in it is ever evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from apps.render import strict_json
from apps.render.naming import folded, name_problem
from apps.search import SearchRequest
from samplers.search.path import read_path

# Arguments of a pipeline call that the renderer sets itself, or that cannot come from a file.
RESERVED_INPUTS = {
    "callback": "progress is reported by the renderer",
    "callback_on_step_end": "progress is reported by the renderer",
    "callback_on_step_end_tensor_inputs": "progress is reported by the renderer",
    "generator": "set `seed`",
    "latents": "set `seed`",
    "output_type": "set `format`",
    "return_dict": "the renderer decides",
}


class JobFileError(ValueError):
    """A job file that cannot be rendered; `problems` has one line for each thing wrong."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class Job(BaseModel):
    """One picture (or video, or a few of them) to render."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str | None = Field(None, description="File stem of the output; default: made from inputs")
    model: str | None = Field(None, description="zoo:NAME, a folder or a hub id; default: --model")
    recipe: str | None = Field(
        None, description="Recipe file, relative to this file; null: none; default: --recipe"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first sample's CPU generator")
    inputs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the pipeline call: numbers, text, true, false, null and lists",
    )
    format: Literal["auto", "png", "mp4"] = Field("auto", description="auto: png or mp4 by shape")
    fps: int = Field(16, ge=1, le=240, description="Frames per second of an mp4")
    search: SearchRequest | None = Field(None, description="Search better noise first")
    noise: list[dict[str, Any]] | None = Field(
        None, description="Path to a search's winner, from its record; instead of seed"
    )

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and (problem := name_problem(name)):
            raise ValueError(f"{_short(name)} {problem}")
        return name

    @field_validator("model", "recipe")
    @classmethod
    def _visible(cls, text: str | None) -> str | None:
        if text is not None and (not text.strip() or not text.isprintable()):
            raise ValueError(f"{_short(text)} is empty or has control characters")
        return text

    @field_validator("inputs")
    @classmethod
    def _plain_inputs(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        for key, value in inputs.items():
            if not key.isidentifier():
                raise ValueError(f"{_short(key)} is not an argument name")
            if key in RESERVED_INPUTS:
                raise ValueError(f"{key!r} cannot be given here: {RESERVED_INPUTS[key]}")
            if _has_object(value):
                raise ValueError(f"{key!r} holds an object; numbers, text and lists only")
        steps = inputs.get("num_inference_steps")
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(f"num_inference_steps is {_short(steps)}; a whole number from 1 on")
        strict_json.check(inputs)
        return inputs

    @field_validator("noise")
    @classmethod
    def _readable_noise(cls, noise: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if noise is not None:
            read_path(noise)
        return noise

    @model_validator(mode="after")
    def _one_noise(self) -> Job:
        if self.noise is not None and (self.search is not None or self.seed):
            raise ValueError("noise is given: no seed and no search beside it")
        return self

    def chooses_recipe(self) -> bool:
        """True when the job names its recipe itself, even as null."""
        return "recipe" in self.model_fields_set

    def asked(self) -> dict[str, Any]:
        """What the job asks for, defaults included, without where model and recipe come from."""
        return self.model_dump(exclude={"model", "recipe"}, exclude_none=True)


@dataclass(frozen=True)
class PlacedJob:
    """A job and where it was read from, e.g. `jobs.jsonl:7`."""

    job: Job
    where: str


def read_jobs(path: Path, overrides: dict[str, Any] | None = None) -> list[PlacedJob]:
    """Read and check a .jsonl or .yaml job file; JobFileError lists everything wrong with it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JobFileError([f"{path}: cannot be read: {error.strerror}"]) from None
    if path.suffix in (".yaml", ".yml"):
        from apps.render.matrix import expand

        try:
            rows = expand(raw, path.name)
        except ValueError as error:
            raise JobFileError([f"{path.name}: {error}"]) from None
        return check_jobs(rows, overrides)
    return check_jobs(job_lines(raw, path.name), overrides)


def check_jobs(
    rows: Iterable[tuple[str, Any]], overrides: dict[str, Any] | None = None
) -> list[PlacedJob]:
    """Check (where, parsed value or ValueError) pairs; JobFileError lists everything wrong."""
    placed: list[PlacedJob] = []
    problems: list[str] = []
    seen = _Seen()
    empty = True
    for where, value in rows:
        empty = False
        try:
            job = parse_job(value, overrides or {})
            seen.add(job, where)
        except ValueError as error:
            problems.extend(f"{where}: {line}" for line in str(error).splitlines())
            continue
        placed.append(PlacedJob(job, where))
    if empty:
        problems.append("the job file is empty: no job in it")
    if problems:
        raise JobFileError(problems)
    return placed


def parse_job(value: Any, overrides: dict[str, Any]) -> Job:
    """Build one job from a parsed value; ValueError with one line per problem."""
    from apps.render.matrix import apply_dotted

    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError('a job is a JSON object like {"seed": 1, "inputs": {...}}')
    try:
        return Job.model_validate(apply_dotted(value, overrides))
    except ValidationError as error:
        raise ValueError("\n".join(_one_line(item) for item in error.errors())) from None


def job_schema() -> dict[str, Any]:
    """The JSON schema of a job."""
    return Job.model_json_schema()


class _Seen:
    """Finds names used twice and jobs that are the same but for their name."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.jobs: dict[str, str] = {}

    def add(self, job: Job, where: str) -> None:
        if job.name is not None:
            first = self.names.setdefault(folded(job.name), where)
            if first != where:
                raise ValueError(f"name {_short(job.name)} is already used by {first}")
        content = job.model_dump(exclude={"name"}) | {"own_recipe": job.chooses_recipe()}
        first = self.jobs.setdefault(strict_json.canonical(content), where)
        if first != where:
            raise ValueError(f"the same job as {first}")


def job_lines(raw: bytes, name: str) -> Iterable[tuple[str, Any]]:
    """The lines of a .jsonl file as (where, value or what is wrong) pairs, for `check_jobs`."""
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        yield f"{name}:1", ValueError("starts with a byte order mark; save it as plain UTF-8")
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{name}:{number}", strict_json.loads(line.rstrip(b"\r"))
        except ValueError as error:
            yield f"{name}:{number}", error


def _one_line(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        told = f"unknown field {_short(field)}; known: {', '.join(Job.model_fields)}"
        return f"{told}; an argument of the call is inputs.{field}" if _is_name(field) else told
    message = item["msg"].removeprefix("Value error, ")
    got = item["input"]
    if item["type"] != "value_error" and isinstance(got, (str, int, float, bool, type(None))):
        message += f", got {_short(got)}"
    return " ".join(f"{field}: {message}".split())


def _is_name(field: str) -> bool:
    """Whether it can be an argument's, and is short enough to be told."""
    return field.isidentifier() and len(field) <= 40


def _has_object(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_object(item) for item in value)
    return isinstance(value, dict)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
