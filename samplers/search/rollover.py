"""Rollover budget forcing: take the first next state that promises more; what is saved rolls over.

RBF (arXiv 2503.19385). Every step has an equal quota of evaluations. Stochastic next states are
proposed one by one and their clean predictions scored (one evaluation each, which is the next
step's own); the first above the best so far is taken and the unused quota goes to the next step;
else, after the quota, the best of them. Here a proposal may cost several evaluations (guidance),
and ``together`` proposals are made in one call. The interpolant stays the model's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.path import Path, Run
from samplers.search.session import Session


@dataclass(frozen=True)
class Rollover(Explorer, Search):
    """Starts from the most promising of ``starts`` draws; ``quota`` proposals a step.

    eta: noise of a step. together: proposals in one call; above 1 the surplus of a call is spent.
    rounds: ``None`` as many trajectories as the budget pays for.
    """

    PAPER = "RBF, arXiv 2503.19385"

    starts: int = 8
    quota: int = 4
    eta: float = 1.0
    together: int = 1
    rounds: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "starts", "quota", "together", "rounds")
        if not 0 < self.eta <= 1:
            raise ValueError(f"{self}: eta in 0..1 above 0")

    def check(self, session: Session) -> None:
        session.absolute()
        session.steerable()

    def explore(self, session: Session) -> None:
        number = 0
        while self.rounds is None or number < self.rounds:
            self._trajectory(session, number)
            number += 1

    def _trajectory(self, session: Session, number: int) -> None:
        path, best = self._best(session, session.draws(self.starts))
        left, proposed = 0, []
        for step in range(1, session.steps):
            left += self.quota
            made: list[tuple[Path, float]] = []
            while left > 0:
                count = min(self.together, left)
                keys = [session.key("roll", number, step, len(made) + i) for i in range(count)]
                some: list[Path] = [(*path, Run(step, self.eta, k)) for k in keys]
                found = session.preview(some, look=True)
                left -= count
                made += [
                    (c.path, v) for c, v in zip(found, self._values(session, found), strict=True)
                ]
                if max(v for _, v in made) > best or len(found) < count:
                    break
            proposed.append(len(made))
            path, value = max(made, key=lambda m: m[1])
            best = max(best, value)
        # the state before the last step; its prediction is the sample
        session.render([(*path, Run(None, self.eta, session.key("roll", number, "end")))])
        session.report.setdefault("proposed", []).append(proposed)

    def _best(self, session: Session, paths: list[Path]) -> tuple[Path, float]:
        found = session.preview(paths, look=True)
        values = self._values(session, found)
        at = int(np.argmax(values))
        return found[at].path, values[at]

    @staticmethod
    def _values(session: Session, found: list) -> list[float]:
        return [-math.inf if math.isnan(v) else float(v) for v in session.values(found)]
