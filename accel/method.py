"""Methods are frozen values; attaching one to a pipeline returns the live state.

``Method`` is what a user writes down (it prints, compares, hashes and round-trips as JSON).
``Attached`` is what runs (it counts what it did, and gives the host back on ``detach``).
``Recipe`` is a tuple of methods, attached in order, the first innermost. ``Search`` and ``Trainer``
are the two other frozen kinds; they receive recipes as values.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from accel import compat
from accel.artifact import Artifact
from accel.clock import Clock, Now, Run, clock_of, denoiser_modules
from accel.patch import Layer, Patch
from accel.pipeline_calls import caller_level
from accel.settings import check_fields, from_settings, settings_json, without_paths

Claim = tuple[str, frozenset[str]]  # (slot, module or component paths)

# Slots that one method holds alone, where the paths meet. Others stack in recipe order.
EXCLUSIVE_SLOTS = frozenset(
    {"scheduler", "block.skip", "attention", "attention.kernel", "linear", "tokens", "weights"}
    | {"temporal"}
)
STACKING_SLOTS = frozenset({"denoiser.call", "initial_latents", "scheduler.modifier"})
# Of these, the ones that change tensors of the host, for every pipeline that has them.
SHARED_SLOTS = frozenset({"weights", "temporal"})
MAX_FIELDS = 8
RUNS_KEPT = 64  # reports of the newest runs; older ones stay in the totals only


class NoEffectWarning(UserWarning):
    """A finished run in which an attached method changed nothing."""


class NoEffectError(RuntimeError):
    """``NoEffectWarning`` under ``strict=True``."""


class FallbackWarning(UserWarning):
    """Something unexpected inside a run; it was computed without the method."""


class GuidanceWarning(UserWarning):
    """A run with guidance of what was calibrated without, or the other way round."""


@dataclass(frozen=True)
class Method(ABC):
    """One way to change how a pipeline computes. Subclasses are frozen dataclasses.

    A subclass has at most eight fields (JSON scalars, tuples, ``Settings`` or ``ArtifactRef``),
    says what it touches (``claims``) and how (``build``). Fields are checked strictly against their
    annotations; range checks go into ``__post_init__`` after ``super().__post_init__()``.
    """

    SLOTS: ClassVar[tuple[str, ...]] = ()  # every slot that claims() may name
    PAPER: ClassVar[str] = ""  # where the method comes from, for the index

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def claims(self, pipe: Any) -> frozenset[Claim]:
        """``(slot, paths)`` pairs this method takes on ``pipe``.

        Raises:
            ValueError: the pipeline is not supported; names class, value and remedy.
        """

    @abstractmethod
    def build(self, pipe: Any, live: Attached) -> None:
        """Put the method on ``pipe``, through ``live.patch`` only.

        Called by ``attach``, which undoes everything if this raises.
        """

    def new_live(self, pipe: Any) -> Attached:
        """The live state; override to return a subclass of ``Attached``."""
        return Attached(self, pipe)

    def attach(self, pipe: Any, *, strict: bool = False) -> Attached:
        """Start to act on ``pipe``.

        Raises:
            ValueError: unsupported pipeline, or a claim that collides with what is attached
                already. Nothing has been changed then.
        """
        if not hasattr(getattr(pipe, "scheduler", None), "set_timesteps"):
            raise ValueError(
                f"{type(pipe).__name__} has no diffusers scheduler as `.scheduler`; "
                "accel attaches to diffusion pipelines"
            )
        claims = self.claims(pipe)
        _refuse_collisions(self, claims, pipe)
        live = self.new_live(pipe)
        live.strict = strict
        try:
            self.build(pipe, live)
            live.clock.acquire(live)
        except BaseException:
            live.patch.undo()
            raise
        live.claims = claims
        _ATTACHED.setdefault(pipe, []).append(weakref.ref(live))
        return live

    def neutral(self) -> Method | None:
        """The setting that equals the unmodified pipeline bit for bit, or ``None``."""
        return None

    def call_changes(self) -> dict[str, Any]:
        """Arguments that pipeline calls need under this method, over those that a job asks for.

        Whoever makes the calls applies them (the renderer, ``Study``), and says so.
        """
        return {}

    # -- as a value --------------------------------------------------------------------------

    @classmethod
    def name(cls) -> str:
        """``"caches.native:FirstBlockCache"``."""
        return f"{cls.__module__}:{cls.__qualname__}"

    def to_json(self) -> dict[str, Any]:
        """``{"method": name, "settings": {...}}``, JSON scalars, lists and dicts only."""
        return {"method": self.name(), "settings": settings_json(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json()["settings"]``.

        Raises:
            ValueError: unknown, missing or ill-typed settings, each named.
        """
        return from_settings(cls, settings)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON; artifacts count by content, not by place."""
        text = json.dumps(without_paths(self.to_json()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Attached:
    """The live state of one method on one pipeline.

    Counters: call ``count("computed" | "reused" | "skipped" | "changed", n)``, ``fallback(reason)``
    and ``detail[...]`` from layers. Subclasses override ``on_run`` to reset their per-run state,
    and set ``made_with`` to their artifact's ``guidance``. ``guided``: whether the newest run is.
    """

    made_with: bool | None = None
    guided: bool | None = None

    def __init__(self, method: Method, pipe: Any) -> None:
        self.method = method
        self.patch = Patch()
        self.clock: Clock = clock_of(pipe)
        self.strict = False
        self.claims: frozenset[Claim] = frozenset()
        self.counts: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.detail: dict[str, Any] = {}
        self._pipe = weakref.ref(pipe)
        self._warned: set[str] = set()
        self._runs: list[dict[str, Any]] = []
        self._runs_ended = self._nfe = 0
        self._had_effect = False
        self._in_run = False
        self._attached = True
        self._layered: set[int] = set()
        self._denoiser_layers: dict[str, list[Layer]] = {}

    # -- for methods -------------------------------------------------------------------------

    @property
    def now(self) -> Now | None:
        """The denoiser call being computed; ``None`` outside a run this method has seen begin."""
        return self.clock.now if self._in_run and not self.clock.passes() else None

    def around_call(
        self,
        module: Any,
        layer: Layer,
        in_graph: Layer | None = None,
        find: Callable[[], Any] | None = None,
    ) -> None:
        """Run ``layer(call_next, *args, **kwargs)`` around calls of ``module`` within runs.

        Calls outside a run go straight through. So do calls being traced by ``torch.compile``,
        which come to ``in_graph`` where it is given: it becomes part of the graph, in runs or not.
        ``find`` tells, at the start of a run, what is in the place of ``module`` by then.
        """

        def guarded(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if compat.is_compiling():
                call = call_next if in_graph is None else functools.partial(in_graph, call_next)
                return call(*args, **kwargs)
            if self.now is None:
                return call_next(*args, **kwargs)
            return layer(call_next, *args, **kwargs)

        self.patch.around_call(module, guarded, find=find)
        if in_graph is None:
            self._layered.add(id(compat.compiled_entry(module)))

    def around_denoiser(self, slot: str, layer: Layer) -> None:
        """Run ``layer(call_next, *args, **kwargs)`` around a denoiser's calls within runs.

        ``slot`` is the component ("unet", "transformer", "transformer_2"). Unlike ``around_call``
        this stays outside a graph that compiles the whole denoiser.
        """
        self._denoiser_layers.setdefault(slot, []).append(layer)

    def count(self, what: str, n: int = 1) -> None:
        """Add to a counter of this run."""
        self.counts[what] += n

    def fallback(self, reason: str) -> None:
        """Note that something unexpected was computed without the method; warns once a reason.

        Raises:
            RuntimeError: under ``strict``.
        """
        self.fallbacks[reason] += 1
        if self.strict:
            raise RuntimeError(f"{type(self.method).__name__}: {reason}")
        self._warn_once(reason, f"{type(self.method).__name__}: {reason}; computed in full")

    def _warn_once(self, what: str, text: str, category: type[Warning] = FallbackWarning) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(text, category, stacklevel=caller_level(self._pipe()))

    def on_run(self, run: Run) -> None:
        """A run begins: forget everything about the last one."""

    def on_run_end(self, run: Run) -> None:
        """A run ended, finished or not: add what is only known now; let memory go."""

    def has_effect(self) -> bool:
        """Whether the run so far differs from the unmodified pipeline; counted, not configured."""
        return self.counts["reused"] + self.counts["skipped"] + self.counts["changed"] > 0

    def memory(self) -> dict[str, int]:
        """Peak bytes this method held in the run: ``{"bytes_device": n, "bytes_host": n}``."""
        return {"bytes_device": 0, "bytes_host": 0}

    # -- called by the clock -----------------------------------------------------------------

    def denoiser_layers(self, slot: str) -> list[Layer]:
        return self._denoiser_layers.get(slot, []) if self._in_run else []

    def run_began(self, run: Run) -> None:
        self.counts, self.fallbacks, self.detail = Counter(), Counter(), {}
        self._in_run, self.guided = True, run.guided
        self._compare_guidance()
        self.on_run(run)
        if self._hidden_by_compile() and self.method != self.method.neutral():
            self.fallback("the denoiser is compiled as one graph, which hides its blocks")

    def _compare_guidance(self) -> None:
        """Says where what was made with guidance runs without, or the other way round."""
        if self.made_with is None or self.guided in (None, self.made_with):
            return
        made, runs = ("with", "without") if self.made_with else ("without", "with")
        said = f"made {made} guidance, run {runs}"
        self.detail["guidance"] = said
        text = f"{type(self.method).__name__}: its artifact was {said}; its quality is not known"
        self._warn_once(said, text, GuidanceWarning)

    def _hidden_by_compile(self) -> bool:
        """Whether layers lie inside a graph; compiling block by block leaves them outside."""
        for _, module in denoiser_modules(self._pipe()):
            inner = compat.compiled_entry(module)
            if compat.is_compiled(module) and any(
                id(m) in self._layered for m in inner.modules() if m is not inner
            ):
                return True
        return False

    def run_ended(self, run: Run) -> None:
        if not self._in_run:
            return
        self._in_run = False
        self.on_run_end(run)
        if run.calls == 0:
            return
        self._runs.append(self._run_report(run))
        del self._runs[:-RUNS_KEPT]
        self._runs_ended += 1
        self._nfe += run.nfe
        effect = self.has_effect()
        self._had_effect |= effect
        if run.finished and not effect and self.method != self.method.neutral():
            self._no_effect()

    def _no_effect(self) -> None:
        text = f"{type(self.method).__name__} changed nothing in this run"
        if self.fallbacks:
            text += f" ({', '.join(self.fallbacks)})"
        if self.strict:
            raise NoEffectError(text)
        self._warn_once("no effect", text, NoEffectWarning)

    def _run_report(self, run: Run) -> dict[str, Any]:
        return {
            "steps": run.steps_done,
            "calls": run.calls,
            "nfe": run.nfe,
            "branches": list(run.branches),
            "finished": run.finished,
            "computed": self.counts["computed"],
            "reused": self.counts["reused"],
            "skipped": self.counts["skipped"],
            "fallbacks": dict(self.fallbacks),
            **self.memory(),
            "syncs": run.syncs + self.counts["syncs"],
            "detail": dict(self.detail),
        }

    # -- for users ---------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What really happened, counted, as plain JSON: the newest 64 runs in full, and how many
        runs ended and network evaluations there were in all.
        """
        self.clock.close_if_over()
        return {
            "method": self.method.name(),
            "effect": "some" if self._had_effect else "none",
            "runs_ended": self._runs_ended,
            "nfe": self._nfe,
            "runs": [dict(run) for run in self._runs],
        }

    def detach(self) -> None:
        """Give the host back, attribute for attribute. Safe to call twice, in any order.

        If it raises (weights that lie elsewhere find no room), it can be tried again.
        """
        if not self._attached:
            return
        self.patch.undo()
        self._attached = False
        pipe = self._pipe()
        if pipe is not None:
            _ATTACHED[pipe] = [r for r in _ATTACHED[pipe] if r() not in (None, self)]
        self.clock.release(self)


