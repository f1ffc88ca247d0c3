"""The settings of a method or search as fields of a form, and back; wrong ones are a sentence."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accel.artifact import ArtifactRef
from accel.settings import settings_json

if TYPE_CHECKING:
    from accel import Method, Search

    Settable = Method | Search
S = TypeVar("S", bound="Settable")

# A figure in it; on or off; one of a few words; words as they are; anything else, written as JSON.
Kind = Literal["number", "switch", "choice", "words", "json"]
_WRONG = re.compile(
    r"(\w+)\.(\w+) = (.*): (?:(?:input )?(?:should|must) be |(?=at least |at most ))(.*)"
)
_WHOLE = re.compile(r"^(\w+)\(.*\): ")  # a value with all its settings, of which some are wrong


@dataclass(frozen=True)
class Field:
    """One setting. ``value``: as the form shows it; ``optional``: may be left empty."""

    name: str
    kind: Kind
    value: Any
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ") + (" (may be empty)" if self.optional else "")


def fields(method: Settable) -> list[Field]:
    """What can be set, in its own order. An artifact cannot: it belongs to its recipe."""
    hints = typing.get_type_hints(type(method))
    plain = settings_json(method)
    found = []
    for one in dataclasses.fields(method):
        hint, optional = _without_none(hints[one.name])
        value = plain[one.name]
        if hint is ArtifactRef:
            continue
        if hint is bool:
            found.append(Field(one.name, "switch", value))
        elif hint in (int, float):
            found.append(Field(one.name, "number", value, optional=optional))
        elif typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            found.append(Field(one.name, "choice", value, choices, optional))
        elif hint is str:
            found.append(Field(one.name, "words", value or "", optional=optional))
        else:
            found.append(Field(one.name, "json", json.dumps(value), optional=optional))
    return found


def edited(method: S, values: Mapping[str, Any]) -> S:
    """The same with other settings; ``values``: as the form has them.

    Raises:
        ValueError: a value that it cannot have, in a sentence that names it.
    """
    known = {one.name: one for one in fields(method)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{type(method).__name__} has no setting {str(unknown[0])[:80]!r}")
    settings = settings_json(method)
    for name, value in values.items():
        settings[name] = _read(type(method).__name__, known[name], value)
    try:
        return type(method).from_settings(settings)
    except ValueError as error:
        said = _WHOLE.sub(r"\1 wants other settings: ", str(error)).replace("`", "")
        raise ValueError(_WRONG.sub(r"\1: \2 cannot be \3; it must be \4", said)) from None


def about(method: Settable) -> list[str]:
    """The paragraphs of what it says of itself, `settings` named as in the form, and its source."""
    words = (inspect.getdoc(type(method)) or "").replace("``", "`").replace("`None`", "empty")
    for field in dataclasses.fields(method):
        words = words.replace(field.name, field.name.replace("_", " "))
    parts = [" ".join(part.split()) for part in words.split("\n\n")]
    return [*parts, f"Source: {type(method).PAPER}."] if type(method).PAPER else parts


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``X | None`` as (X, True)."""
    parts = typing.get_args(hint)
    if NoneType not in parts:
        return hint, False
    (rest,) = (part for part in parts if part is not NoneType)
    return rest, True


def _read(name: str, field: Field, value: Any) -> Any:
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty and field.optional:
        return None
    if empty:
        raise ValueError(f"{name}: {field.name} may not be empty")
    if field.kind == "number" and isinstance(value, float) and value.is_integer():
        return int(value)  # what a browser makes of "4"
    if field.kind != "json":
        return value
    try:
        return json.loads(str(value))
    except (ValueError, RecursionError):
        raise ValueError(
            f"{name}: {field.name} is written like {field.value}, not {str(value)[:80]!r}"
        ) from None
