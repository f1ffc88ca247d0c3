"""Feynman-Kac steering: particles that are weighed by what they promise, and resampled.

FK steering (arXiv 2501.06848): every particle runs the stochastic sampler; at some steps the clean
prediction is scored, and particles multiply or die by their potentials. With "difference", "max"
and "sum" these telescope to exp(strength * score), so the target is p(x) exp(strength r(x));
"score" is greedier and has none. Log-weights are carried (`smc.py`), which the published code does
not do between resamplings. Costs its particles' runs, and a decode and a score at every potential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.noise import key
from samplers.search.path import Path, Run
from samplers.search.session import Session
from samplers.search.smc import Population, potentials


@dataclass(frozen=True)
class Particles(Explorer, Search):
    """``particles`` with potentials at noise shares ``at`` (falling; 1 is pure noise) and the end.

    strength: lambda of the target. eta: noise of a step, 0 to 1. threshold: resample below this
    share of effective particles; 1 always. rounds: independent populations; ``None`` as many as
    the budget pays for.
    """

    PAPER = "FK steering, arXiv 2501.06848"

    particles: int = 4
    strength: float = 10.0
    at: tuple[float, ...] = (0.7, 0.5, 0.3)
    potential: Literal["difference", "max", "sum", "score"] = "max"
    eta: float = 1.0
    threshold: float = 0.5
    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "rounds")
        falling = list(self.at) == sorted(set(self.at), reverse=True)
        if self.particles < 2 or not falling or not all(0 < a < 1 for a in self.at):
            raise ValueError(f"{self}: two particles or more, `at` falling within 0..1")
        if not 0 < self.eta <= 1 or not 0 <= self.threshold <= 1 or self.strength < 0:
            raise ValueError(f"{self}: eta in 0..1 above 0, threshold in 0..1, strength from 0")

    def check(self, session: Session) -> None:
        session.absolute()
        session.steerable()

    def explore(self, session: Session) -> None:
        stops = sorted({s for a in self.at if 0 < (s := session.levels.nearest(a)) < session.steps})
        number = 0
        while self.rounds is None or number < self.rounds:
            self._population(session, stops, number)
            number += 1

    def _population(self, session: Session, stops: list[int], number: int) -> None:
        paths: list[Path] = session.draws(self.particles)
        population = Population(self.particles, self.threshold)
        history: list[np.ndarray] = []
        report = {"stops": stops, "effective": [], "resampled": [], "ancestors": []}
        session.report.setdefault("populations", []).append(report)
        before: np.ndarray | None = None
        for stop in (*stops, None):
            paths = [
                (*p, Run(stop, self.eta, session.key("particle", number, stop or -1, i)))
                for i, p in enumerate(paths)
            ]
            seen = session.render(paths) if stop is None else session.preview(paths)
            if len(seen) < len(paths):
                return  # the budget ended: what was rendered counts
            scores = np.nan_to_num(session.values(seen), nan=-np.inf)
            history.append(scores)
            total = potentials(self.potential, self.strength, np.stack(history), last=stop is None)
            population.weigh(total if before is None else total - before)
            before = total
            report["effective"].append(round(population.effective(), 3))
            if stop is None:
                break
            spot = key(session.key("resample", number, stop)) / 2**63
            chosen = population.resample(spot)
            report["resampled"].append(chosen is not None)
            if chosen is not None:
                paths = [paths[i] for i in chosen]
                history = [h[chosen] for h in history]
                before = before[chosen]
        report["ancestors"] = population.ancestors.tolist()
        report["weights"] = [round(float(w), 6) for w in population.weights()]
