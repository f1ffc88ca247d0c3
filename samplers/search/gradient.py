"""Gradient search: climb the verifier's own slope, through a few-step student.

DITTO (arXiv 2401.12179) optimises a diffusion model's first noise for a differentiable score by
back-propagation through the whole sampler, DITTO-2 (arXiv 2405.20289) through a distilled one of
few steps, and decodes at the end with more. Here the recipe is what is climbed through, and the
winner is rendered without it. Steps are angles on the noise's sphere, so it stays noise to look at;
``floor`` bounds the drift from the draw, against exploiting the verifier. A gradient costs four
times a draft (``differentiate.py``); memory is that of one denoiser call and one decode.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from accel.method import Search
from samplers.search.conduct import Explorer, check_counts
from samplers.search.path import Path
from samplers.search.result import Candidate
from samplers.search.session import Session, Spent


@dataclass(frozen=True)
class Gradient(Explorer, Search):
    """From the best ``climbers`` of ``starts`` drafts, ``iterations`` steps (``None``: what the
    budget pays for) at ``cosine``; renders of the best ``commits`` noises of all.

    floor: least cosine to the draw that a noise comes from; -1 is none.
    """

    DRAFTS = True
    PAPER = "DITTO-2, arXiv 2405.20289"

    starts: int = 4
    climbers: int = 1
    iterations: int | None = None
    cosine: float = 0.98
    floor: float = 0.7
    commits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "climbers", "iterations", "commits")
        if self.climbers > self.starts:
            raise ValueError(f"{self}: at most as many climbers as starts")
        if not 0 <= self.cosine < 1 or not -1 <= self.floor < 1:
            raise ValueError(f"{self}: cosine in 0..1, floor in -1..1")

    def check(self, session: Session) -> None:
        session.replaceable()
        session.differentiable()

    def explore(self, session: Session) -> None:
        with session.reserved(self.commits):
            drafts = self._climbed(session)
        chosen = session.ranked(drafts)[: self.commits]
        session.report["chosen"] = [c.index for c in chosen]
        for draft in chosen:  # one by one: each is then as a plain call makes it
            session.render([draft.path])

    def _climbed(self, session: Session) -> list[Candidate]:
        """All drafts, of draws and of what they became, until the budget or iterations end."""
        drafts = session.drafts(session.draws(self.starts))
        paths: list[Path] = [c.path[:-1] for c in session.ranked(drafts)[: self.climbers]]
        gains: list[float] = []
        session.report["best_by_iteration"] = gains
        try:
            while self.iterations is None or len(gains) < self.iterations:
                found, further = session.climb(paths, cosine=self.cosine, floor=self.floor)
                drafts += found
                gains.append(float(session.values(session.ranked(drafts)[:1])[0]))
                paths = further
        except Spent:
            pass  # a draft may still be paid for
        with suppress(Spent):
            drafts += session.drafts(paths)  # where the last steps led
        return drafts
