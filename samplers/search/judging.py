"""Who scores in a search, and what decides between its candidates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from samplers.search.budget import Cost
from samplers.search.verifiers.protocol import members


@dataclass(frozen=True)
class Judging:
    """Who scores: the searched verifier, and those only reported."""

    verifier: Any
    held_out: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names = [v.name for v in (*members(self.verifier), *self.held_out)]
        if len(set(names)) < len(names):
            raise ValueError(f"search: verifiers {names}; a held-out one is not searched, too")

    def scores(self, frames: np.ndarray, prompt: str, *, all_of_them: bool, cost: Cost) -> Any:
        """By name, a list of floats or None for each sample; ``held_out`` apart."""
        began = time.perf_counter()
        found: list[dict[str, list[float | None]]] = []
        for judges in (members(self.verifier), self.held_out if all_of_them else ()):
            found.append(
                {v.name: _numbers(v.score(frames, [prompt] * len(frames))) for v in judges}
            )
            cost.verified += len(frames) * len(judges)
        spent = time.perf_counter() - began
        cost.seconds += spent
        cost.seconds_verifying += spent
        return found

    def values(self, rows: Sequence[dict[str, float | None]]) -> np.ndarray:
        """What decides between samples with these scores; NaN: not to be chosen."""
        table = [[np.nan if r[v.name] is None else r[v.name] for v in members(self.verifier)]
                 for r in rows]  # fmt: skip
        scores = np.array(table, dtype=np.float64).reshape(len(rows), -1)
        combine = getattr(self.verifier, "combine", None)
        return scores[:, 0] if combine is None else combine(scores)

    def absolute(self) -> None:
        """Raises ``ValueError`` if scores mean nothing outside their pool."""
        if hasattr(self.verifier, "combine"):
            raise ValueError(
                "particle methods weigh samples by their scores and need an absolute scale; "
                f"{self.verifier.name} only ranks. Search one verifier"
            )

    def differentiable(self, prompt: str) -> Callable[[Tensor], Tensor]:
        """The searched score as a function of samples in 0..1; see ``protocol.Differentiable``.

        Raises:
            ValueError: the verifier has no gradient.
        """
        score = getattr(self.verifier, "differentiable", None)
        if score is None:
            raise ValueError(
                f"{self.verifier.name} has no gradient to climb; search it with another algorithm, "
                "or a differentiable verifier: judge, brightness, darkness, contrast, clip:FOLDER, "
                "siglip:FOLDER, pickscore:FOLDER, hps:FOLDER, aesthetic:FOLDER,HEAD"
            )
        return lambda samples: score(samples, [prompt] * len(samples))


def _numbers(scores: Any) -> list[float | None]:
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    return [float(x) if np.isfinite(x) else None for x in values]