@dataclass(frozen=True)
class Recipe(Method):
    """Methods in attach order, the first innermost. Itself a ``Method``; recipes inside flatten.

    ``Recipe(())`` attaches nothing but the clock: its report counts the plain pipeline.
    """

    methods: tuple[Method, ...] = ()

    def __new__(cls, *given: Any, **named: Any) -> Self:
        if len(given) > 1:
            raise ValueError("Recipe: methods is one tuple: Recipe((a, b))")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.methods, str) or not isinstance(self.methods, Iterable):
            raise ValueError(
                "Recipe: methods is a tuple: Recipe((a, b)), of a single one Recipe((a,)); got "
                f"{self.methods!r}"
            )
        flat: list[Method] = []
        for method in self.methods:
            if not isinstance(method, Method):
                raise ValueError(f"Recipe holds methods, got {type(method).__name__}: {method!r}")
            flat += method.methods if isinstance(method, Recipe) else (method,)
        object.__setattr__(self, "methods", tuple(flat))

    def claims(self, pipe: Any) -> frozenset[Claim]:
        taken: list[tuple[Method, frozenset[Claim]]] = []
        for method in self.methods:
            claims = method.claims(pipe)
            for other, held in taken:
                _refuse_overlap(method, claims, other, held)
            taken.append((method, claims))
        return frozenset().union(*(claims for _, claims in taken))

    def new_live(self, pipe: Any) -> Attached:
        return _AttachedRecipe(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _AttachedRecipe)
        try:
            for method in self.methods:
                live.members.append(method.attach(pipe, strict=live.strict))
        except BaseException:
            live.detach_members()
            raise

    def neutral(self) -> Recipe | None:
        neutrals = [m.neutral() for m in self.methods]
        return None if None in neutrals else Recipe(tuple(m for m in neutrals if m is not None))

    def call_changes(self) -> dict[str, Any]:
        return {k: v for method in self.methods for k, v in method.call_changes().items()}

    def to_json(self) -> dict[str, Any]:
        return {"methods": [m.to_json() for m in self.methods]}


