"""EvoSearch: a population evolves along the denoising trajectory, selected by finished samples.

arXiv 2505.17618. At every scheduled step all members are run to the end and scored; states that the
runs pass at the next scheduled step are the pool of the next generation, each with the reward of
the sample it led to. Elites stay, tournaments choose parents, mutants are near. Mutation in the
middle turns the noise around the clean prediction and so stays on its level; the official code
adds noise instead. The best finished sample of the whole run wins. Costs `evaluations(...)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from accel.method import Search
from samplers.search.conduct import Explorer
from samplers.search.path import Path, Rotate, Run, Turn
from samplers.search.result import Candidate
from samplers.search.session import Session

TOURNAMENT = 0.9  # of the pool, without replacement; official


@dataclass(frozen=True)
class Evolution(Explorer, Search):
    """Generations at shares ``at`` of the steps (rising, the first usually 0) with ``populations``
    members (one number more: the last generation is finished and not evolved).

    elites: kept unchanged. mutation: beta of the noise that is exchanged, 0 to 1. eta: of a step.
    """

    PAPER = "EvoSearch, arXiv 2505.17618"

    at: tuple[float, ...] = (0.0, 0.4, 0.6)
    populations: tuple[int, ...] = (6, 3, 3, 3)
    elites: int = 1
    mutation: float = 0.2
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.at) == sorted(set(self.at)) and all(0 <= a < 1 for a in self.at)
        if not self.at or not rising or len(self.populations) != len(self.at) + 1:
            raise ValueError(f"{self}: `at` rises within 0..1, with one population more")
        if min(self.populations) < max(1, self.elites) or self.elites < 0:
            raise ValueError(f"{self}: populations of at least the elites, and one")
        if not 0 <= self.mutation <= 1 or not 0 <= self.eta <= 1:
            raise ValueError(f"{self}: mutation and eta in 0..1")

    def check(self, session: Session) -> None:
        session.steerable()
        stops = self._stops(session.steps)
        if len(set(stops)) < len(stops):
            raise ValueError(
                f"{self}: too few steps ({session.steps}) to tell the generations apart"
            )

    def _stops(self, steps: int) -> list[int]:
        return [round(a * steps) for a in self.at]

    def explore(self, session: Session) -> None:
        stops = self._stops(session.steps)
        members = session.draws(self.populations[0])
        if stops[0] > 0:
            members = [
                (*p, self._run(session, stops[0], "start", i)) for i, p in enumerate(members)
            ]
            session.advance(members)
        pool: list[tuple[Path, Candidate]] = []
        for generation, stop in enumerate(stops):
            later = stops[generation + 1 :]
            finished = self._finished(session, members, later, generation)
            pool = _pool(finished, members, stop, pool)
            members = self._next(session, pool, stop, generation)
            if later:
                members = [
                    (*p, self._run(session, later[0], f"on{generation}", i))
                    for i, p in enumerate(members)
                ]
                session.advance(members)
        session.render([(*p, self._run(session, None, "end", i)) for i, p in enumerate(members)])
        session.report["generations"] = len(stops)

    def _run(self, session: Session, to: int | None, what: str, i: int) -> Run:
        return Run(to, self.eta, session.key("evolve", what, -1 if to is None else to, i))

    def _finished(
        self, session: Session, members: list[Path], later: list[int], generation: int
    ) -> list[Candidate]:
        """Members run to the end, passing (and keeping) the scheduled steps."""
        paths = members
        for stop in later:
            paths = [
                (*p, self._run(session, stop, f"out{generation}", i)) for i, p in enumerate(paths)
            ]
            session.advance(paths)
        ends = [(*p, self._run(session, None, f"out{generation}", i)) for i, p in enumerate(paths)]
        return session.render(ends)

    def _next(
        self, session: Session, pool: list[tuple[Path, Candidate]], stop: int, generation: int
    ) -> list[Path]:
        """Elites and mutants, as many as the next population has."""
        order = session.ranked([c for _, c in pool])
        place = {id(c): p for p, c in pool}
        count = self.populations[generation + 1]
        elites = [place[id(c)] for c in order[: self.elites]]
        rng = np.random.default_rng(session.key("tournament", generation))
        size = max(1, int(TOURNAMENT * len(pool)))
        mutants = []
        for i in range(count - len(elites)):
            entrants = rng.choice(len(order), size, replace=False)
            parent = place[id(order[entrants.min()])]
            mutants.append(self._mutant(session, parent, stop, generation, i))
        return elites + mutants

    def _mutant(self, session: Session, parent: Path, stop: int, generation: int, i: int) -> Path:
        number = session.key("mutant", generation, i)
        if stop == 0:
            return (*parent, Turn(number, (1 - self.mutation**2) ** 0.5))
        return (*parent, Rotate(number, self.mutation))


def _pool(
    finished: list[Candidate], members: list[Path], stop: int, pool: list[tuple[Path, Candidate]]
) -> list[tuple[Path, Candidate]]:
    """States at this generation's step with the sample each led to: of every run so far."""
    here = list(zip(members, finished, strict=False))
    passed = [(p, c) for path, c in pool if (p := _at_step(c.path, path, stop)) is not None]
    return here + passed


def _at_step(whole: Path, own: Path, stop: int) -> Path | None:
    """The beginning of a finished path, behind ``own``, that ends at step ``stop``."""
    for depth in range(len(own) + 1, len(whole)):
        move = whole[depth - 1]
        if isinstance(move, Run) and move.to == stop:
            return whole[:depth]
    return None


def evaluations(
    steps: int, stops: tuple[int, ...], populations: tuple[int, ...]
) -> tuple[int, int]:
    """Evaluations (of unguided steps) and decodes of a schedule, by arithmetic."""
    total, decodes = stops[0] * populations[0], 0
    for generation, stop in enumerate(stops):
        total += populations[generation] * (steps - stop)
        decodes += populations[generation]
        end = (*stops, steps)[generation + 1]
        total += populations[generation + 1] * (end - stop)
    return total, decodes + populations[-1]
