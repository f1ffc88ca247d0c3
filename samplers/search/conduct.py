"""``run`` of every algorithm: sets a session up for each input, explores, delivers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from accel.artifact import Fingerprint, inputs_digest, versions
from accel.clock import denoiser_modules
from accel.method import Recipe
from samplers.search.budget import Budget
from samplers.search.journal import Journal
from samplers.search.judging import Judging
from samplers.search.player import Player
from samplers.search.result import SearchResult, Winner
from samplers.search.session import PLAIN, Observer, Place, Session, Spent
from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.verifiers.pixels import Contrast, Sharpness
from samplers.search.verifiers.protocol import Verifier, fingerprint, members


@dataclass(frozen=True)
class SearchSettings:
    """How a search is conducted, whatever its algorithm.

    seed: of everything drawn. batch: candidates in one call. held_out: verifiers that are reported
    and never searched; ``None`` chooses one. journal: a folder; a search that was killed goes on
    from it, a finished one is only read, one with a larger budget goes on. baseline: search at
    random at equal cost, too, for comparison. patience: stop after so many gains in a row that the
    first held-out verifier sees as losses. deliver: render the winner; without, only its path is
    given, for a renderer.
    """

    seed: int = 0
    batch: int = 8
    held_out: tuple[Verifier, ...] | None = None
    journal: str | None = None
    baseline: bool = False
    patience: int | None = None
    deliver: bool = True

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("batch", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"SearchSettings.{name} = {value}: at least {least}")
        if self.patience is not None and self.held_out == ():
            raise ValueError(
                f"SearchSettings.patience = {self.patience} watches a held-out verifier; name one, "
                "or leave held_out to be chosen"
            )


def check_counts(search: Any, *names: str) -> None:
    """Raises ``ValueError`` if a setting of one of these names is below 1; it may be ``None``."""
    for name in names:
        value = getattr(search, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(search).__name__}.{name} = {value}: at least 1")


class Explorer:
    """Mixin before ``Search``: ``run`` by way of ``explore``."""

    DRAFTS: ClassVar[bool] = False  # the recipe is for drafts; winners are rendered without

    def check(self, session: Session) -> None:
        """Raises ``ValueError`` if it cannot search what the session has; computes nothing."""

    def explore(self, session: Session) -> None:
        """Ask the session for candidates until satisfied, or until it raises ``Spent``."""
        raise NotImplementedError

    def run(
        self,
        pipe: Any,
        inputs: Sequence[dict[str, Any]],
        verifier: Any,
        budget: Budget,
        recipe: Recipe = PLAIN,
        *,
        settings: SearchSettings = SearchSettings(),
        observe: Observer | None = None,
    ) -> SearchResult:
        """Search each input (a pipeline call that makes one sample) under a budget of its own.

        Args:
            observe: called after every batch with a ``Progress``; what it raises ends the search,
                which a journal lets go on later.

        Raises:
            ValueError: a pipeline, call or verifier that the algorithm cannot work with.
        """
        return conduct(self, pipe, inputs, Judging(verifier, held_out(verifier, settings)),
                       budget, recipe, settings, observe)  # fmt: skip


def conduct(
    search: Any,
    pipe: Any,
    inputs: Sequence[dict[str, Any]],
    judging: Judging,
    budget: Budget,
    recipe: Recipe,
    settings: SearchSettings,
    observe: Observer | None,
) -> SearchResult:
    """See ``Explorer.run``."""
    journal = None
    if settings.journal is not None:
        journal = Journal(settings.journal, _head(search, pipe, inputs, judging, recipe, settings))
    winners: list[Winner] = []
    most: int | None = None  # samples in one call that memory was found to allow
    try:
        for number, call in enumerate(inputs):
            place = Place(number, len(inputs), asked_for(pipe, call))
            with Player(pipe, call, most=most) as player:
                session = Session(
                    player,
                    judging,
                    budget,
                    PLAIN if search.DRAFTS else recipe,
                    recipe if search.DRAFTS else None,
                    place=place,
                    seed=settings.seed,
                    batch=settings.batch,
                    journal=journal,
                    observe=observe,
                    patience=settings.patience,
                )
                winners.append(_searched(search, session, settings))
                most = player.most
            if journal is not None:
                journal.forget_states(number)
    finally:
        if journal is not None:
            journal.close()
    names = tuple(v.name for v in judging.held_out)
    return SearchResult(winners, search.to_json(), judging.verifier.name, names)


def _searched(search: Any, session: Session, settings: SearchSettings) -> Winner:
    search.check(session)
    if session.batch > 1 and session.player.most is None:
        session.player.settle(session.draft_recipe or session.recipe)
    stopped = "finished"
    try:
        search.explore(session)
    except Spent as reason:
        stopped = str(reason)
    if settings.baseline:
        with suppress(Spent):  # where nothing can be scored, which delivery says
            session.baseline()
    return session.deliver(stopped, render=settings.deliver)


def refusals(
    searches: Sequence[Any], pipe: Any, call: dict[str, Any], verifier: Any, recipe: Recipe = PLAIN
) -> list[str | None]:
    """Why each of ``searches`` cannot search a call; ``None`` where it can. Computes nothing."""
    found: list[str | None] = []
    place = Place(0, 1, asked_for(pipe, call))
    with Player(pipe, call) as player:
        for search in searches:
            candidates = PLAIN if search.DRAFTS else recipe
            drafts = recipe if search.DRAFTS else None
            session = Session(
                player, Judging(verifier), Budget(renders=1), candidates, drafts, place=place
            )
            try:
                search.check(session)
            except ValueError as error:
                found.append(str(error))
            else:
                found.append(None)
    return found


def held_out(verifier: Any, settings: SearchSettings) -> tuple[Any, ...]:
    """Those asked for; else the zoo's other judge, or what a search might pay with: sharpness."""
    if settings.held_out is not None:
        return settings.held_out
    searched = {v.name for v in members(verifier)}
    if "digits-judge" in searched:
        return (DigitsJudge("digits-judge-b"),)
    return (Contrast(),) if "sharpness" in searched else (Sharpness(),)


