"""How something was evaluated, as a hashed record; figures of different protocols do not compare.

A resize filter, another reference split or half the samples is worth more than most accelerations
cost, so every figure is stored with its protocol, and comparing two begins with `require_same`.
What is compared (the recipe) is not part of the protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

HASH_KEY = "sha256"


@dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """A frozen record of plain JSON values (`None` is "does not apply"), equal by content.

    model: name, with the revision or hash of its weights. inputs: split, or digest of the inputs.
    samples: how many. seeds: all of them, or the rule they follow. steps, guidance, scheduler: of
    the sampler. features, features_sha256: name of the feature extractor, SHA-256 of its weights.
    size: (height, width) or (frames, height, width). resize: filter, antialias, order. quantise:
    rounding of pictures before features. more: anything else, under other names than these.

    Raises:
        ValueError: a value that is not JSON or not finite, or a name in `more` that is taken.
    """

    model: Any
    inputs: Any
    samples: int
    seeds: Any
    steps: Any = None
    guidance: Any = None
    scheduler: Any = None
    features: Any = None
    features_sha256: str | None = None
    size: Any = None
    resize: Any = None
    quantise: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _frozen(getattr(self, f.name), f.name))
        if not isinstance(self.more, Mapping):
            raise ValueError(f"Protocol: more is {self.more!r}; wants names with values")
        taken = set(self.more) & {HASH_KEY, *_NAMES, "more"}
        if taken:
            raise ValueError(f"Protocol: more has {sorted(taken)}, names that are taken")

    @property
    def sha256(self) -> str:
        """Of the canonical JSON: keys sorted, no spaces, fields without a value left out."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value, those in `more` beside the others, and "sha256"."""
        return {**self._content(), HASH_KEY: self.sha256}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Protocol:
        """What `as_json` wrote. Raises ValueError if the content is not what was hashed."""
        content = {k: v for k, v in record.items() if k != HASH_KEY}
        missing = {"model", "inputs", "samples", "seeds"} - set(content)
        if missing:
            raise ValueError(f"Protocol.read: the record has no {', '.join(sorted(missing))}")
        more = {k: content.pop(k) for k in list(content) if k not in _NAMES}
        protocol = cls(**content, more=more)
        if record.get(HASH_KEY) != protocol.sha256:
            raise ValueError(
                f"Protocol.read: content has SHA-256 {protocol.sha256[:12]}…, the record says "
                f"{str(record.get(HASH_KEY))[:12]}; it was edited, or is of another version"
            )
        return protocol

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Protocol) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def _content(self) -> dict[str, Any]:
        values = {name: _thawed(getattr(self, name)) for name in _NAMES}
        values |= _thawed(self.more)
        return {k: v for k, v in values.items() if v is not None}


_NAMES = tuple(f.name for f in fields(Protocol) if f.name != "more")


def require_same(a: Protocol, b: Protocol, ignore: Collection[str] = ()) -> None:
    """Raises ValueError naming the fields, other than those in `ignore`, in which two differ."""
    left, right = a._content(), b._content()
    names = sorted((set(left) | set(right)) - set(ignore))
    found = [
        f"{n}: {_short(left.get(n))} against {_short(right.get(n))}"
        for n in names
        if json.dumps(left.get(n), sort_keys=True) != json.dumps(right.get(n), sort_keys=True)
    ]
    if found:
        raise ValueError(f"figures of different protocols do not compare; {'; '.join(found)}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, such as the weights of a feature extractor."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _frozen(value: Any, name: str) -> Any:
    """The value with tuples for lists and read-only mappings; 4.0 becomes 4, so they hash alike."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return tuple(_frozen(v, f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return MappingProxyType({k: _frozen(v, f"{name}.{k}") for k, v in value.items()})
    raise ValueError(f"Protocol: {name} is {value!r}; wants finite plain JSON")


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_thawed(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _thawed(v) for k, v in value.items()}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
