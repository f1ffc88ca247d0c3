"""A tuning raises its score, and RLG raises it further."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import accel
from accel.artifact import Artifact
from accel.method import attached
from accel.testing import assert_same_state, host_state, tiny
from samplers.reward_tuning import RewardTuning
from samplers.rlg import RLG

TRAINER = RewardTuning("brightness", steps=3, late=1.0, rank=2, updates=8, lr=2e-2, keep=0.0)


CALLS = [{"prompt": ["a red three", "a blue one on a white background"]}]


@pytest.fixture(scope="module")
def pipe():
    found = accel.load("zoo:digits-sd", dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    found("", num_inference_steps=1)  # pipelines leave something behind at the first run
    return found


def test_what_was_tuned_for_rises_with_the_weight(pipe, tmp_path):
    before = host_state(pipe)
    trained = TRAINER.fit(pipe, CALLS, str(tmp_path))
    assert_same_state(before, host_state(pipe))
    assert trained.method == RLG.name()
    ref = trained.save(tmp_path / "bright.safetensors")
    asked = {"prompt": ["a green two"] * 4, "num_inference_steps": 4, "guidance_scale": 1.0}

    def mean(weight):
        with attached(RLG(ref, weight=weight), pipe):
            generator = torch.Generator().manual_seed(3)
            return pipe(**asked, generator=generator, output_type="np").images.mean()

    means = [mean(w) for w in (0.0, 1.0, 2.0)]
    assert means[0] < means[1] < means[2]


def test_a_killed_training_goes_on_to_the_same_weights(pipe, tmp_path):
    short = dataclasses.replace(TRAINER, updates=3)
    whole = short.fit(pipe, CALLS, str(tmp_path / "whole"))
    again = short.fit(pipe, CALLS, str(tmp_path / "whole"))  # only reads its checkpoint
    assert all(torch.equal(whole.tensors[k], again.tensors[k]) for k in whole.tensors)
    with pytest.raises(ValueError, match="another training"):
        TRAINER.fit(pipe, CALLS, str(tmp_path / "whole"))
    assert isinstance(whole, Artifact)


def test_a_late_share_of_less_than_a_step_is_the_last_one(pipe, tmp_path):
    late = dataclasses.replace(TRAINER, late=0.04, updates=1)
    made = late.fit(pipe, [{"prompt": CALLS[0]["prompt"][:1]}], str(tmp_path))
    assert all(value.isfinite().all() for value in made.tensors.values())


def test_what_cannot_be_tuned_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="sharpness has no gradient"):
        RewardTuning("sharpness").fit(pipe, CALLS, str(tmp_path))
    with pytest.raises(ValueError, match="lists of prompts"):
        TRAINER.fit(tiny("sd").pipe, [{"prompt": "one"}], str(tmp_path))
    with pytest.raises(ValueError, match="late"):
        RewardTuning("judge", late=0.0)
