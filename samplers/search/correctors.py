"""Feynman-Kac correctors: particles weighed for what guidance and products get wrong. Experimental.

Adding up scores, as guidance does, does not sample the product of densities that it is thought to:
noised products are not products of noised densities. ArXiv 2503.02819 carries the difference as
log-weights (`levels.Levels.mixed`) and resamples. Here on the one particle core, for any pipeline
that computes two guidance branches. The weights know no verifier: it only chooses among the last
population. In many dimensions weights spread widely: ``clamp`` bounds what a step gives.
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
from samplers.search.smc import Population


@dataclass(frozen=True)
class Correctors(Explorer, Search):
    """``particles`` towards the target whose score the steps follow, weighed ``every`` steps.

    target: "guidance", q_u^(1-w) q_c^w with the call's guidance scale w (and, with a negative
    prompt, between the two); "product", of both prompts. power: of the target, above 1 sharper.
    clamp: of a step's log-weight, around the population's mean; 0 leaves samples unweighed. eta,
    threshold, rounds: as for ``Particles``.
    """

    PAPER = "Feynman-Kac correctors, arXiv 2503.02819"

    particles: int = 8
    target: Literal["guidance", "product"] = "guidance"
    power: float = 1.0
    every: int = 1
    clamp: float = 1.0
    eta: float = 1.0
    threshold: float = 0.5
    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "every", "rounds")
        if self.particles < 2 or self.power <= 0 or self.clamp < 0:
            raise ValueError(f"{self}: two particles or more, power above 0, clamp from 0")
        if not 0 < self.eta <= 1 or not 0 <= self.threshold <= 1:
            raise ValueError(f"{self}: eta in 0..1 above 0, threshold in 0..1")

    def check(self, session: Session) -> None:
        session.steerable()
        if self.target == "guidance" and self.power == 1 and session.guidance <= 1:
            raise ValueError(
                f"Correctors weigh guidance, and a call with guidance_scale {session.guidance:g} "
                "has none; ask for more than 1, or for another target or power"
            )

    def explore(self, session: Session) -> None:
        number = 0
        while self.rounds is None or number < self.rounds:
            self._population(session, self._mix(session.guidance), number)
            number += 1

    def _mix(self, guidance: float) -> tuple[float, float]:
        if self.target == "product":
            return self.power, self.power
        return self.power * (1 - guidance), self.power * guidance

    def _population(self, session: Session, mix: tuple[float, float], number: int) -> None:
        paths: list[Path] = session.draws(self.particles)
        population = Population(self.particles, self.threshold)
        report = {"mix": mix, "effective": [], "resampled": 0, "spread": []}
        session.report.setdefault("populations", []).append(report)
        for stop in range(self.every, session.steps, self.every):  # not the last: it is not weighed
            paths = self._run(session, paths, mix, stop, number)
            gained = np.array(session.advance(paths))
            report["spread"].append(round(float(gained.std()), 3))
            bound = self.clamp * self.every
            population.weigh(np.clip(gained - gained.mean(), -bound, bound))
            report["effective"].append(round(population.effective(), 3))
            chosen = population.resample(key(session.key("correct", number, stop)) / 2**63)
            if chosen is not None:
                report["resampled"] += 1
                paths = [paths[i] for i in chosen]
        session.render(self._run(session, paths, mix, None, number))
        report["ancestors"] = population.ancestors.tolist()
        report["weights"] = [round(float(w), 6) for w in population.weights()]

    def _run(
        self, session: Session, paths: list[Path], mix: tuple, stop: int | None, number: int
    ) -> list[Path]:
        keys = [session.key("corrected", number, stop or -1, i) for i in range(len(paths))]
        return [(*p, Run(stop, self.eta, k, mix)) for p, k in zip(paths, keys, strict=True)]
