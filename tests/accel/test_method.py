"""Methods as values, recipes, claims, reports, warnings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

import accel
from accel.artifact import ArtifactRef
from accel.denoiser import denoisers
from accel.method import RUNS_KEPT, Attached, Method, Recipe, live_on
from accel.settings import Settings
from accel.testing import TINY_NAMES, assert_same_state, checks, conform, host_state, spy, tiny
from caches.native import MagCache
from samplers.rlg import RLG


@dataclass(frozen=True)
class Taker(Method):
    """Claims what it is told, changes nothing."""

    SLOTS = ("attention", "denoiser.call", "scheduler", "scheduler.modifier", "nonsense")

    slot: str = "attention"
    paths: tuple[str, ...] = ("transformer.transformer_blocks.0",)
    fail: bool = False
    options: Settings = Settings()
    artifact: ArtifactRef | None = None

    def claims(self, pipe):
        return frozenset({(self.slot, frozenset(self.paths))})

    def build(self, pipe, live):
        live.around_call(pipe.transformer, lambda call_next, *a, **k: call_next(*a, **k))
        live.patch.swap(pipe, "scheduler", type(pipe.scheduler).from_config(pipe.scheduler.config))
        if self.fail:
            raise ValueError("cannot")


@dataclass(frozen=True)
class Other(Taker):
    """The same under another name."""


@pytest.mark.parametrize("check", checks())
def test_the_suite_passes_a_method_that_keeps_the_contract(check):
    conform(check, Taker(), "dit")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", TINY_NAMES)
def test_spies_on_every_pipeline(check, pipeline):
    conform(check, spy().methods[0], pipeline)


@pytest.mark.parametrize("pipeline", TINY_NAMES)
def test_every_pipeline_is_given_back(pipeline):
    conform("any_detach_order", spy().methods[0], pipeline)


# -- the suite catches methods that break the contract -----------------------------------------


@dataclass(frozen=True)
class Leaver(Taker):
    """Leaves an attribute behind."""

    def build(self, pipe, live):
        pipe.transformer.left = 1


@dataclass(frozen=True)
class Hoarder(Taker):
    """Keeps state from one run to the next."""

    def build(self, pipe, live):
        kept = []

        def layer(call_next, *args, **kwargs):
            kept.append(1)
            output = call_next(*args, **kwargs)
            return type(output)(sample=output.sample * (1 + len(kept) * 1e-3))

        live.around_call(pipe.transformer, layer)


@dataclass(frozen=True)
class Gambler(Taker):
    """Draws from the global RNG."""

    def build(self, pipe, live):
        import torch

        def layer(call_next, *args, **kwargs):
            torch.rand(1)
            return call_next(*args, **kwargs)

        live.around_call(pipe.transformer, layer)


@dataclass(frozen=True)
class Liar(Taker):
    """Calls a setting neutral that changes the output."""

    def neutral(self):
        return self

    def build(self, pipe, live):
        def layer(call_next, *args, **kwargs):
            output = call_next(*args, **kwargs)
            return type(output)(sample=output.sample * 1.001)

        live.around_call(pipe.transformer, layer)


@dataclass(frozen=True)
class Toucher(Taker):
    """Leaves an attribute behind where it does not know the model."""

    def claims(self, pipe):
        try:
            denoisers(pipe)
        except ValueError:
            pipe.transformer.left = 1
            raise
        return super().claims(pipe)


@pytest.mark.parametrize(
    ("check", "method"),
    [
        ("unsupported_changes_nothing", Toucher()),
        ("detach_restores_everything", Leaver()),
        ("attach_without_run_changes_nothing", Leaver()),
        ("any_detach_order", Leaver()),
        ("exception_leaves_nothing", Hoarder()),
        ("runs_are_independent", Hoarder()),
        ("rng_is_untouched", Gambler()),
        ("neutral_is_bit_equal", Liar()),
        ("claims_are_declared", Taker(slot="tokens")),
        ("claims_are_declared", Taker(paths=("vae.nowhere",))),
    ],
)
def test_the_suite_catches(check, method):
    with pytest.raises((AssertionError, AttributeError)):
        conform(check, method, "dit")


# -- claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "collides"),
    [
        ("transformer.transformer_blocks.0", True),
        ("transformer.transformer_blocks.0.attn1", True),
        ("transformer", True),
        ("transformer.transformer_blocks.01", False),
        ("transformer.transformer_blocks.1", False),
    ],
)
def test_exclusive_slots_collide_where_paths_meet(path, collides):
    host = tiny("dit")
    recipe = Recipe((Taker(), Other(paths=(path,))))
    if not collides:
        recipe.attach(host.pipe).detach()
        return
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match=r"Other.*Taker.*'attention'"):
        recipe.attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


@pytest.mark.parametrize(("slot", "refused"), [("weights", True), ("attention", False)])
def test_pipelines_that_share_a_model_share_its_weights(slot, refused):
    host, other = tiny("dit"), tiny("dit")
    taker = Taker(slot=slot, paths=("transformer",))
    taker.attach(other.pipe).detach()
    with accel.attached(taker, other.pipe):
        taker.attach(host.pipe).detach()  # models of their own
    other.pipe.transformer = host.pipe.transformer
    state = host_state(host.pipe)
    with accel.attached(taker, other.pipe):
        if refused:
            with pytest.raises(ValueError, match=r"'weights' at 'transformer', .* DiTPipeline"):
                taker.attach(host.pipe)
        else:
            taker.attach(host.pipe).detach()
    taker.attach(host.pipe).detach()
    assert_same_state(state, host_state(host.pipe))


def test_stacking_slots_do_not_collide():
    host = tiny("dit")
    Recipe((Taker(slot="denoiser.call"), Other(slot="denoiser.call"))).attach(host.pipe).detach()


def test_a_modified_scheduler_is_not_replaced():
    """The modifier would act on the one that nobody calls any more, and say nothing."""
    pipe = tiny("dit").pipe
    swap, modifier = (Taker(s, ("scheduler",)) for s in ("scheduler", "scheduler.modifier"))
    with pytest.raises(ValueError, match="acts on; put it before"):
        Recipe((modifier, swap)).attach(pipe)
    Recipe((swap, modifier)).attach(pipe).detach()


def test_unknown_slot_is_an_error():
    with pytest.raises(ValueError, match="unknown slot 'nonsense'"):
        Recipe((Taker(), Taker(slot="nonsense"))).attach(tiny("dit").pipe)


def test_failing_recipe_undoes_what_was_attached():
    host = tiny("dit")
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match="cannot"):
        Recipe((Taker(slot="denoiser.call"), Other(fail=True))).attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))
    assert accel.live_on(host.pipe) == ()


def test_not_a_pipeline():
    with pytest.raises(ValueError, match="scheduler"):
        Recipe(()).attach(object())


# -- values ------------------------------------------------------------------------------------


def test_settings_are_strict():
    for bad in ({"slot": 3}, {"paths": (1,)}, {"fail": "yes"}, {"options": {}}):
        with pytest.raises(ValueError, match=f"Taker.{next(iter(bad))}"):
            Taker(**bad)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_settings_are_what_json_can_say(number):
    with pytest.raises(ValueError, match=r"RLG\.weight"):
        RLG(adapter="a", weight=number)
    with pytest.raises(ValueError, match=r"MagCache\.ratios"):
        MagCache(ratios=(1.0, number))
    with pytest.raises(ValueError, match="JSON"):
        Settings(shift=number)


def test_from_settings_names_what_is_wrong():
    with pytest.raises(ValueError, match="no setting 'slots'"):
        Taker.from_settings({"slots": "attention"})
    with pytest.raises(ValueError, match="path, sha256"):
        Taker.from_settings({"artifact": {"path": "x"}})


def test_digest_counts_artifacts_by_content_and_notices_any_setting():
    a = Taker(artifact=ArtifactRef("here.safetensors", "aa"))
    assert a.digest() == Taker(artifact=ArtifactRef("there.safetensors", "aa")).digest()
    assert a.digest() != Taker(artifact=ArtifactRef("here.safetensors", "bb")).digest()
    assert a.digest() != Taker(options=Settings(k=1), artifact=a.artifact).digest()
    assert Recipe((a,)).digest() != Recipe((a, a)).digest()


def test_settings_mapping_is_immutable_and_hashable():
    nested = Settings(b=[1, {"c": 2}], a=1)
    nested["b"].append(5)
    assert dict(nested) == {"a": 1, "b": [1, {"c": 2}]}
    assert hash(nested) == hash(Settings({"a": 1, "b": [1, {"c": 2}]}))


def test_recipe_holds_methods_only():
    with pytest.raises(ValueError, match="Recipe holds methods, got str"):
        Recipe(("caches.native:FirstBlockCache",))  # type: ignore[arg-type]


def test_recipes_inside_recipes_flatten():
    a, b = Taker(), Other(slot="denoiser.call")
    assert Recipe((a, Recipe((b,)))) == Recipe((a, b))
    assert Recipe([a, b]).digest() == Recipe((a, b)).digest()  # type: ignore[arg-type]


# -- running -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stumbler(Taker):
    """Falls back at every call."""

    def new_live(self, pipe):
        return Attached(self, pipe)

    def build(self, pipe, live):
        def layer(call_next, *args, **kwargs):
            live.fallback("stumbled")
            return call_next(*args, **kwargs)

        live.around_call(pipe.transformer, layer)


def test_fallbacks_are_counted_and_warned_of_once():
    host = tiny("dit")
    with accel.attached(Stumbler(), host.pipe) as live:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            host.run()
            host.run()
        report = live.report()
    assert [r["fallbacks"] for r in report["runs"]] == [{"stumbled": 4}] * 2
    assert [(w.category, str(w.message)) for w in caught] == [
        (accel.FallbackWarning, "Stumbler: stumbled; computed in full"),
        (accel.NoEffectWarning, "Stumbler changed nothing in this run (stumbled)"),
    ]


def test_warnings_point_at_who_called_the_pipeline():
    """Not into the host's loop over steps, nor at a method's layer in it."""
    host = tiny("dit")
    with accel.attached(Stumbler(), host.pipe), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host.run(num_inference_steps=2)
    assert [w.filename for w in caught] == [__file__] * 2
    assert len({w.lineno for w in caught}) == 1, "the line of the call"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(Taker()), r"a tuple: Recipe\(\(a, b\)\), of a single one .*got Taker"),  # pyright: ignore
        (lambda: Recipe(Taker(), Taker()), r"one tuple: Recipe\(\(a, b\)\)"),  # pyright: ignore
        (lambda: Recipe("x.yaml"), "got 'x.yaml'"),  # pyright: ignore
    ],
)
def test_a_recipe_of_no_tuple_says_how_it_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_attached_says_what_to_give():
    pipe, file = tiny("dit").pipe, accel.RecipeFile(Recipe((Taker(),)), "r")
    for given, message in (
        ((pipe, Taker()), "the method comes first, the pipeline second"),
        ((pipe, "r.yaml"), "the method comes first"),
        (("r.yaml", pipe), r"is a path; give accel.read_recipe\('r.yaml'\).recipe"),
        ((Path("r.yaml"), pipe), r"accel.read_recipe\('r.yaml'\).recipe"),
        ((file, pipe), "a RecipeFile is no method; give its .recipe"),
        ((Taker, pipe), "is no method, no recipe and no tuple"),
        ((None, pipe), "None is no method"),
    ):
        with pytest.raises(ValueError, match=message), accel.attached(*given):
            pass
        assert live_on(pipe) == ()


def test_strict_turns_warnings_into_errors():
    host = tiny("dit")
    with (
        accel.attached(Stumbler(), host.pipe, strict=True),
        pytest.raises(RuntimeError, match="stumbled"),
    ):
        host.run()
    with (
        accel.attached(Taker(), host.pipe, strict=True),
        pytest.raises(accel.NoEffectError, match=r"^Taker changed nothing"),
    ):
        host.run()


def test_reports_are_bounded_but_totals_are_not():
    host = tiny("ddim")
    with accel.attached(Recipe(()), host.pipe) as live:
        for _ in range(RUNS_KEPT + 2):
            host.run(num_inference_steps=1)
        report = live.report()
    assert len(report["runs"]) == RUNS_KEPT
    assert report["runs_ended"] == RUNS_KEPT + 2
    assert report["nfe"] == report["runs_ended"] * report["runs"][0]["nfe"]


def test_a_member_that_cannot_be_detached_is_tried_again():
    host = tiny("dit")
    state = host_state(host.pipe)
    live = Recipe((spy(), spy())).attach(host.pipe)
    undo, tries = live.members[1].patch.undo, []

    def undo_later():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        undo()

    live.members[1].patch.undo = undo_later
    with pytest.raises(RuntimeError, match="out of memory"):
        live.detach()
    assert [x.method for x in live_on(host.pipe)] == [live.members[1].method, live.method]
    live.detach()
    assert live_on(host.pipe) == ()
    assert_same_state(state, host_state(host.pipe))


def test_detach_twice_and_report_after():
    host = tiny("dit")
    live = spy().attach(host.pipe)
    host.run()
    live.detach()
    live.detach()
    assert live.report()["members"][0]["runs"][0]["computed"] > 0


def test_what_methods_change_in_a_call_adds_up(monkeypatch):
    monkeypatch.setattr(Taker, "call_changes", lambda self: {"guidance_scale": 1.0})
    monkeypatch.setattr(Other, "call_changes", lambda self: {"eta": 0.5})
    assert Recipe((Taker(), Other())).call_changes() == {"guidance_scale": 1.0, "eta": 0.5}
    assert Recipe(()).call_changes() == {}
