"""Climbing a score's slope through a pipeline: gradients, budget, memory, and the winner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.method import Recipe
from accel.settings import Settings
from accel.testing import TINY_NAMES, assert_same_state, host_state, tiny
from caches.interval import IntervalCache
from samplers.search.budget import Budget, Cost
from samplers.search.conduct import SearchSettings
from samplers.search.differentiate import PRICE, climb
from samplers.search.gradient import Gradient
from samplers.search.journal import Journal
from samplers.search.noise import cosine_between
from samplers.search.path import Draw, Shift, path_json, read_path
from samplers.search.player import Player
from samplers.search.session import PLAIN
from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.verifiers.pixels import Brightness, Contrast, Sharpness
from samplers.swap import SwapScheduler

FEW = Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=2),))
WITH_NOISE = [n for n in TINY_NAMES if n not in ("ddpm", "ddim", "dit", "sd-img2img")]


def run(host, call, search=None, renders=40.0, verifier=None, recipe=FEW, folder=None):
    calls = [{**call, "num_inference_steps": 4}]
    settings = SearchSettings(seed=3, journal=folder)
    budget, verifier = Budget(renders=renders), verifier or Brightness()
    search = search or Gradient(2, iterations=4)
    return search.run(host.pipe, calls, verifier, budget, recipe, settings=settings).winners[0]


def slope(host, noise, cost=None):
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    call["num_inference_steps"] = 2
    with Player(host.pipe, call) as player:
        (state,) = player.reach([(Draw(1),)], PLAIN, Cost())
        noise = state.sample if noise is None else noise
        score = lambda x: Brightness().differentiable(x, [])  # noqa: E731
        frames, gradient = climb(player, [noise], [1], PLAIN, score, cost or Cost())
        with torch.no_grad():
            return noise, float(score(frames)[0]), gradient


@pytest.mark.parametrize("name", [n for n in WITH_NOISE if n in ("sd", "sdxl", "flux", "wan")])
def test_it_is_the_gradient_through_the_whole_pipeline(name):
    """Against a difference along it: the score changes by |g|^2 h to first order."""
    host = tiny(name)
    slope(host, None)  # pipelines leave something behind at the first run
    state = host_state(host.pipe)
    noise, _, gradient = slope(host, None)
    assert float(gradient.norm()) > 0
    step = 1e-4 * float(noise.norm()) / float(gradient.norm())
    ends = [slope(host, (noise + s * step * gradient).to(noise.dtype))[1] for s in (1, -1)]
    expected = 2 * step * float(gradient.square().sum())
    assert ends[0] - ends[1] == pytest.approx(expected, rel=0.1)
    if name != "wan":  # its decoder keeps frames of the last run, whatever that was
        assert_same_state(state, host_state(host.pipe))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_gradient_is_counted_as_four_times_its_forward_pass():
    host, cost = tiny("sd"), Cost()
    slope(host, None, cost)
    assert cost.evaluations == PRICE * 2 * 2  # steps, guidance
    assert cost.decodes == 1


def test_memory_does_not_grow_with_the_steps():
    """What autograd keeps between the denoiser's calls: a few samples a step, no activations."""
    host = tiny("sd")
    kept = []
    for steps in (2, 6):
        total = [0]

        def pack(x, total=total):
            total[0] += x.numel()
            return x

        call = {k: v for k, v in host.inputs.items() if k != "output_type"}
        with Player(host.pipe, {**call, "num_inference_steps": steps}) as player:
            (state,) = player.reach([(Draw(1),)], PLAIN, Cost())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                score = lambda x: Brightness().differentiable(x, [])  # noqa: E731
                climb(player, [state.sample], [1], PLAIN, score, Cost())
        kept.append(total[0] / state.sample.numel())
    one_call = sum(p.numel() for p in host.pipe.unet.parameters()) / state.sample.numel()
    assert (kept[1] - kept[0]) / 4 < one_call / 10