def asked_for(pipe: Any, call: dict[str, Any]) -> str:
    """The words a call asks with: its prompt, or the name of its class."""
    prompt = call.get("prompt") or ""
    if isinstance(prompt, list):
        return prompt[0]
    labels, wanted = getattr(pipe, "labels", None) or {}, call.get("class_labels")
    if not prompt and wanted:
        return next((name for name, number in labels.items() if number == wanted[0]), "")
    return prompt


def _head(
    search: Any, pipe: Any, inputs: Any, judging: Judging, recipe: Recipe, settings: SearchSettings
) -> dict[str, Any]:
    """What a journal is of. The budget is not in it: more of it goes on."""
    prints = [Fingerprint.of(module) for _, module in denoiser_modules(pipe)]
    around = {k: Fingerprint.of(v).digest() for k, v in sorted(_networks(pipe).items())}
    judges = (*members(judging.verifier), *judging.held_out)
    installed = versions()
    return {
        "search": search.to_json(),
        "inputs": inputs_digest(list(inputs)),
        "model": [[p.model_class, p.config_sha256, p.weights] for p in prints],
        "components": around,
        "scheduler": [type(pipe.scheduler).__name__, _config_digest(pipe.scheduler)],
        "verifiers": [fingerprint(v) for v in judges],
        "recipe": recipe.digest(),
        "seed": settings.seed,
        "batch": settings.batch,
        "versions": {k: installed[k] for k in ("torch", "diffusers") if k in installed},
    }


def _networks(pipe: Any) -> dict[str, Any]:
    """Components beside the denoisers that decide what is made: autoencoder, text encoders."""
    apart = {name for name, _ in denoiser_modules(pipe)}
    parts = getattr(pipe, "components", {})
    return {k: v for k, v in parts.items() if isinstance(v, nn.Module) and k not in apart}


def _config_digest(scheduler: Any) -> str:
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
