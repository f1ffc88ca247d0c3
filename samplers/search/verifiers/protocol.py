"""What a verifier is, and ensembles of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Verifier(Protocol):
    """Scores samples; more is better. Any object with these three will do.

    samples: uint8 (n, h, w, c) pictures or (n, frames, h, w, c) videos, raw, never from a codec.
    prompts: what each was asked for ("" where nothing). NaN means "could not be scored": such a
    candidate is never chosen. ``fingerprint``, if there is one, tells weights and settings apart.
    """

    name: str
    range: tuple[float, float]

    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray: ...


@runtime_checkable
class Differentiable(Verifier, Protocol):
    """A verifier whose score has a gradient, for ``samplers.search.gradient``.

    samples: float (n, c, h, w) pictures or (n, frames, c, h, w) videos in 0..1, before rounding.
    """

    def differentiable(self, samples: Any, prompts: Sequence[str]) -> Any: ...


def fingerprint(verifier: Any) -> str:
    """What a journal knows a verifier by."""
    return str(getattr(verifier, "fingerprint", verifier.name))


def members(verifier: Any) -> tuple[Any, ...]:
    """The verifiers that score, of an ensemble or one alone."""
    return tuple(getattr(verifier, "members", (verifier,)))


@dataclass(frozen=True)
class RankEnsemble:
    """The mean rank over several verifiers, inside the candidates compared (ties share ranks).

    Ranks need no common scale and are harder to exploit than any one score. They say nothing
    outside their pool, so particle methods, which need an absolute scale, refuse them.
    """

    members: tuple[Any, ...]

    def __post_init__(self) -> None:
        names = [m.name for m in self.members]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"RankEnsemble: two verifiers or more, all different; got {names}")

    @property
    def name(self) -> str:
        return "+".join(m.name for m in self.members)

    @property
    def range(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def fingerprint(self) -> str:
        return "+".join(fingerprint(m) for m in self.members)

    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Mean ranks inside ``samples``."""
        return self.combine(np.stack([m.score(samples, prompts) for m in self.members], 1))

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """(n, members) -> mean rank of each of n in 0..1; NaN where any score is."""
        ranks = np.stack([_ranks(column) for column in scores.T], 1)
        return ranks.mean(1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """0 for the least, 1 for the largest, the mean for equal ones; NaN stays."""
    ok = ~np.isnan(values)
    result = np.full(len(values), np.nan)
    known = values[ok]
    if len(known):
        below = (known[None] < known[:, None]).sum(1)
        equal = (known[None] == known[:, None]).sum(1)
        result[ok] = (below + (equal - 1) / 2) / max(len(known) - 1, 1)
    return result


def frames_of(samples: np.ndarray) -> np.ndarray:
    """Pictures or videos as float64 in 0..1, (n, frames, h, w, c); a picture has one frame."""
    if samples.ndim == 4:
        samples = samples[:, None]
    if samples.ndim != 5 or samples.dtype != np.uint8:
        raise ValueError(f"verifiers want uint8 pictures or videos, got {samples.shape}")
    return samples.astype(np.float64) / 255