def test_it_climbs_within_the_budget_and_the_floor(host, call):
    search = Gradient(2, cosine=0.9, floor=0.8)
    winner = run(host, call, search, renders=16.0)
    spent = winner.ledger.spent().evaluations
    assert 12 * 4 * 2 < spent <= 16 * 4 * 2  # renders, steps, guidance
    best = winner.report["best_by_iteration"]
    assert best == sorted(best)
    assert best[-1] > best[0]
    drafts = [c for c in winner.candidates if c.purpose == "draft"]
    climbed = [c for c in drafts if any(isinstance(m, Shift) for m in c.path)]
    assert len(climbed) >= 3
    with Player(host.pipe, call) as player:
        ends = player.reach([climbed[-1].path[:1], climbed[-1].path[:2]], PLAIN, Cost())
    cosine = cosine_between(*(s.sample for s in ends))
    assert cosine == pytest.approx(0.8, abs=0.01)
    norms = [float(s.sample.norm()) for s in ends]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_winner_is_an_unaccelerated_render_made_again_from_its_path(host, call):
    winner = run(host, call)
    (render,) = [c for c in winner.candidates if c.purpose == "render"]
    assert winner.best is render
    path = read_path(path_json(winner.path))
    assert path == winner.path
    with Player(host.pipe, {**call, "num_inference_steps": 4}) as player:
        again = player.frames([path], PLAIN, Cost())
    assert np.array_equal(again[0], winner.frames)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def pipe():
    found = accel.load("zoo:digits-sd")
    found.set_progress_bar_config(disable=True)
    return found


CALL = {"prompt": "a red three on a dark background", "num_inference_steps": 4,
        "guidance_scale": 1.0}  # fmt: skip


def test_it_goes_on_after_a_kill_with_the_same_noises(pipe, tmp_path, monkeypatch):
    put, count = Journal.put, [0]

    def search(folder):
        settings = SearchSettings(seed=3, journal=str(tmp_path / folder))
        found = Gradient(2, iterations=3).run(
            pipe, [CALL], DigitsJudge(), Budget(renders=40), FEW, settings=settings
        )
        return found.winners[0]

    def killed(journal, unit, row):
        put(journal, unit, row)
        count[0] += 1
        if count[0] == 5:
            raise Stop

    whole = search("whole")
    monkeypatch.setattr(Journal, "put", killed)
    with pytest.raises(Stop):
        search("half")
    monkeypatch.setattr(Journal, "put", put)
    again = search("half")
    assert [c.path for c in again.candidates] == [c.path for c in whole.candidates]
    assert again.ledger.spent().evaluations == whole.ledger.spent().evaluations
    assert np.array_equal(again.frames, whole.frames)


def test_what_has_no_gradient_is_refused(host, call):
    with pytest.raises(ValueError, match="sharpness has no gradient"):
        run(host, call, verifier=Sharpness())
    cache = Recipe((IntervalCache(2, 1, 1, "output", 1),))
    with pytest.raises(ValueError, match="gradients cannot pass caches"):
        run(host, call, recipe=cache)


@pytest.mark.parametrize(
    "bad", [{"starts": 1, "climbers": 2}, {"cosine": 1.0}, {"floor": 1.0}, {"iterations": 0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Gradient"):
        Gradient(**bad)


@pytest.mark.parametrize("verifier", [Brightness(), Contrast(), DigitsJudge()])
def test_tensors_score_as_their_pictures_do(verifier):
    samples = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    x = torch.from_numpy(samples).movedim(-1, 1).float() / 255
    prompts = ["a red three", "a blue one on a white background"]
    found = verifier.differentiable(x.requires_grad_(), prompts)
    assert found.detach().numpy() == pytest.approx(verifier.score(samples, prompts), abs=2e-3)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert float(gradient.abs().max()) > 0


def test_through_a_shipped_student(pipe):
    """4 steps of digits-sd's student, the judge's slope: the drafts' score rises."""
    recipe = accel.read_recipe("recipes/digits-sd-4-steps.yaml").recipe
    search, settings = Gradient(1, iterations=3), SearchSettings(seed=1)
    found = search.run(pipe, [CALL], DigitsJudge(), Budget(renders=40), recipe, settings=settings)
    best = found.winners[0].report["best_by_iteration"]
    assert best[-1] > best[0]
    assert found.held_out == ("digits-judge-b",)
