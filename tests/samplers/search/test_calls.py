"""Calls of several samples, and samples that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.testing import tiny
from samplers.search.budget import Budget
from samplers.search.calls import as_bytes, check_single, expanded
from samplers.search.conduct import SearchSettings
from samplers.search.gradient import Gradient
from samplers.search.player import Player
from samplers.search.random import Random
from samplers.search.session import PLAIN
from samplers.search.verifiers.pixels import Contrast, Darkness


@pytest.mark.parametrize("name", ["cogvideox", "sd3", "ltx", "flux", "sdxl", "hunyuanvideo"])
def test_candidates_of_one_batch_are_those_of_single_calls(name):
    """Some pipelines do not repeat embeddings for a count of samples, some take one and make one.

    Rows of a batch differ in their last bits: by a step of 255 at most.
    """
    host = tiny(name)
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    found = []
    for batch in (8, 1):
        settings = SearchSettings(batch=batch, deliver=False)
        (winner,) = Random(2).run(
            host.pipe, [call], Contrast(), Budget(renders=3), settings=settings
        ).winners  # fmt: skip
        assert winner.report == {}  # all in one call
        found.append(np.stack([c.picture for c in winner.candidates]).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert np.abs(found[0][0] - found[0][1]).max() > 1


class Stubborn:
    """A pipeline that takes a count of samples and makes one of each prompt."""

    def __init__(self, scheduler):
        self.scheduler, self.asked = scheduler, []

    def prepare_latents(self, rows):
        return torch.zeros(rows, 2)

    def __call__(self, prompt, num_videos_per_prompt=1, generator=None):
        self.asked.append(prompt)
        rows = len(prompt) if isinstance(prompt, list) and self.takes_lists else 1
        self.scheduler.set_timesteps(2)
        self.prepare_latents(rows)

    takes_lists = True


@pytest.mark.parametrize(("lists", "most"), [(True, None), (False, 1)])
def test_a_count_that_a_pipeline_ignores_is_found_out(monkeypatch, lists, most):
    pipe = Stubborn(tiny("ddim").pipe.scheduler)
    pipe.takes_lists = lists
    player = Player(pipe, {"prompt": "a"})
    monkeypatch.setattr(player, "use", lambda recipe: None)
    player.settle(PLAIN)
    assert player.most == most
    assert pipe.asked == ["a", ["a", "a"]]


def test_rows_are_repeated_and_the_rest_is_not():
    call = {
        "prompt_embeds": torch.ones(1, 3, 2), "negative_prompt_attention_mask": torch.ones(1, 3),
        "pooled_prompt_embeds": [torch.ones(2)], "image_embeds": torch.ones(1, 2), "height": 8,
    }  # fmt: skip
    many = expanded(tiny("sd3").pipe, call, 3)
    shapes = {k: len(v) for k, v in many.items() if k != "height"}
    assert shapes.pop("image_embeds") == 1
    assert set(shapes.values()) == {3}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"latents": torch.zeros(1, 2)}, "leave latents out"),
        ({"generator": torch.Generator()}, "leave generator out"),
        ({"prompt_embeds": torch.zeros(2, 3, 4)}, "one sample"),
        ({"prompt_embeds": [torch.zeros(3), torch.zeros(3)]}, "one sample"),
    ],
)
def test_calls_that_cannot_be_searched_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        check_single(call)
    check_single({"latents": None, "prompt_embeds": torch.zeros(1, 3, 4)})


def test_what_is_not_finite_is_dark_bytes():
    x = np.array([[[[np.nan, np.inf, -np.inf, 0.5]]]], np.float32)
    assert as_bytes(x).tolist() == [[[[0, 255, 0, 128]]]]


@pytest.mark.parametrize("search", [Random(4), Gradient(starts=4, climbers=1, iterations=1)])
def test_a_sample_that_is_no_number_is_not_scored(host, call, search, monkeypatch):
    """It would be a black picture, the darkest of all."""
    forward, made = host.pipe.vae.decoder.forward, []

    def overflowing(x, *args, **kwargs):
        y = forward(x, *args, **kwargs).clone()
        made.extend(range(len(y)))
        if len(y) == 4:
            y[1::2] = float("nan")
        return y

    monkeypatch.setattr(host.pipe.vae.decoder, "forward", overflowing)
    settings = SearchSettings(batch=4, held_out=(Contrast(),), deliver=False)
    winner = search.run(
        host.pipe, [call], Darkness(), Budget(renders=20), settings=settings
    ).winners[0]  # fmt: skip
    assert made
    assert [c.score is None for c in winner.candidates[:4]] == [False, True, False, True]
    assert [c.held_out["contrast"] is None for c in winner.candidates[:4]] == [0, 1, 0, 1]
    assert winner.best.picture.max() > 0
