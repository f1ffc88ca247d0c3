"""Broken videos must lose in the measure that is meant to see the fault, and only there.

Real DigitWorld videos of five frames, which is what the judge looks at; held-out ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel import zoo
from accel.metrics.distribution import frechet
from accel.metrics.fidelity import psnr, temporal_error, worst_frame
from accel.metrics.judged import accuracy
from accel.metrics.statistics import bootstrap, bootstrap_sets
from accel.metrics.video import flicker, frozen, motion, still_border
from accel.zoo.judge import Judge, video_tensor
from accel.zoo.world import DigitWorld

COUNT = 148  # two for each of 74 features: fewer warn
ATTRIBUTES = ("digit", "colour", "background", "motion")
BORDER = still_border(64, 64, 3)


def _unit(videos):
    """(n, f, h, w, 3) uint8 -> (n, f, 3, h, w) in [0, 1]."""
    return torch.from_numpy(videos).movedim(-1, -3).float() / 255


def shuffled(videos):
    """Frames of every video in an order without a trend."""
    return videos[:, [3, 0, 2, 4, 1]]


def shivering(videos):
    """Every other frame darker by 5 of 255."""
    dark = 5 * (np.arange(videos.shape[1]) % 2).reshape(1, -1, 1, 1, 1)
    return np.clip(videos.astype(np.int16) - dark, 0, 255).astype(np.uint8)


def standing(videos):
    """The middle frame all the time."""
    return np.repeat(videos[:, 2:3], videos.shape[1], axis=1)


def washed_out(videos):
    """Three quarters of the colour gone."""
    grey = videos.mean(axis=-1, keepdims=True)
    return np.round(grey + (videos - grey) / 4).astype(np.uint8)


RUINS = {f.__name__: f for f in (shuffled, shivering, standing, washed_out)}


@pytest.fixture(scope="module")
def videos():
    """Sets (160, 5, 64, 64, 3) by name, and what was asked for in "clean"."""
    world = DigitWorld("heldout", canvas=64)
    clean, asked = world.videos(np.arange(COUNT, 2 * COUNT), frames=5)
    sets = {name: ruin(clean) for name, ruin in RUINS.items()}
    sets |= {"clean": clean, "reference": world.videos(np.arange(COUNT), frames=5)[0]}
    return sets, {
        name: getattr(asked, name) for name in ("digit", "colour", "background", "motion")
    }


@pytest.fixture(scope="module")
def judge():
    return Judge.load(zoo.path("digits-judge"))


@pytest.fixture(scope="module")
def content(judge, videos):
    """Features (160, 74) of each set, but for the flicker, which has nothing to do with content."""
    sets = {name: video_tensor(x) for name, x in videos[0].items() if name != "shivering"}
    with torch.inference_mode():
        return {name: judge.video_features(x) for name, x in sets.items()}


def _farther(content, ruin):
    """By how much ruined videos are farther from the reference than the same ones unruined."""
    ruined, clean, reference = (content[k].double().numpy() for k in (ruin, "clean", "reference"))
    width = ruined.shape[1]

    def difference(both, reference):
        return frechet(both[:, :width], reference) - frechet(both[:, width:], reference)

    return bootstrap_sets([np.hstack([ruined, clean]), reference], difference, resamples=40)


@pytest.mark.parametrize("ruin", ["washed_out", "shuffled", "standing"])
def test_frechet_sees_pale_colours_and_wrong_motion(content, ruin):
    assert _farther(content, ruin).low > 0


def test_accuracy_sees_wrong_motion_in_the_motion_alone(judge, videos):
    sets, asked = videos
    found = {
        name: accuracy(judge.video_answers(sets[name]), asked)
        for name in ("clean", "shuffled", "standing")
    }
    for name in ("shuffled", "standing"):
        assert found[name]["motion"].high < found["clean"]["motion"].low
        for other in ("colour", "background"):
            assert found[name][other].high > found["clean"][other].low


def test_flicker_and_frozen_see_one_fault_each(videos):
    sets = {name: v for name, v in videos[0].items() if name != "washed_out"}  # some lose the digit
    x = {name: _unit(v[:60]) for name, v in sets.items()}
    assert {k for k, v in x.items() if flicker(v, BORDER).max() > 0} == {"shivering"}
    # black backgrounds cannot get darker by the whole step
    assert flicker(x["shivering"], BORDER).median() == pytest.approx(5 / 255, rel=0.01)
    assert {k for k, v in x.items() if frozen(v).any()} == {"standing"}
    assert frozen(x["standing"]).all()
    assert motion(x["clean"]).min() > motion(x["standing"]).max()


def test_paired_errors_of_videos_see_one_fault_each(videos):
    """Constant error has no temporal error; an error of one frame is found where it is."""
    clean = _unit(videos[0]["clean"][:30])
    darker = 0.9 * clean
    one = clean.clone()
    one[:, 3] = 1 - one[:, 3]
    for name in RUINS:
        assert bootstrap(temporal_error(_unit(videos[0][name][:30]), clean).tolist()).low > 0.005
    assert temporal_error(0.1 + clean, clean).max() < 1e-6
    assert psnr(darker, clean).max() < 60
    assert (worst_frame(one, clean)[1] == 3).all()
