"""Random search: draw, render, keep the best (best of N). The yardstick of every other algorithm.

The gain is extreme-value statistics: about sd * sqrt(2 ln N) of the verifier's spread over seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.session import Session


@dataclass(frozen=True)
class Random(Explorer, Search):
    """Best of ``candidates`` draws, or of as many as the budget pays for (``None``)."""

    PAPER = "Ma et al. 2025, arXiv 2501.09732"

    candidates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "candidates")

    def explore(self, session: Session) -> None:
        left = self.candidates
        while left is None or left > 0:
            count = session.batch if left is None else min(left, session.batch)
            session.render(session.draws(count))
            left = None if left is None else left - count
