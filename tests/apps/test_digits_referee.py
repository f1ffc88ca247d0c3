"""What the digits referee understands of a pipeline call, and what it judges right."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from accel import measure
from accel.zoo.world import COLOURS, DIGITS, DigitWorld
from apps import digits_referee as referee


def test_classes_and_captions_ask_the_same():
    red_three = {"digit": [3], "colour": [COLOURS.index("red")]}
    asked = referee.asked([{"class_labels": [3]}])
    assert {k: v.tolist() for k, v in asked.items()} == red_three
    asked = referee.asked([{"prompt": "a red three on a dark background"}])
    assert {k: v.tolist() for k, v in asked.items()} == {**red_three, "background": [1]}
    asked = referee.asked([{"prompt": "A red three moving left, on a dark background."}])
    assert asked["motion"].tolist() == [0]


def test_every_caption_of_the_world_is_understood():
    _, what = DigitWorld("heldout").batch(np.arange(200))
    asked = referee.asked([{"prompt": text} for text in what.captions()])
    for name in ("digit", "colour", "background"):
        assert (asked[name] == getattr(what, name)).all()


def test_samples_of_all_calls_in_order_and_only_what_all_name():
    calls = [
        {"prompt": ["a red three on a dark background", "a blue one"]},
        {"prompt": "a lime six", "num_images_per_prompt": 2},
    ]
    asked = referee.asked(calls)
    assert asked["digit"].tolist() == [3, 1, 6, 6]
    assert "background" not in asked, "not every sample names one"


@pytest.mark.parametrize(
    "calls", [[{"batch_size": 4}], [{"prompt": "a dog"}], [{"class_labels": [1000]}], []]
)
def test_nothing_asked_has_no_referee(calls):
    assert referee.digits_referee(calls) is None


def test_real_samples_show_what_is_asked_and_draws_differ():
    calls = [{"class_labels": [42] * 3}]
    one, two = (referee.real_samples(calls, draw) for draw in (0, 1))
    assert one.shape == (3, 32, 32, 3)
    assert (one != two).any()
    moving = [{"prompt": "a red three moving left on a dark background", "num_frames": 5}]
    assert referee.real_samples(moving, 0).shape == (1, 5, 64, 64, 3)


class _Rater:
    """A judge that always sees a red three, with one feature."""

    @staticmethod
    def answers(images):
        return {"digit": np.full(len(images), 3), "colour": np.zeros(len(images), int)}

    @staticmethod
    def features_of(samples):
        return samples.mean((1, 2, 3))[:, None]


def test_right_means_every_attribute_and_the_judge_is_named(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("accel.zoo.path", lambda name: tmp_path)
    monkeypatch.setattr("accel.zoo.judge.judge", lambda name: _Rater())
    calls = [{"class_labels": [3, 13, 4]}]
    found = referee.digits_referee(calls, "rater")
    assert isinstance(found, measure.Referee)
    verdict = found.judge(np.zeros((3, 32, 32, 3), np.uint8), calls)
    assert verdict.right.tolist() == [True, False, False]
    assert verdict.features.shape == (3, 1)
    assert found.real is not None
    assert found.real(calls, 0).shape == (3, 1)
    assert found.name == "rater"
    assert len(found.sha256) == 64


@pytest.mark.parametrize("kind", ["DiTPipeline", "StableDiffusionPipeline", "WanPipeline"])
def test_standard_inputs_ask_for_something(kind):
    pipe = type(kind, (), {})()
    inputs = referee.standard_inputs(pipe)
    asked = referee.asked(inputs)
    assert len(asked["digit"]) >= 8
    assert set(asked["digit"]) <= set(range(len(DIGITS)))


def test_other_pipelines_want_jobs():
    with pytest.raises(ValueError, match="--jobs"):
        referee.standard_inputs(SimpleNamespace())
