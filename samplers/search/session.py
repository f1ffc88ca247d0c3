"""What an algorithm sees of a search: draws, renders, previews, and the end of its budget.

An algorithm's ``explore(session)`` is a pure function of the scores it gets. It may ask for ever:
``Spent`` ends it. Everything asked for is cut into batches; a batch is the unit that is counted,
written to the journal, and told to the observer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from torch import Tensor

from accel.method import Recipe
from samplers.search.budget import Budget, Cost, Ledger
from samplers.search.differentiate import PRICE, check_recipe, uphill_of
from samplers.search.journal import Journal
from samplers.search.judging import Judging
from samplers.search.levels import Levels
from samplers.search.noise import key
from samplers.search.path import Draw, Path, Run, Shift, digest, finished
from samplers.search.player import Player
from samplers.search.result import Candidate, Progress, Purpose, Winner

PLAIN = Recipe(())
BLIND = 8  # candidates without any score, after which a search is given up
Observer = Callable[[Progress], None]


class Spent(Exception):
    """The search of one input is over; the message says why."""


@dataclass(frozen=True)
class Ask:
    """What is wanted of a batch of paths.

    look: predict where they end. climb: (cosine, floor) of a step along the score's gradient.
    """

    purpose: Any  # a Purpose, or "advance": only the states
    recipe: Recipe
    look: bool = False
    climb: tuple[float, float] | None = None

    def name(self, paths: Sequence[Path], number: int) -> str:
        """Of the unit, in the journal of input ``number``."""
        how = self.look if self.climb is None else list(self.climb)
        return digest(paths, self.purpose, how, number, self.recipe.digest())

    @property
    def is_free(self) -> bool:
        """Whether it is not what a budget limits."""
        return self.purpose in Ledger.FREE

    @property
    def price(self) -> int:
        """Evaluations for each of a forward pass."""
        return 1 if self.climb is None else PRICE


@dataclass(frozen=True)
class Place:
    """Which input of how many is searched, and what it is asked for."""

    number: int
    count: int
    prompt: str


class Session:
    """The search of one input.

    recipe: candidates are rendered, and the winner delivered with it. draft: another, for drafts.
    """

    def __init__(
        self,
        player: Player,
        judging: Judging,
        budget: Budget,
        recipe: Recipe,
        draft: Recipe | None,
        *,
        place: Place,
        seed: int = 0,
        batch: int = 8,
        journal: Journal | None = None,
        observe: Observer | None = None,
        patience: int | None = None,
    ) -> None:
        self.player, self.judging, self.budget = player, judging, budget
        self.recipe, self.draft_recipe, self.place = recipe, draft, place
        self.seed, self.batch, self.patience = seed, batch, patience
        self.journal, self._observe = journal, observe or (lambda progress: None)
        self.candidates: list[Candidate] = []
        self.ledger = Ledger()
        self.report: dict[str, Any] = {}
        self._draws = 0
        self._strikes = 0
        self._held_back = 0.0  # evaluations
        self._renders_held_back = 0
        self._steered = False
        self._prices: dict[Recipe, float] = {}
        self._limit: float | None = None
        player.recall = self._recall

    # -- for algorithms ----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of a render."""
        return self.player.grid(self.recipe).steps

    @property
    def levels(self) -> Levels:
        """Noise levels of a render's steps. Raises ``ValueError`` where search knows none."""
        return self.player.levels(self.recipe)

    @property
    def guidance(self) -> float:
        """What the two branches of the searched call are guided with: ``true_cfg_scale`` where it
        takes one (``guidance_scale`` is then given to the network), else ``guidance_scale``."""
        scale = self.player.argument("true_cfg_scale", self.player.argument("guidance_scale", 1.0))
        return 1.0 if scale is None else float(scale)

    def key(self, *parts: Any) -> int:
        """A key of this search, input and ``parts``."""
        return key(self.seed, self.place.number, *parts)

    def draws(self, count: int) -> list[Path]:
        """New first noises. The very first is what a plain call with the search's seed has."""
        found = []
        for _ in range(count):
            number = self.seed if self._draws == 0 else self.key("draw", self._draws)
            found.append((Draw(number),))
            self._draws += 1
        return found

    def render(self, paths: Sequence[Path]) -> list[Candidate]:
        """Finish, decode and score. As many as the budget allows; raises ``Spent`` if none."""
        return self._scored(Ask("render", self.recipe), [finished(p) for p in paths])

    def drafts(self, paths: Sequence[Path]) -> list[Candidate]:
        """``render`` with the draft's recipe."""
        return self._scored(self._draft(), [finished(p) for p in paths])

    def climb(
        self, paths: Sequence[Path], *, cosine: float, floor: float
    ) -> tuple[list[Candidate], list[Path]]:
        """Drafts of first noises, and each noise a step further up its score's gradient.

        cosine: of the step; floor: least one to the draw that a path begins with. As many as can be
        afforded, at ``PRICE`` times what a draft takes. Raises ``Spent`` if none, ``ValueError``
        where the pipeline has no gradient.
        """
        ask = self._draft((cosine, floor))
        self._climbed: list[Path] = []
        found = self._scored(ask, [finished(p) for p in paths])
        return found, self._climbed

    def _draft(self, climb: tuple[float, float] | None = None) -> Ask:
        assert self.draft_recipe is not None
        return Ask("draft", self.draft_recipe, climb=climb)

    def preview(self, paths: Sequence[Path], *, look: bool = False) -> list[Candidate]:
        """Score clean predictions of paths that end in the middle: those of the last step made,
        or (``look``, one evaluation each) those at the end itself. As many as can be afforded."""
        return self._scored(Ask("preview", self.recipe, look), list(paths))

    def advance(self, paths: Sequence[Path]) -> list[float]:
        """Compute the states at the ends of paths, scoring nothing. All or ``Spent``.

        Returns the log-weight that each gained in its last run; see ``Run.mix``.
        """
        gained: list[float] = []
        for start in range(0, len(paths), self.batch):
            some = list(paths[start : start + self.batch])
            row = self._unit(Ask("advance", self.recipe), some)
            if row["count"] < len(some):
                raise Spent("the budget is spent")
            gained += row.get("gained", [0.0] * len(some))
        return gained

    def noises(self, paths: Sequence[Path]) -> list[Tensor]:
        """First noises (1, ...) of paths that only draw and turn; nothing is evaluated."""
        return [s.sample for s in self.player.reach(paths, self.recipe, Cost())]

    def values(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """What decides between candidates (n,); NaN where one could not be scored."""
        return self.judging.values([c.scores for c in candidates])

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first; the earlier first of equal ones; those without a score last."""
        values = np.nan_to_num(self.values(candidates), nan=-np.inf)
        return [candidates[i] for i in np.argsort(-values, kind="stable")]

    # what ``check`` of an algorithm asks: each raises ``ValueError``, and computes nothing

    def absolute(self) -> None:
        """If scores mean nothing outside their pool."""
        self.judging.absolute()

    def replaceable(self) -> None:
        """If the pipeline takes no first noise from outside."""
        self.player.replaceable(self.draft_recipe or self.recipe)

    def steerable(self) -> None:
        """If runs of the pipeline cannot begin and end in the middle of its schedule."""
        self.replaceable()
        classes = [c.__name__ for c in type(self.player.pipe).__mro__]
        if any(name.startswith("LatentConsistencyModel") for name in classes):
            raise ValueError(
                f"{classes[0]} decodes what its last step returns, so the middle of a run cannot "
                "be looked at; search it with algorithms of whole runs: Random, ZeroOrder"
            )
        self.player.levels(self.recipe)
        self._steered = True

    def differentiable(self) -> None:
        """If verifier or draft have no gradient."""
        check_recipe(self._draft().recipe, self.player.pipe)
        self.judging.differentiable(self.place.prompt)

    @contextmanager
    def reserved(self, renders: int) -> Iterator[None]:
        """Keep back what so many renders take, inside a ``with`` block."""
        amount = renders * self.steps * self._price(self.recipe)
        self._held_back += amount
        self._renders_held_back += renders
        try:
            yield
        finally:
            self._held_back -= amount
            self._renders_held_back -= renders

    def share(self) -> float:
        """Of the budget that is spent, 0 to 1."""
        spent = self.ledger.spent()
        if self.budget.seconds is not None:
            return spent.seconds / self.budget.seconds
        return min(1.0, spent.evaluations / self.limit)

    @property
    def limit(self) -> float:
        """The budget in evaluations; infinite for one in seconds."""
        if self._limit is None:
            budget = self.budget
            self._limit = float("inf")
            if budget.evaluations is not None:
                self._limit = float(budget.evaluations)
            elif budget.renders is not None:
                steps = self.player.grid(PLAIN).steps
                self._limit = budget.renders * steps * self._price(PLAIN)
        return self._limit

    # -- for whoever conducts it -------------------------------------------------------------

    def best(self) -> Candidate | None:
        """Of the candidates of the kind nearest to what is delivered."""
        for purpose in get_args(Purpose)[:3]:
            kind = [c for c in self.candidates if c.purpose == purpose]
            if kind and np.isfinite(self.values(kind)).any():
                return self.ranked(kind)[0]
        return None

    def baseline(self) -> None:
        """Random search for as many evaluations as were spent, of other draws."""
        limit = self.ledger.spent().evaluations
        each = self.steps * self._price(self.recipe)
        count = int(limit // each)
        paths = [(Draw(self.key("baseline", i)),) for i in range(count)]
        self._scored(Ask("baseline", self.recipe), [finished(p) for p in paths])

    def deliver(self, stopped: str, *, render: bool = True) -> Winner:
        """The best candidate, rendered alone unless ``render`` is false.

        Raises:
            ValueError: nothing was scored.
        """
        best = self.best()
        if best is None:
            raise ValueError(
                f"search: {self.judging.verifier.name} scored nothing of {self.place.prompt!r}"
                + (
                    "; search another verifier, or ask for something that it knows"
                    if self.candidates
                    else " within the budget"
                )
            )
        path = finished(best.path)
        frames, delivered = self._delivered(best, path) if render else (None, {})
        winner = Winner(
            None if frames is None else frames[0], path, best, delivered, self.candidates,
            self.ledger, self.report, stopped,
        )  # fmt: skip
        self._tell("winner", ())
        return winner

    def _delivered(self, best: Candidate, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames and scores of the winner alone, from its first noise on; once, with a journal.

        Nothing that was computed in a batch is used: its last bits depend on batch mates.
        """
        unit = digest(path, "delivery", self.place.number)
        row = self.journal.get(unit) if self.journal else None
        was_alone = not any(isinstance(move, Run) for move in path[:-1])
        frames = best.frames if was_alone else None
        if self.journal and row:
            frames = self.journal.pictures(unit)
        if row is None or frames is None:
            cost = Cost()
            if frames is None:
                self.player.forget()
                self.player.recall = lambda name: False
                frames = self.player.frames([path], self.recipe, cost)
            found = self.judging.scores(frames, self.place.prompt, all_of_them=True, cost=cost)
            broken = bool(cost.calls) and self.player.broken[0]
            scores = {k: None if broken else v[0] for part in found for k, v in part.items()}
            row = {"delivered": scores, "cost": cost.as_json()}
            if self.journal:
                self.journal.keep_pictures(unit, frames)
                self.journal.put(unit, row)
        self.ledger.add("delivery", Cost(**row["cost"]))
        return frames, row["delivered"]

    # -- units -------------------------------------------------------------------------------

    def _scored(self, ask: Ask, paths: list[Path]) -> list[Candidate]:
        found: list[Candidate] = []
        for start in range(0, len(paths), self.batch):
            some = paths[start : start + self.batch]
            try:
                new = self._batch(ask, some)
            except Spent:
                if found:
                    break
                raise
            found += new
            self._tell("candidates", tuple(new))
            if len(self.candidates) >= BLIND and all(c.score is None for c in self.candidates):
                raise Spent("nothing could be scored")
            if ask.purpose == "render":
                self._watch(new)
            if len(new) < len(some):
                break
        return found

    def _batch(self, ask: Ask, paths: list[Path]) -> list[Candidate]:
        row = self._unit(ask, paths)
        count = row["count"]
        pictures = row.get("pictures")
        values = self.judging.values([_row(row["scores"], i) for i in range(count)])
        spent, own = self.ledger.spent().evaluations, row["cost"]["evaluations"]
        own = 0 if ask.is_free else own
        new = [
            Candidate(
                index=len(self.candidates) + i,
                path=paths[i],
                purpose=ask.purpose,
                score=None if np.isnan(values[i]) else float(values[i]),
                scores=_row(row["scores"], i),
                held_out=_row(row["held_out"], i),
                evaluations=spent - own + own * (i + 1) // count,
                picture=None if pictures is None else pictures[i],
                frames=row.get("frames") if count == 1 and ask.purpose == "render" else None,
            )
            for i in range(count)
        ]
        self.candidates += new
        if ask.climb is not None:
            ends = [Shift(*shift) for shift in row["shifts"]]
            self._climbed += [(p[0], end) for p, end in zip(paths, ends, strict=False)]
        return new

    def _unit(self, ask: Ask, paths: list[Path]) -> dict[str, Any]:
        """One batch, read or computed; fewer paths than asked where the budget ends."""
        name = ask.name(paths, self.place.number)
        row = self.journal.get(name) if self.journal else None
        if row is not None and "cost" in row:
            self._account(ask.purpose, Cost(**row["cost"]))
            assert self.journal is not None
            frames = self.journal.pictures(f"{name}-alone")
            return {**row, "pictures": self.journal.pictures(name), "frames": frames}
        count = self._decided(name, row, ask, paths)
        if not count:
            raise Spent("the budget is spent")
        if count < len(paths):
            return self._unit(ask, paths[:count])
        cost = Cost()
        row = self._computed(ask, paths, cost)
        row = {"count": len(paths), "cost": cost.as_json(), **row}
        self._account(ask.purpose, Cost(**row["cost"]))
        if self.player.most is not None:
            self.report["batch"] = self.player.most  # what memory allows
        if self.journal:
            self._keep(name, ask, paths, row)
        return row

    def _keep(self, name: str, ask: Ask, paths: list[Path], row: dict[str, Any]) -> None:
        """A unit's pictures and states, then its line in the journal."""
        assert self.journal is not None
        kept = {k: v for k, v in row.items() if k not in ("pictures", "frames")}
        if "pictures" in row:
            self.journal.keep_pictures(name, row["pictures"])
        if ask.purpose == "render" and len(paths) == 1:  # may be delivered as it is
            self.journal.keep_pictures(f"{name}-alone", row["frames"])
        if ask.purpose in ("preview", "advance"):
            names = [digest(p) for p in paths]
            player = self.player
            states = {n: (player.states[n], player.seen.get(n)) for n in names}
            self.journal.keep_states(self.place.number, name, states)
        self.journal.put(name, {**kept, "purpose": ask.purpose})

    def _decided(self, name: str, row: dict[str, Any] | None, ask: Ask, paths: list[Path]) -> int:
        """How many of a batch are made. A cut is journalled before it is followed.

        Once some of the batch are known, what the rest costs would no longer say.
        """
        limit = None if self.budget.seconds is not None else self.limit
        if row is not None and row["limit"] == limit:
            return row["afforded"]
        count = self._affordable(ask, paths)
        if count < len(paths) and self.journal and limit is not None:
            self.journal.put(name, {"afforded": count, "limit": limit})
        return count

    def _computed(self, ask: Ask, paths: list[Path], cost: Cost) -> dict[str, Any]:
        """What a unit finds, and what it cost."""
        player, recipe, more = self.player, ask.recipe, {}
        if ask.purpose == "advance":
            states = player.reach(paths, recipe, cost)
            return {"gained": [0.0 if s.gained is None else float(s.gained) for s in states]}
        if ask.purpose == "preview":
            states = player.reach(paths, recipe, cost)
            clean = player.look(paths, recipe, cost) if ask.look else [s.clean for s in states]
            frames = player.decoded(clean, recipe, cost)  # type: ignore[arg-type]
        elif ask.climb is not None:
            score = self.judging.differentiable(self.place.prompt)
            frames, shifts = uphill_of(player, paths, recipe, score, *ask.climb, cost)
            more = {"shifts": shifts}
        else:
            frames = player.frames(paths, recipe, cost)
        broken, finished_ones = player.broken, ask.purpose != "preview"
        scores, held = self.judging.scores(
            frames, self.place.prompt, all_of_them=finished_ones, cost=cost
        )
        for values in (*scores.values(), *held.values()):
            values[:] = [None if b else v for v, b in zip(values, broken, strict=True)]
        middle = frames[:, frames.shape[1] // 2] if frames.ndim == 5 else frames
        return {"scores": scores, "held_out": held, "pictures": middle, "frames": frames, **more}

    def _recall(self, name: str) -> bool:
        """Put a state of the journal where the player looks."""
        kept = self.journal.state(name, self.player.device) if self.journal else None
        if kept is None:
            return False
        self.player.states[name] = kept[0]
        if kept[1] is not None:
            self.player.seen[name] = kept[1]
        return True

    def _account(self, purpose: str, cost: Cost) -> None:
        self.ledger.add(purpose, cost)

    def _affordable(self, ask: Ask, paths: list[Path]) -> int:
        """How many of the paths, from the first, the rest of the budget pays for."""
        if ask.is_free:
            return len(paths)
        spent = self.ledger.spent()
        if self.budget.seconds is not None:
            left = self.budget.seconds - spent.seconds
            return len(paths) if left > self._seconds_held_back() else 0
        left = self.limit - self._held_back - spent.evaluations
        price, count = ask.price * self._price(ask.recipe), 0
        for count in range(len(paths), 0, -1):
            steps = self.player.steps_needed(paths[:count], ask.recipe) + (count if ask.look else 0)
            if steps * price <= left + 1e-6:
                return count
        return 0

    def _seconds_held_back(self) -> float:
        """What the renders that are kept back take, by what drafts took; 0 before the first."""
        draft = self.ledger.by_purpose.get("draft")
        count = sum(c.purpose == "draft" for c in self.candidates)
        if not self._renders_held_back or draft is None or not count:
            return 0.0
        after = draft.seconds_decoding + draft.seconds_verifying
        each = (draft.seconds - after) / max(draft.evaluations, 1)
        return self._held_back * each + self._renders_held_back * after / count

    def _price(self, recipe: Recipe) -> float:
        """Evaluations of one step of one sample under a recipe."""
        if recipe not in self._prices:
            name = digest((), "probe", self.place.number, recipe.digest())
            row = self.journal.get(name) if self.journal else None
            if row is None:
                cost = Cost()
                price = self.player.price(recipe, cost, whole=self._steered)
                row = {"price": price, "cost": cost.as_json()}
                if self.journal:
                    self.journal.put(name, row)
            self._account("probe", Cost(**row["cost"]))
            self._prices[recipe] = row["price"]
        return self._prices[recipe]

    def _watch(self, new: Sequence[Candidate]) -> None:
        """Ends a search whose gains are not seen by the first held-out verifier."""
        if self.patience is None or not self.judging.held_out:
            return
        name = self.judging.held_out[0].name
        for candidate in new:
            before = [c for c in self.candidates[: candidate.index] if c.purpose == "render"]
            if not before or self.ranked([*before, candidate])[0] is not candidate:
                continue
            was, now = self.ranked(before)[0].held_out[name], candidate.held_out[name]
            self._strikes = self._strikes + 1 if (now or 0) < (was or 0) else 0
            if self._strikes >= self.patience:
                raise Spent(f"{self.patience} gains in a row were losses to {name}")

    def _tell(self, kind: Any, new: tuple[Candidate, ...]) -> None:
        spent = self.ledger.spent().evaluations
        place = self.place
        self._observe(
            Progress(kind, place.number, place.count, new, self.best(), spent, self.share())
        )


def _row(columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    return {name: values[i] for name, values in columns.items()}
