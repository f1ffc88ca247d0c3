"""Zero-order search: look at neighbours of the best noise, go where the score is higher.

Ma et al. 2025 (arXiv 2501.09732, section 3). Neighbours lie on the sphere of the pivot's norm at a
fixed cosine; the pivot stays when no neighbour is better (published code draws a new one). With
``widen`` the cosine shrinks after rounds without success, to get out of a dead end. ``floor``
bounds the drift from the first noise, against exploiting the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.noise import cosine_between
from samplers.search.path import Path, Turn
from samplers.search.session import Session

WIDEST = 0.5  # cosine that widening ends at, if it begins above


@dataclass(frozen=True)
class ZeroOrder(Explorer, Search):
    """``neighbours`` a round at ``cosine`` to the pivot, the best of ``starts`` draws.

    rounds: ``None`` as many as the budget pays for. widen: factor on 1 - cosine after a round
    without success. floor: least cosine to the first noise of anything tried; -1 is none.
    """

    PAPER = "Ma et al. 2025, arXiv 2501.09732"

    neighbours: int = 4
    cosine: float = 0.95
    rounds: int | None = None
    starts: int = 1
    widen: float = 1.0
    floor: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "neighbours", "starts", "rounds")
        if not 0 <= self.cosine < 1 or not -1 <= self.floor < 1 or self.widen < 1:
            raise ValueError(f"{self}: cosine in 0..1, floor in -1..1, widen 1 or more")

    def check(self, session: Session) -> None:
        session.replaceable()

    def explore(self, session: Session) -> None:
        starts = session.render(session.draws(self.starts))
        pivot = session.ranked(starts)[0]
        first, cosine, moves = pivot.path[:1], self.cosine, 0
        done = 0
        while self.rounds is None or done < self.rounds:
            around: list[Path] = []
            for i in range(self.neighbours):
                turn = Turn(session.key("turn", done, i), cosine)
                path = (*pivot.path[:-1], turn)
                if self._near(session, first, path):
                    around.append(path)
            if not around:  # every neighbour is too far from the first noise
                break
            best = session.ranked([pivot, *session.render(around)])[0]
            success = best is not pivot
            moves += success
            pivot = best
            wider = max(min(WIDEST, self.cosine), 1 - self.widen * (1 - cosine))
            cosine = self.cosine if success else wider
            done += 1
            session.report |= {"rounds": done, "moves": moves}

    def _near(self, session: Session, first: Path, path: Path) -> bool:
        """Whether a noise is within ``floor`` of the first; costs no evaluation."""
        if self.floor == -1:
            return True
        a, b = session.noises([first, path])
        return cosine_between(a, b) >= self.floor
