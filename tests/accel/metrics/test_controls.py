"""Broken methods must lose in the measure that is meant to see them, and not in the others.

Real DigitWorld pictures. Content is measured in features of the judge, looks in `appearance`.
"Clearly worse" is without overlap of 95 % intervals. What nothing was done to are held-out samples,
other than those of the reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accel import zoo
from accel.metrics.appearance import appearance
from accel.metrics.distribution import frechet, kid
from accel.metrics.fidelity import feature_distance, psnr, ssim
from accel.metrics.judged import accuracy
from accel.metrics.memorised import copied, nearness
from accel.metrics.statistics import bootstrap, bootstrap_sets, paired_test, share
from accel.zoo.judge import Judge, to_tensor
from accel.zoo.world import DigitWorld

COUNT = 400
HEADS = ("digit", "colour", "background")


@pytest.fixture(scope="module")
def judge():
    return Judge.load(zoo.path("digits-judge"))


def _unit(images):
    """(n, ..., h, w, 3) uint8 -> (n, ..., 3, h, w) in [0, 1]."""
    return torch.from_numpy(images).movedim(-1, -3).float() / 255


def _levels(x):
    """(n, ..., 3, h, w) in [0, 1] -> (n, ..., h, w, 3) uint8."""
    return (x * 255).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().numpy()


def blurred(images):
    """A box of 5 x 5 pixels."""
    x = _unit(images)
    flat = F.pad(x.flatten(0, -4), (2, 2, 2, 2), mode="replicate")
    return _levels(F.avg_pool2d(flat, 5, 1).reshape(x.shape))


def noisy(images, deviation=0.1):
    x = _unit(images)
    return _levels(x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def colour_shifted(images):
    """Red for green, green for blue, blue for red."""
    return np.ascontiguousarray(np.roll(images, 1, axis=-1))


def scrambled(images):
    """The 16 blocks of 8 x 8 pixels in another order."""
    n = len(images)
    blocks = images.reshape(n, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(n, 16, 8, 8, 3)
    mixed = blocks[:, np.random.default_rng(0).permutation(16)]
    return mixed.reshape(n, 4, 4, 8, 8, 3).swapaxes(2, 3).reshape(images.shape)


WRONG = ("colour_shifted", "scrambled")
RUINS = {f.__name__: f for f in (blurred, noisy, colour_shifted, scrambled)}


@pytest.fixture(scope="module")
def pictures():
    """Sets of pictures by name, and what was asked for in "clean" and its ruins."""
    world, train = DigitWorld("heldout"), DigitWorld("train")
    clean, asked = world.batch(np.arange(COUNT, 2 * COUNT))
    sets = {name: ruin(clean) for name, ruin in RUINS.items()} | {
        "clean": clean,
        "reference": world.batch(np.arange(COUNT))[0],
        "collapsed": world.batch(np.arange(COUNT), class_ids=3 + 10 * (np.arange(COUNT) % 10))[0],
        "train": train.batch(np.arange(COUNT))[0],
    }
    return sets, {name: getattr(asked, name) for name in HEADS}


@pytest.fixture(scope="module")
def content(judge, pictures):
    """Features of the judge, but for ruins that it was trained not to see."""
    sets = {k: to_tensor(x) for k, x in pictures[0].items() if k not in ("blurred", "noisy")}
    with torch.inference_mode():
        return {name: judge.features(x).numpy() for name, x in sets.items()}


@pytest.fixture(scope="module")
def looks(pictures):
    return {name: appearance(_unit(x)).numpy() for name, x in pictures[0].items()}


def _frechet(features, name):
    return bootstrap_sets([features[name], features["reference"]], frechet, resamples=40)


def _kid(features, name):
    """Unlike a bootstrap, subsets hold no row twice; their spread overstates that of the whole."""
    return kid(features[name], features["reference"], subsets=40, subset_size=COUNT // 4)


@pytest.mark.parametrize("name", [*WRONG, "collapsed"])
def test_frechet_of_content_sees_wrong_content(content, name):
    assert _frechet(content, name).low > _frechet(content, "clean").high


@pytest.mark.parametrize("name", ["blurred", "noisy"])
def test_distances_of_looks_see_blur_and_noise(looks, name):
    assert _frechet(looks, name).low > _frechet(looks, "clean").high
    clean, ruined = _kid(looks, "clean"), _kid(looks, name)
    assert ruined.mean - 2 * ruined.deviation > clean.mean + 2 * clean.deviation


def test_looks_do_not_see_where_things_are(looks):
    """Whole blocks moved leave means and details: equal but for sums of 1,024 in another order."""
    np.testing.assert_allclose(looks["scrambled"], looks["clean"], rtol=0, atol=1e-6)
    assert _frechet(looks, "collapsed").low < _frechet(looks, "clean").high


def test_distances_do_not_see_order(content, looks):
    """Sums in another order differ by roundings of the trace; 1e-9 is millions of them."""
    rows = np.random.default_rng(0).permutation(COUNT)
    for features in (content, looks):
        clean, reference = features["clean"].astype(np.float64), features["reference"]
        for metric in (frechet, lambda a, b: kid(a, b, subsets=None).mean):
            value = metric(clean, reference)
            scale = abs(value) + metric(2 * clean, reference)
            assert metric(clean[rows], reference) == pytest.approx(value, abs=1e-9 * scale)


def test_accuracy_sees_wrong_content_and_not_order(judge, pictures):
    sets, asked = pictures
    found = {n: accuracy(judge.answers(sets[n]), asked) for n in ("clean", *WRONG)}
    clean = found["clean"]
    assert found["colour_shifted"]["colour"].high < clean["colour"].low
    assert found["scrambled"]["digit"].high < clean["digit"].low
    assert found["scrambled"]["background"].high > 0.9 * clean["background"].low
    rows = np.random.default_rng(0).permutation(COUNT)
    turned = {k: v[rows] for k, v in asked.items()}
    assert accuracy(judge.answers(sets["clean"][rows]), turned) == clean
    assert accuracy(judge.answers(sets["clean"]), turned)["all"].high < 0.1


def test_only_copies_are_called_copies(content):
    """Half taken from the training set is enough. Distances to held-out samples do not see all of
    it: the reason for these measures."""
    train, clean, reference = (content[k] for k in ("train", "clean", "reference"))
    base = share(copied(clean, train))
    assert share(copied(reference, train)).low < base.high  # another draw
    for part in (2, 1):
        memorised = np.concatenate([train[: COUNT // part], clean[COUNT // part :]])
        assert share(copied(memorised, train)).low > base.high
    assert nearness(train, clean, train) == 0
    assert nearness(reference, clean, train) == pytest.approx(1, abs=0.2)
    assert _frechet(content, "train").low < _frechet(content, "clean").high
    assert share(copied(content["scrambled"], train)).low < base.high


def test_paired_measures_order_noise_by_strength(judge, pictures):
    clean = pictures[0]["clean"][:100]
    little, much = ([], [])
    for scores, deviation in ((little, 0.02), (much, 0.1)):
        ruined = noisy(clean, deviation)
        with torch.inference_mode():
            own, theirs = (judge.features(to_tensor(x)) for x in (clean, ruined))
        x, y = _unit(clean), _unit(ruined)
        scores += [psnr(y, x), ssim(y, x), -feature_distance(theirs, own)]
    for a, b in zip(little, much, strict=True):
        found = paired_test(a.tolist(), b.tolist())
        assert found.difference.low > 0
        assert found.p < 1e-4
        assert bootstrap(a.tolist()).low > bootstrap(b.tolist()).high
