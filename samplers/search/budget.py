"""What a search may spend, and what it has spent: every evaluation, counted where it happens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Budget:
    """For each input. One of: ``evaluations`` of the denoiser (batch rows: a guided step of one
    sample is two), ``renders`` (as many as that many unaccelerated samples take), ``seconds``."""

    evaluations: int | None = None
    renders: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.evaluations, self.renders, self.seconds) if v is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise ValueError(f"{self}: give one of evaluations, renders, seconds, above 0")

    @classmethod
    def read(cls, text: str) -> Budget:
        """``"8"`` (renders), ``"8 renders"``, ``"320 evaluations"`` or ``"60 seconds"``.

        Raises:
            ValueError: anything else.
        """
        number, _, unit = text.strip().partition(" ")
        unit = unit.strip() or "renders"
        try:
            if unit == "evaluations":
                return cls(evaluations=int(number))
            if unit == "renders":
                return cls(renders=float(number))
            if unit == "seconds":
                return cls(seconds=float(number))
        except ValueError:
            pass
        raise ValueError(f"budget {text!r}: wants '8 renders', '320 evaluations' or '60 seconds'")

    def as_json(self) -> dict[str, float]:
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass
class Cost:
    """Of one batch, or summed. evaluations: rows through the denoiser; calls: of the network;
    decodes: samples through the autoencoder; verified: samples scored, times verifiers."""

    evaluations: int = 0
    calls: int = 0
    decodes: int = 0
    verified: int = 0
    seconds: float = 0.0  # all
    seconds_decoding: float = 0.0
    seconds_verifying: float = 0.0

    def add(self, other: Cost) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_json(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(self).items()}


@dataclass
class Ledger:
    """Costs by purpose: "render", "draft", "preview", "delivery", "probe", "baseline"."""

    by_purpose: dict[str, Cost] = field(default_factory=dict)

    FREE = ("delivery", "probe", "baseline")  # not what a budget limits

    def add(self, purpose: str, cost: Cost) -> None:
        self.by_purpose.setdefault(purpose, Cost()).add(cost)

    def total(self) -> Cost:
        """Of everything."""
        return self._sum(self.by_purpose)

    def spent(self) -> Cost:
        """Of what the budget limits."""
        return self._sum([p for p in self.by_purpose if p not in self.FREE])

    def _sum(self, purposes: Any) -> Cost:
        result = Cost()
        for purpose in purposes:
            result.add(self.by_purpose[purpose])
        return result

    def as_json(self) -> dict[str, Any]:
        return {
            "total": self.total().as_json(),
            "spent": self.spent().as_json(),
            "by_purpose": {k: c.as_json() for k, c in self.by_purpose.items()},
        }
