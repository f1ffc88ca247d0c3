"""The values of a method: strictly checked fields that are JSON on disk and hashable in memory."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from accel.artifact import ArtifactRef


class Settings(Mapping[str, Any]):
    """A hashable, read-only mapping of JSON values, for a method's open-ended settings."""

    def __init__(
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        self._json = json.dumps({**dict(values), **more}, sort_keys=True, allow_nan=False)

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._json)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self._json))

    def __len__(self) -> int:
        return len(json.loads(self._json))

    def __hash__(self) -> int:
        return hash(self._json)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __repr__(self) -> str:
        return repr(dict(self))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _field_adapters(cls: type) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    hints = _hints(cls)
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)  # JSON has no NaN
    adapters = {}
    for f in dataclasses.fields(cls):
        plain = dataclasses.is_dataclass(hints[f.name])
        adapters[f.name] = TypeAdapter(hints[f.name], config=None if plain else config)
    return adapters


def check_fields(instance: Any) -> None:
    """Check every field of a dataclass strictly against its annotation.

    Raises:
        ValueError: naming class, field and value.
    """
    from pydantic import ValidationError

    for name, adapter in _field_adapters(type(instance)).items():
        value = getattr(instance, name)
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise ValueError(f"{type(instance).__name__}.{name} = {value!r}: {reason}") from None


def from_settings(cls: Any, settings: Mapping[str, Any]) -> Any:
    """A frozen dataclass from JSON values.

    Raises:
        ValueError: unknown, missing or ill-typed settings, each named.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {names}")
    hints = _hints(cls)
    try:
        return cls(**{k: _revive(v, hints[k]) for k, v in settings.items()})
    except TypeError as error:  # a missing required field
        raise ValueError(f"{cls.__name__}: {error}") from error


def settings_json(value: Any) -> dict[str, Any]:
    """The fields of a frozen dataclass as JSON values."""
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}


def plain(value: Any) -> Any:
    """A field's value as JSON."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, ArtifactRef):
        return {"path": value.path, "sha256": value.sha256}
    return value


def _revive(value: Any, hint: Any) -> Any:
    """A JSON value as the field's type: lists are tuples, mappings are what the hint says."""
    if isinstance(value, list):
        return tuple(_revive(v, None) for v in value)
    if isinstance(value, Mapping):
        if _mentions(hint, ArtifactRef):
            return ArtifactRef.from_json(value)
        return Settings(value)
    return value


def _mentions(hint: Any, cls: type) -> bool:
    return hint is cls or any(_mentions(h, cls) for h in typing.get_args(hint))


def without_paths(value: Any) -> Any:
    """JSON values with every artifact reference reduced to its content hash."""
    if isinstance(value, dict):
        if set(value) == {"path", "sha256"}:
            return value["sha256"]
        return {k: without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    return value
