"""Does a recipe fit a model, do its methods go together, which searches can run? Tried on a copy,
before anything runs.

The copy is loaded on the CPU, one model at a time, and only if it is small: a large model tells at
the start of its run, in the same words.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.imports import LOCK, once
from apps.web.models import folder_of

if TYPE_CHECKING:
    from accel import Method, Search

MAX_BYTES = 1 << 30  # of a model's files, to be loaded a second time for checks
_SLOTS = {
    "scheduler": "choose the solver",
    "block.skip": "decide which parts of the network are skipped",
    "attention": "replace attention",
    "linear": "replace linear layers",
    "tokens": "change the tokens",
    "weights": "change the weights",
}
_CLASH = re.compile(r"(\S+) and (\S+) both claim '([^']+)' at '([^']+)'; leave one of them out")


@dataclass(frozen=True)
class Offer:
    """A method with its settings, ready to be ticked. `key` names it in the page."""

    key: str
    label: str
    method: Method


class Checks:
    """Keeps the copy of the model that was asked about last; one call at a time."""

    def __init__(self) -> None:
        self._model: str | None = None
        self._pipe: Any = None
        self._fits: dict[tuple[str, Method], str | None] = {}

    def problem(self, model: str, methods: Sequence[Method]) -> str | None:
        """Why methods cannot run together on a model, in a sentence; None if they can."""
        once()
        import accel

        key = (model, accel.Recipe(tuple(methods)))
        with LOCK:
            if key not in self._fits:
                self._fits[key] = self._try(*key)
            return self._fits[key]

    def searches(
        self,
        model: str,
        inputs: dict[str, Any],
        searches: Sequence[Search],
        verifier: str,
        recipe: Path | None,
    ) -> list[str | None]:
        """Why each of some searches cannot search a call, in a sentence; None if it can."""
        once()
        import accel
        from samplers.search.conduct import refusals
        from samplers.search.verifiers.names import verifier_named

        with LOCK:
            pipe = self._copy(model)
            if pipe is None:
                return [None] * len(searches)
            try:
                used = accel.Recipe(()) if recipe is None else accel.read_recipe(recipe).recipe
                judge = verifier_named(verifier, trusted=False)
                found = refusals(searches, pipe, inputs, judge, used)
            except (ValueError, OSError, ImportError) as error:
                return [sentence(str(error))] * len(searches)
        return [None if why is None else sentence(why) for why in found]

    def _try(self, model: str, recipe: Any) -> str | None:
        pipe = self._copy(model)
        if pipe is None:
            return None
        try:
            recipe.attach(pipe).detach()
        except (ValueError, OSError, ImportError) as error:
            return sentence(str(error))
        return None

    def _copy(self, model: str) -> Any:
        if self._model != model:
            self._model, self._pipe = model, None
            size = sum(p.stat().st_size for p in folder_of(model).rglob("*") if p.is_file())
            if size <= MAX_BYTES:
                self._pipe = _loaded(model)
        return self._pipe


def sentence(text: str) -> str:
    """An error of the library as a sentence for people."""
    text = " ".join(text.split())
    clash = _CLASH.search(text)
    if clash:
        one, other, slot, where = clash.groups()
        said = _SLOTS.get(slot, f"claim {slot}")
        names = f"{other.split(':')[-1]} and {one.split(':')[-1]}"
        text = f"{names} cannot go together: both {said} ({where}). Leave one of them out"
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def offers(recipes: Iterable[Path]) -> list[Offer]:
    """Methods that can be ticked: those of the recipes, and those that need no settings.

    A recipe that cannot be read offers nothing.
    """
    once()
    import accel
    from accel.methods import index, resolve

    found: dict[str, Offer] = {}
    for path in recipes:
        try:
            methods = accel.read_recipe(path).recipe.methods
        except (ValueError, OSError):
            continue
        for method in methods:
            found.setdefault(method.digest(), _offer(method, path.stem))
    for row in index():
        try:
            method = resolve(row["name"])()
        except (ValueError, TypeError):
            continue  # it needs settings, or a package that is not here
        found.setdefault(method.digest(), _offer(method, ""))
    return sorted(found.values(), key=lambda offer: offer.label)


def settings_in_words(method: Method) -> str:
    """The settings that differ from the defaults: `interval 4, warmup 5`."""
    words = []
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if f.name != "artifact" and value != f.default:
            items = value.items() if isinstance(value, Mapping) else [(f.name, value)]
            words += [_in_words(name, item) for name, item in items]
    return ", ".join(words)


def _in_words(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if name == "scheduler" else f"{name.replace('_', ' ')} {text}"


def _offer(method: Method, recipe: str) -> Offer:
    name = type(method).__name__
    words = settings_in_words(method)
    origin = f"from {recipe}" if hasattr(method, "artifact") and recipe else ""
    about = "; ".join(part for part in (words, origin) if part)
    label = f"{name} ({about})" if about else name
    return Offer(f"{name}-{method.digest()[:12]}", label, method)


def _loaded(model: str) -> Any:
    import accel
    from accel.loading import quiet_loading

    with quiet_loading():
        pipe = accel.load(model)
    for live in reversed(accel.live_on(pipe)):
        live.detach()
    return pipe
