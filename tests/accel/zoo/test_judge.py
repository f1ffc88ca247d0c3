import numpy as np
import pytest
import torch

from accel import zoo
from accel.zoo.judge import HEADS, Judge, accuracy, to_tensor
from accel.zoo.world import DigitWorld


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(zoo.path("digits-judge"))


def test_judge_reads_heldout_handwriting(judge):
    shares = accuracy(judge, DigitWorld("heldout"), 600)
    assert set(shares) == {*HEADS, "all"}
    assert min(shares.values()) >= 0.98


def test_judge_is_not_fooled_by_wrong_pictures(judge):
    """Control: asked about other pictures' attributes it is right by chance only."""
    images, what = DigitWorld("heldout").batch(np.arange(600))
    answers = judge.answers(images)
    assert (answers["digit"] == np.roll(what.digit, 1)).mean() < 0.2
    assert (answers["colour"] == np.roll(what.colour, 1)).mean() < 0.2


def test_judge_survives_its_file(judge, tmp_path):
    judge.save(tmp_path)
    images = to_tensor(DigitWorld("heldout").batch(np.arange(8))[0])
    with torch.inference_mode():
        assert torch.equal(judge.features(images), Judge.load(tmp_path).features(images))
        assert judge.features(images).shape == (8, judge.config.features)
