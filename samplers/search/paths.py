"""Search over paths: noise promising half-finished samples again, and keep what comes out best.

Ma et al. 2025 (arXiv 2501.09732, SoP). Draws are integrated down to noise share ``start``; each
survivor is noised forward by ``up`` in several ways and integrated down by ``down``; the best by
their clean predictions survive, until the noise is gone. Levels are shares, rounded to the grid, so
few steps work too. The paper's steps are near the whole path: what stays are the low frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.path import Path, Renoise, Run
from samplers.search.session import Session

MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Paths(Explorer, Search):
    """``survivors`` with ``copies`` each, from share ``start`` of the noise, ``up`` and ``down``.

    Integrates with first-order deterministic steps (DDIM, Euler). rounds of the whole: ``None`` as
    many as the budget pays for.
    """

    PAPER = "Ma et al. 2025, arXiv 2501.09732"

    survivors: int = 2
    copies: int = 5
    start: float = 0.11
    up: float = 0.78
    down: float = 0.81
    rounds: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "survivors", "copies", "rounds")
        if not 0 < self.start < 1:
            raise ValueError(f"{self}: start in 0..1")
        if not 0 < self.up < self.down <= 1:
            raise ValueError(f"{self}: up and down within 0..1, down the larger")

    def check(self, session: Session) -> None:
        session.steerable()
        self._rounds(session)

    def explore(self, session: Session) -> None:
        number = 0
        while self.rounds is None or number < self.rounds:
            self._descent(session, number)
            number += 1

    def _rounds(self, session: Session) -> list[tuple[int, int, int]]:
        """The steps that each round begins at, goes back to, and ends at; the last is the end.

        Raises:
            ValueError: the grid is too coarse, or the way down too slow.
        """
        levels, steps = session.levels, session.steps
        share = self.start
        here = min(levels.nearest(share), steps - 1)
        found: list[tuple[int, int, int]] = []
        while here < steps:
            back = levels.nearest(min(share + self.up, 1.0))
            share = share + self.up - self.down
            target = steps if share <= 0 else levels.nearest(share)
            if back >= here or target <= back:
                raise ValueError(
                    f"Paths: on a grid of {steps} steps, from {here} up to {back} and down to "
                    f"{target} is no search; more steps, or a larger up"
                )
            found.append((here, back, target))
            if len(found) > MOST_ROUNDS:
                raise ValueError(f"{self}: more than {MOST_ROUNDS} rounds; a larger down")
            here = target
        return found

    def _descent(self, session: Session, number: int) -> None:
        rounds = self._rounds(session)
        pool: list[Path] = [(*p, Run(rounds[0][0], 0.0)) for p in session.draws(self.survivors)]
        trace = session.report.setdefault("levels", [])
        for here, back, target in rounds:
            copies = self._copies(session, pool, back, len(trace), number)
            trace.append([here, back, target])
            if target < session.steps:
                found = session.preview([(*p, Run(target, 0.0)) for p in copies])
                pool = [c.path for c in session.ranked(found)[: self.survivors]]
            else:
                session.render([(*p, Run(None, 0.0)) for p in copies])

    def _copies(
        self, session: Session, pool: list[Path], back: int, round_: int, number: int
    ) -> list[Path]:
        return [
            (*p, Renoise(back, session.key("copy", number, round_, i, j)))
            for i, p in enumerate(pool)
            for j in range(self.copies)
        ]