class _AttachedRecipe(Attached):
    def __init__(self, method: Recipe, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.members: list[Attached] = []

    def has_effect(self) -> bool:
        return True  # each member answers for itself

    def report(self) -> dict[str, Any]:
        members = [member.report() for member in self.members]
        effect = "some" if any(m["effect"] == "some" for m in members) else "none"
        return {**super().report(), "effect": effect, "members": members}

    def detach(self) -> None:
        self.detach_members()
        super().detach()

    def detach_members(self) -> None:
        with ExitStack() as members:  # the last first, and all even where one of them raises
            for member in self.members:
                members.callback(member.detach)


@contextmanager
def attached(
    method: Method | Iterable[Method], pipe: Any, *, strict: bool = False
) -> Iterator[Attached]:
    """Attach a method, a recipe or several methods to ``pipe`` for the length of a ``with`` block.

    ``strict`` turns the warnings about runs without effect and about fallbacks into errors.
    Pipelines that share its scheduler and denoiser (``from_pipe``) run under the methods, too, if
    none are attached to them.

    Raises:
        ValueError: what ``Method.attach`` raises; a first argument that is no method.
    """
    recipe = method if isinstance(method, Method) else _recipe_given(method, pipe)
    live = recipe.attach(pipe, strict=strict)
    try:
        yield live
    finally:
        live.detach()


def _recipe_given(given: Any, pipe: Any) -> Recipe:
    """The recipe of several methods; what is none is told what to give."""
    if isinstance(pipe, Method) or hasattr(getattr(given, "scheduler", None), "set_timesteps"):
        raise ValueError("attached: the method comes first, the pipeline second")
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        raise ValueError(f"attached: {path!r} is a path; give accel.read_recipe({path!r}).recipe")
    if isinstance(getattr(given, "recipe", None), Recipe):
        raise ValueError(f"attached: a {type(given).__name__} is no method; give its .recipe")
    if not isinstance(given, Iterable):
        raise ValueError(f"attached: {given!r} is no method, no recipe and no tuple of methods")
    return Recipe(tuple(given))


def live_on(pipe: Any) -> tuple[Attached, ...]:
    """Everything attached to ``pipe`` now, in attach order (recipes after their members)."""
    found = (reference() for reference in _ATTACHED.get(pipe, []))
    return tuple(live for live in found if live is not None)


def require_detached(pipe: Any, doing: str) -> None:
    """Raises ``ValueError`` if anything is attached to ``pipe``: its weights may be elsewhere."""
    if live_on(pipe):
        names = ", ".join(live.method.name() for live in live_on(pipe))
        raise ValueError(f"detach {names} before {doing}")


@dataclass(frozen=True)
class Search(ABC):
    """A frozen strategy that spends compute on better noise; a JSON value, as methods are."""

    PAPER: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def run(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        verifier: Any,
        budget: Any,
        recipe: Recipe,
        **more: Any,
    ) -> Any:
        """Search, under ``budget``, with ``recipe`` attached; returns a ``SearchResult``."""

    @classmethod
    def name(cls) -> str:
        """``"samplers.search.random:Random"``."""
        return f"{cls.__module__}:{cls.__qualname__}"

    def to_json(self) -> dict[str, Any]:
        """``{"search": name, "settings": {...}}``."""
        return {"search": self.name(), "settings": settings_json(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json()["settings"]``. Raises ``ValueError`` naming what is wrong."""
        return from_settings(cls, settings)


@dataclass(frozen=True)
class Trainer(ABC):
    """Frozen training settings that turn a pipeline and inputs into an artifact."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def fit(
        self, pipe: Any, inputs: list[dict[str, Any]], out: str, student_recipe: Recipe
    ) -> Artifact:
        """Train, resumable under ``out``; the student's forward runs ``student_recipe``."""


# -- claims ----------------------------------------------------------------------------------

_ATTACHED: weakref.WeakKeyDictionary[Any, list[weakref.ref[Attached]]] = weakref.WeakKeyDictionary()


def _refuse_collisions(method: Method, claims: frozenset[Claim], pipe: Any) -> None:
    for live in live_on(pipe):
        _refuse_overlap(method, claims, live.method, live.claims)
    own = {id(compat.compiled_entry(m)): slot for slot, m in denoiser_modules(pipe)}
    for other in [p for p in _ATTACHED if p is not pipe]:
        names = {
            slot: own[id(inner)]
            for slot, m in denoiser_modules(other)
            if id(inner := compat.compiled_entry(m)) in own
        }
        for live in live_on(other) if names else ():
            _refuse_shared(method, claims, live, other, names)


def _refuse_shared(
    method: Method, claims: frozenset[Claim], live: Attached, other: Any, names: dict[str, str]
) -> None:
    """Raises ``ValueError`` where what is attached to another pipeline has tensors of a denoiser
    that both have. ``names``: what the denoisers of the other are here.
    """
    for slot, paths in live.claims:
        if slot not in SHARED_SLOTS:
            continue
        split = [path.partition(".") for path in paths]
        here = frozenset(names[head] + dot + tail for head, dot, tail in split if head in names)
        meets = [_meeting_path(mine, here) for own_slot, mine in claims if own_slot == slot]
        for meet in filter(None, meets):
            raise ValueError(
                f"{method.name()} and {live.method.name()} both claim {slot!r} at {meet!r}, which "
                f"this pipeline shares with a {type(other).__name__} that has the latter; detach "
                "it there first (if they share their scheduler, too, this one runs under it)"
            )


def _refuse_overlap(
    one: Method, claims: frozenset[Claim], other: Method, held: frozenset[Claim]
) -> None:
    for slot, paths in claims:
        if slot not in EXCLUSIVE_SLOTS | STACKING_SLOTS:
            known = sorted(EXCLUSIVE_SLOTS | STACKING_SLOTS)
            raise ValueError(f"{one.name()} claims unknown slot {slot!r}; known: {known}")
        if slot == "scheduler" and any(s == "scheduler.modifier" for s, _ in held):
            raise ValueError(
                f"{one.name()} replaces the scheduler that {other.name()} acts on; put it before"
            )
        if slot not in EXCLUSIVE_SLOTS:
            continue
        for other_slot, other_paths in held:
            meet = _meeting_path(paths, other_paths) if other_slot == slot else None
            if meet is not None:
                raise ValueError(
                    f"{one.name()} and {other.name()} both claim {slot!r} at {meet!r}; "
                    "leave one of them out"
                )


def _meeting_path(paths: frozenset[str], others: frozenset[str]) -> str | None:
    """A path of ``paths`` that equals, contains or lies in one of ``others``."""
    for path in sorted(paths):
        for other in others:
            if path == other or path.startswith(other + ".") or other.startswith(path + "."):
                return path
    return None
