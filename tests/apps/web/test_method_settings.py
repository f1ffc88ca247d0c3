"""Settings in a form: every method's own come back as they were, wrong ones become a sentence."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from accel.artifact import ArtifactRef
from accel.methods import index, resolve
from apps.web.checks import offers, sentence
from apps.web.method_settings import about, edited, fields
from apps.web.searches import algorithms
from caches.encoder_propagation import EncoderPropagation
from caches.evolution import EvolutionCache
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, TaylorSeer
from samplers.swap import SwapScheduler
from samplers.time_shift import TimeShift
from sparse_attn.subblock_lse import SubblockLSE

ARTIFACT = ArtifactRef("/a.safetensors", "0" * 64)


NEEDED = {"artifact": ARTIFACT, "scheduler": "DDIMScheduler"}


@pytest.mark.parametrize("name", [row["name"] for row in index()])
def test_what_the_form_shows_is_what_the_method_is(name):
    cls = resolve(name)
    missing = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    try:
        method = cls(**{name: NEEDED[name] for name in missing})
    except ValueError:  # one of several ways to say it is needed
        method = cls(artifact=ARTIFACT)
    shown = fields(method)
    hidden = {f.name for f in dataclasses.fields(method)} - {f.name for f in shown}
    assert hidden <= {"artifact"}
    assert edited(method, {f.name: f.value for f in shown}) == method
    assert len(about(method)[0]) > 20


def test_what_is_ticked_and_left_as_it_is_is_what_was_offered():
    """Every box of the page as a browser sends it back, through its fields as Gradio reads them."""
    gradio = pytest.importorskip("gradio", reason="the app needs Gradio: pip install -e '.[app]'")
    from apps.web.settings_form import SettingsForm

    boxes = {one.key: one.method for one in offers(sorted(Path("recipes").glob("*.yaml")))}
    boxes |= {one.name: one.search for one in algorithms()}
    form = SettingsForm()

    async def build():  # where no loop runs, Gradio makes some and leaves them open
        with gradio.Blocks():
            for key, value in boxes.items():
                form.box(key, key, value)

    asyncio.run(build())
    shown = [one.postprocess(one.value) for one in form.values]
    for one, it in zip(form.values, shown, strict=True):
        if isinstance(one, gradio.Dropdown):
            assert it in [choice for _, choice in one.choices], f"{one.label} shows nothing"
    edits = form.edits([one.preprocess(it) for one, it in zip(form.values, shown, strict=True)])
    assert len(edits) > 20
    for key, value in boxes.items():
        assert edited(value, edits.get(key, {})) == value


def test_settings_are_changed():
    assert edited(TaylorSeer(), {"interval": 5.0, "modules": "lite"}) == TaylorSeer(
        5, modules="lite"
    )
    keys = edited(EncoderPropagation(), {"keys": "[0, 4, 8]", "parallel": True})
    assert keys == EncoderPropagation((0, 4, 8), parallel=True)
    assert edited(SwapScheduler("DDIMScheduler", steps=9), {"steps": None}).steps is None
    assert edited(TimeShift(v0=0.5), {"v0": None}) == TimeShift()
    by_head = edited(SubblockLSE(), {"allocate": "head"})
    assert by_head == SubblockLSE(allocate="head")
    assert edited(by_head, {"allocate": ""}) == SubblockLSE()
    kept = edited(EvolutionCache(ARTIFACT), {"on_grid": "error"})
    assert kept == EvolutionCache(ARTIFACT, "error")


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        (TaylorSeer(), {"interval": 2.5}, "TaylorSeer: interval cannot be 2.5; it must be a"),
        (TaylorSeer(), {"interval": "four"}, "TaylorSeer: interval cannot be 'four'; it must"),
        (TaylorSeer(), {"interval": None}, "TaylorSeer: interval may not be empty."),
        (TaylorSeer(), {"modules": "all"}, "TaylorSeer: modules cannot be 'all'; it must be"),
        (IntervalCache(), {"interval": 0}, "IntervalCache: interval cannot be 0; it must be"),
        (FirstBlockCache(), {"threshold": -1}, "FirstBlockCache: threshold cannot be -1; it must"),
        (EncoderPropagation(), {"keys": "0, 1"}, "EncoderPropagation: keys is written like [0, 1"),
        (EncoderPropagation(), {"keys": '["a"]'}, "EncoderPropagation: keys cannot be"),
        (TaylorSeer(), {"artifact": 1}, "TaylorSeer has no setting 'artifact'."),
        (EvolutionCache(ARTIFACT), {"artifact": {"path": "/etc/passwd"}}, "EvolutionCache has no"),
    ],
)
def test_a_wrong_value_becomes_a_sentence(method, values, said):
    with pytest.raises(ValueError) as error:
        edited(method, values)
    assert sentence(str(error.value)).startswith(said)
    assert sentence(str(error.value)).endswith(".")
    assert "\n" not in str(error.value)
