"""A candidate is a path: the few integers from which its sample can be made again, alone.

A path begins with a draw and goes on with moves; it is JSON, so that a journal, a job and a
picture's record can hold it. ``Run(to=None)`` goes to the end; where a path has none, the
pipeline's own solver finishes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Draw:
    """The noise that the pipeline itself draws from a CPU generator with this seed."""

    key: int


@dataclass(frozen=True)
class Turn:
    """First noise only: to a neighbour on the sphere, at this cosine."""

    key: int
    cosine: float


@dataclass(frozen=True)
class Shift:
    """First noise only: by ``scale`` times signed bytes (base64), then back to its norm.

    For noise that was optimised, which no key makes: a byte a value. See ``noise.shifted``.
    """

    data: str
    scale: float


@dataclass(frozen=True)
class Run:
    """Denoise up to the input of step ``to`` (``None``: to the end).

    eta: ``None`` is the pipeline's own solver; a number is the stochastic first-order step of
    ``levels.py``, whose noise depends on ``key`` and the step. mix: with a number only: what the
    unconditional and the conditional score are multiplied by, in place of the pipeline's guidance.
    """

    to: int | None = None
    eta: float | None = None
    key: int = 0
    mix: tuple[float, float] | None = None


@dataclass(frozen=True)
class Renoise:
    """Forward noising, back to the noisier level of step ``to``."""

    to: int
    key: int


@dataclass(frozen=True)
class Rotate:
    """In the middle: turn the noise around the clean prediction, by beta in 0..1."""

    key: int
    beta: float


Move = Draw | Turn | Shift | Run | Renoise | Rotate
Path = tuple[Move, ...]
KINDS: dict[str, type] = {"draw": Draw, "turn": Turn, "run": Run, "renoise": Renoise}
KINDS |= {"rotate": Rotate, "shift": Shift}
_NAMES = {cls: name for name, cls in KINDS.items()}


def path_json(path: Path) -> list[dict[str, Any]]:
    """Plain JSON: ``[{"draw": {"key": 7}}, ...]`` with what is at its default left out."""
    return [{_NAMES[type(m)]: {k: _plain(v) for k, v in asdict(m).items() if v is not None}}
            for m in path]  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_path(value: Any) -> Path:
    """The inverse of ``path_json``.

    Raises:
        ValueError: it is no path; says which move is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"a path is a list of moves, got {str(value)[:80]}")
    path = tuple(_move(m) for m in value)
    if not isinstance(path[0], Draw) or any(isinstance(m, Draw) for m in path[1:]):
        raise ValueError("a path begins with one draw")
    ran = [isinstance(m, Run) for m in path]
    for i, move in enumerate(path[1:], start=1):
        if isinstance(move, Turn | Shift) and any(ran[:i]):
            raise ValueError("only first noise is turned or shifted; rotate what is in the middle")
        if isinstance(move, Renoise | Rotate) and not any(ran[:i]):
            raise ValueError("only what has been run is renoised or rotated; turn first noise")
        if isinstance(path[i - 1], Run) and path[i - 1].to is None:  # type: ignore[union-attr]
            raise ValueError("nothing follows a run to the end")
    return path


def _move(value: Any) -> Move:
    kind = next(iter(value), None) if isinstance(value, dict) and len(value) == 1 else None
    if kind not in KINDS or not isinstance(value[kind], dict):
        raise ValueError(f"no move of a path: {str(value)[:80]}; known: {', '.join(KINDS)}")
    cls, given = KINDS[kind], dict(value[kind])
    if kind == "run" and "mix" in given:
        given["mix"] = _mix(given)
    types = {
        "key": int,
        "to": int,
        "cosine": (int, float),
        "beta": (int, float),
        "eta": (int, float),
        "scale": (int, float),
        "data": str,
        "mix": tuple,
    }
    for name, x in given.items():
        wrong = name not in types or isinstance(x, bool) or not isinstance(x, types[name])
        bounded = name in ("cosine", "beta", "eta")
        if wrong or (bounded and not -1 <= x <= 1) or (name == "scale" and not 0 < x < math.inf):
            raise ValueError(f"no setting of a move {kind!r}: {name} = {str(x)[:40]}")
        if isinstance(x, int) and not 0 <= x < 2**63:
            raise ValueError(f"move {kind!r}: {name} = {x} is not in 0..2^63")
        if isinstance(x, str):
            _check_base64(x)
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"move {kind!r}: {error}") from None


def _mix(given: dict[str, Any]) -> tuple[float, float]:
    mix = given["mix"]
    numbers = isinstance(mix, list) and all(type(x) in (int, float) for x in mix)
    if not numbers or len(mix) != 2 or not all(map(math.isfinite, mix)) or sum(mix) <= 0:
        raise ValueError(
            f"move 'run': mix is two numbers whose sum is above 0; got {str(mix)[:40]}"
        )
    if given.get("eta") is None:
        raise ValueError(
            "move 'run': mix goes with eta, the pipeline's own solver has its guidance"
        )
    return float(mix[0]), float(mix[1])


def _check_base64(text: str) -> None:
    try:
        base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"move 'shift': its data is no base64 ({error})") from None


def finished(path: Path) -> Path:
    """The path with a run to the end."""
    last = path[-1]
    return path if isinstance(last, Run) and last.to is None else (*path, Run())


def is_plain(path: Path) -> bool:
    """Whether a plain pipeline call with a seed makes this sample."""
    return len(path) == 2 and isinstance(path[0], Draw) and path[1] == Run()


def step_of(path: Path) -> int | None:
    """The step that follows; ``None`` at the end."""
    step: int | None = 0
    for move in path:
        if isinstance(move, Run | Renoise):
            step = move.to
    return step


def digest(paths: Path | Sequence[Path], *more: Any) -> str:
    """SHA-256 of a path or several, with anything else as JSON."""
    several = [paths] if paths and not isinstance(paths[0], tuple) else paths
    text = json.dumps([[path_json(p) for p in several], *more], sort_keys=True)  # type: ignore
    return hashlib.sha256(text.encode()).hexdigest()
