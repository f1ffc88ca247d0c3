"""What an algorithm cannot search is known, and said, before anything is computed."""

from __future__ import annotations

import diffusers
import pytest
import torch

from accel.method import Recipe
from accel.testing import assert_same_state, host_state, tiny
from caches.interval import IntervalCache
from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings, refusals
from samplers.search.correctors import Correctors
from samplers.search.draft_commit import DraftCommit
from samplers.search.evolution import Evolution
from samplers.search.gradient import Gradient
from samplers.search.particles import Particles
from samplers.search.paths import Paths
from samplers.search.random import Random
from samplers.search.rollover import Rollover
from samplers.search.verifiers.pixels import Brightness, Contrast, Sharpness
from samplers.search.verifiers.protocol import RankEnsemble
from samplers.search.zero_order import ZeroOrder
from samplers.swap import SwapScheduler

SEARCHES = (Random(), DraftCommit(), ZeroOrder(), Paths(), Particles(), Evolution(), Rollover(),
            Correctors(), Gradient())  # fmt: skip
BOTH = RankEnsemble((Brightness(), Contrast()))
HEUN = Recipe((SwapScheduler("HeunDiscreteScheduler"),))
CACHE = Recipe((IntervalCache(2, 1, 1, "output", 1),))
MIDDLE = "Paths Particles Evolution Rollover Correctors"


@pytest.fixture
def untouched(host):
    """The pipeline; no network may be called, nothing may stay behind."""
    host.run()
    before, called = host_state(host.pipe), []
    hook = host.pipe.unet.register_forward_hook(lambda *_: called.append(1))
    yield host.pipe
    hook.remove()
    assert not called
    assert_same_state(before, host_state(host.pipe))


@pytest.mark.parametrize(
    ("asked", "verifier", "recipe", "who", "said"),
    [
        ({}, Brightness(), None, "", ""),
        ({}, Sharpness(), None, "Gradient", "sharpness has no gradient"),
        ({}, BOTH, None, "Particles Rollover Gradient", "need an absolute scale"),
        ({}, Brightness(), CACHE, "Gradient", "gradients cannot pass caches"),
        ({}, Brightness(), HEUN, MIDDLE, "makes a step in 2 stages"),
        ({"guidance_scale": 1.0}, Brightness(), None, "Correctors", "guidance_scale 1 has none"),
        ({"num_inference_steps": 1}, Brightness(), None, "Paths Evolution", "steps"),
    ],
    ids=["all", "gradient", "ensemble", "cache", "stages", "guidance", "steps"],
)
def test_who_cannot_search_says_why(untouched, call, asked, verifier, recipe, who, said):
    call = call | {"num_inference_steps": 12, "guidance_scale": 3.0} | asked
    found = refusals(SEARCHES, untouched, call, verifier, recipe or Recipe(()))
    reasons = {type(s).__name__: why for s, why in zip(SEARCHES, found, strict=True) if why}
    assert reasons.keys() == set(who.split())
    assert all(said in why for name, why in reasons.items() if name != "Gradient" or who == name)


def test_a_pipeline_that_draws_its_own_noise_is_searched_by_seed():
    found = refusals(SEARCHES, tiny("dit").pipe, {"class_labels": [1]}, Brightness())
    assert found[:2] == [None, None]
    assert all("shows no first noise" in str(why) for why in found[2:])


def test_image_to_image_is_searched_by_seed():
    """Its first noise holds the picture, and its steps are not the first of the grid."""
    host = tiny("sd-img2img")
    call = {k: v[:1] if torch.is_tensor(v) else v for k, v in host.inputs.items()}
    found = refusals(SEARCHES, host.pipe, call, Brightness())
    assert found[:2] == [None, None]
    assert all("begins inside its schedule" in str(why) for why in found[2:])


def test_a_pipeline_that_decodes_its_last_prediction_is_searched_in_whole_runs(host, call):
    class LatentConsistencyModelPipeline(type(host.pipe)):
        pass

    host.pipe.__class__ = LatentConsistencyModelPipeline
    found = refusals((Random(), ZeroOrder(), Particles()), host.pipe, call, Brightness())
    assert found[:2] == [None, None]
    assert "the middle of a run cannot be looked at" in str(found[2])


def test_a_pipeline_that_steps_a_part_of_its_latents_is_searched_in_whole_runs():
    """Image to video keeps the first frame and steps the rest."""
    host = tiny("ltx")
    pipe = diffusers.LTXImageToVideoPipeline(**host.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    call["image"] = torch.rand(1, 3, 32, 64)
    settings = SearchSettings(batch=1)
    with pytest.raises(ValueError, match="latents, so a run cannot be taken up in the middle"):
        Particles(2, at=(0.5,), rounds=1).run(
            pipe, [call], Brightness(), Budget(renders=4), settings=settings
        )
    assert Random(1).run(pipe, [call], Brightness(), Budget(renders=2), settings=settings).winners


def test_patience_wants_somebody_to_watch():
    with pytest.raises(ValueError, match="watches a held-out verifier"):
        SearchSettings(patience=1, held_out=())


def test_a_search_asks_first(untouched, call):
    with pytest.raises(ValueError, match="sharpness has no gradient"):
        Gradient().run(untouched, [call], Sharpness(), Budget(renders=2))


@pytest.mark.parametrize(
    ("search", "name"),
    [(ZeroOrder, "rounds"), (Particles, "rounds"), (Paths, "rounds"), (Rollover, "rounds"),
     (Correctors, "rounds"), (Gradient, "iterations"), (DraftCommit, "commits"),
     (Random, "candidates")],
)  # fmt: skip
def test_a_search_of_no_rounds_is_refused(search, name):
    with pytest.raises(ValueError, match=rf"^{search.__name__}\.{name} = 0: at least 1$"):
        search(**{name: 0})
