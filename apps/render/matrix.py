"""From few lines to many jobs: dotted overrides and the YAML matrix.

    defaults: {inputs: {num_inference_steps: 50}}
    matrix:
      seed: [0, 1, 2]
      inputs.class_labels: [[3], [14]]
    jobs:                      # optional: single jobs beside the matrix
      - {seed: 9, inputs: {class_labels: [7]}}

gives 3 x 2 + 1 jobs. YAML is read by the safe loader, without duplicate keys or aliases.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

from accel import strict_yaml
from apps.render import strict_json

MAX_JOBS = 1_000_000
MAX_YAML_BYTES = 4 << 20


def expand(raw: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Expand a YAML job file into (where, job object) pairs; ValueError with a one-line reason."""
    document = _load(raw)
    unknown = set(document) - {"defaults", "matrix", "jobs"}
    if unknown:
        raise ValueError(f"unknown section {sorted(unknown)[0]!r}; known: defaults, matrix, jobs")
    defaults, matrix = _mapping(document, "defaults"), _mapping(document, "matrix")
    singles = document.get("jobs") or []
    if not isinstance(singles, list):
        raise ValueError("`jobs` must be a list of jobs")
    for key, choices in matrix.items():
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"matrix.{key} must be a list with at least one value")
    count = math.prod(len(choices) for choices in matrix.values()) if matrix else 0
    if count + len(singles) > MAX_JOBS:
        raise ValueError(f"expands to {count:,} jobs; at most {MAX_JOBS:,} are allowed")
    return _rows(name, defaults, matrix, singles)


def apply_dotted(target: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of `target` with `{"a.b": value}` set at its place; ValueError if there is none."""
    if not overrides:
        return target
    result = copy.deepcopy(target)
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{dotted}: {parent!r} is not an object")
        place[leaf] = value
    return result


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=c` as ("a.b", value); the value is JSON where it can be read as JSON, else text."""
    dotted, equals, raw = text.partition("=")
    if not equals or not all(part.isidentifier() for part in dotted.split(".")):
        raise ValueError(f"{text[:60]!r} is not of the form field=value or inputs.argument=value")
    try:
        return dotted, strict_json.loads(raw.encode("utf-8", "surrogateescape"))
    except ValueError:
        return dotted, raw


def _rows(
    name: str, defaults: dict[str, Any], matrix: dict[str, list[Any]], singles: list[Any]
) -> Iterator[tuple[str, Any]]:
    combinations = itertools.product(*matrix.values()) if matrix else ()
    for number, values in enumerate(combinations, start=1):
        where = f"{name}: matrix {number}"
        try:
            yield where, apply_dotted(defaults, dict(zip(matrix, values, strict=True)))
        except ValueError as error:
            yield where, error
    for number, single in enumerate(singles, start=1):
        merged = _merged(defaults, single) if isinstance(single, dict) else single
        yield f"{name}: job {number}", merged


def _merged(defaults: dict[str, Any], single: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(defaults)
    for key, value in single.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = {**result[key], **value}
        else:
            result[key] = value
    return result


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_YAML_BYTES:
        raise ValueError(f"is {len(raw):,} bytes long; at most {MAX_YAML_BYTES:,} are allowed")
    try:
        document = strict_yaml.read(raw)
    except ValueError as error:
        raise ValueError(f"is {error}") from None
    if document is None:
        raise ValueError("the job file is empty: no job in it")
    if not isinstance(document, dict):
        raise ValueError("must be a mapping with defaults, matrix and jobs")
    strict_json.check(document)
    return document


def _mapping(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"`{key}` must be a mapping")
    return value
