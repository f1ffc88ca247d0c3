"""Draft and commit: search with an accelerated pipeline, render only the winners without.

The recipe given to ``run`` makes the drafts: a cache, fewer steps, a few-step student, fewer bits,
sparse attention. A draft shares seed and shape with its render, so their scores rank alike as far
as the recipe is faithful; ``calibrate`` says how far, on your model. What is delivered was rendered
by the unaccelerated pipeline, bit for bit. CachedSearch (arXiv 2607.23159) drafts with caches only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from accel.method import Recipe, Search
from accel.metrics.statistics import Interval
from samplers.search.budget import Budget
from samplers.search.conduct import Explorer, SearchSettings, check_counts
from samplers.search.player import Player
from samplers.search.session import PLAIN, Session, Spent

RESAMPLES = 2000


@dataclass(frozen=True)
class DraftCommit(Explorer, Search):
    """Drafts of ``candidates`` draws (``None``: what the budget pays for); renders of the best
    ``commits``, of which the best is delivered."""

    DRAFTS = True
    PAPER = "CachedSearch, arXiv 2607.23159"

    candidates: int | None = 8
    commits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "commits")
        if self.candidates is not None and self.candidates < self.commits:
            raise ValueError(f"{self}: at most as many commits as candidates")

    def explore(self, session: Session) -> None:
        drafts, left = [], self.candidates
        with session.reserved(self.commits):
            while left is None or left > 0:
                count = session.batch if left is None else min(left, session.batch)
                try:
                    drafts += session.drafts(session.draws(count))
                except Spent:
                    if not drafts:
                        raise
                    break
                left = None if left is None else left - count
        chosen = session.ranked(drafts)[: self.commits]
        session.report["chosen"] = [c.index for c in chosen]
        for draft in chosen:  # one by one: each is then as a plain call makes it
            session.render([draft.path])


@dataclass(frozen=True)
class Calibration:
    """How well drafts stand for renders, over inputs (intervals: 95 %, resampled by input).

    rank: Spearman correlation of draft and full scores over the seeds of an input. top: share of
    inputs whose best draft is the best render. captured: gain of rendering the best draft, as a
    share of best-of-N's gain. price: evaluations of a draft, of a render's, which budgets are
    counted in. work: floating-point operations of its denoising, of a render's, as `accel measure`
    counts them; what a cache inside the network or a sparse attention saves is in it alone. cost:
    of draft and commit, of best-of-N's, by work where it was counted.
    """

    rank: Interval
    top: Interval
    captured: Interval
    price: float
    cost: float
    inputs: int
    candidates: int
    work: float | None = None

    def as_json(self) -> dict[str, Any]:
        parts = {k: getattr(self, k).as_json() for k in ("rank", "top", "captured")}
        more = {k: getattr(self, k) for k in ("price", "cost", "inputs", "candidates")}
        if self.work is not None:
            more["work"] = self.work
        return {**parts, **{k: round(v, 5) for k, v in more.items()}}


def calibrate(
    pipe: Any,
    inputs: Sequence[dict[str, Any]],
    verifier: Any,
    recipe: Recipe,
    *,
    candidates: int = 8,
    settings: SearchSettings | None = None,
) -> Calibration:
    """Draft and render the same ``candidates`` seeds of every input, and compare their scores.

    Costs ``candidates`` renders and drafts for each input, and one of each in all.
    """
    budget = Budget(renders=candidates * 2 + 1)
    settings = settings or SearchSettings(held_out=())
    found = _Both(candidates).run(pipe, inputs, verifier, budget, recipe, settings=settings)
    scores = [
        [[c.score for c in w.candidates if c.purpose == p] for p in ("draft", "render")]
        for w in found.winners
    ]
    table = np.array(scores, dtype=np.float64)  # (inputs, 2, candidates)
    costs = [
        [w.ledger.by_purpose[p].evaluations for p in ("draft", "render")] for w in found.winners
    ]
    draft, full = np.array(costs, dtype=np.float64).sum(0) / (len(inputs) * candidates)
    with Player(pipe, inputs[0]) as player:
        cheap, whole = (player.work(r) for r in (recipe, PLAIN))
    work = cheap / whole if whole else None
    return compared(table[:, 0], table[:, 1], price=draft / full, work=work)


def compared(
    drafts: np.ndarray, renders: np.ndarray, *, price: float, work: float | None = None
) -> Calibration:
    """Scores (inputs, candidates) of drafts and renders of the same seeds."""
    inputs, n = drafts.shape
    rows = np.arange(inputs)
    first = np.nan_to_num(drafts, nan=-np.inf).argmax(1)  # NaN: could not be scored
    got, best, mean = renders[rows, first], np.nanmax(renders, 1), np.nanmean(renders, 1)
    ranks = np.array([_spearman(a, b) for a, b in zip(drafts, renders, strict=True)])
    cells = np.stack([ranks, (got == best).astype(float), got - mean, best - mean], 1)

    def figures(c: np.ndarray) -> np.ndarray:
        mean_of = np.nanmean(c, axis=0)
        return np.array([mean_of[0], mean_of[1], mean_of[2] / mean_of[3] if mean_of[3] else 1.0])

    rng = np.random.default_rng(0)
    draws = np.array([figures(cells[rng.integers(0, inputs, inputs)]) for _ in range(RESAMPLES)])
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    at = figures(cells)
    rank, top, captured = (Interval(float(at[i]), float(low[i]), float(high[i])) for i in range(3))
    cost = float(price if work is None else work) + 1 / n
    return Calibration(rank, top, captured, float(price), cost, inputs, n, work)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of what both have, ties at their mean rank; NaN where one does not vary."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    first, second = (
        np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v]) for v in (a, b)
    )
    if len(a) < 2 or min(first.std(), second.std()) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


@dataclass(frozen=True)
class _Both(Explorer, Search):
    """Drafts and renders of the same draws."""

    DRAFTS = True

    candidates: int = 8

    def explore(self, session: Session) -> None:
        paths = session.draws(self.candidates)
        session.drafts(paths)
        session.render(paths)
