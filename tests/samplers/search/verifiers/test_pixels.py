import numpy as np
import pytest

from samplers.search.verifiers.pixels import (
    PIXELS,
    Brightness,
    Colourfulness,
    Contrast,
    Darkness,
    Movement,
    Sharpness,
    Steadiness,
)


def pictures(*levels):
    return np.stack([np.full((8, 8, 3), v, np.uint8) for v in levels])


def checks(size=8):
    return (
        (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    )


def test_extremes():
    black, white = pictures(0, 255), checks()
    assert Brightness().score(black, ["", ""]).tolist() == pytest.approx([0, 1])
    assert Darkness().score(black, ["", ""]).tolist() == pytest.approx([1, 0])
    assert Contrast().score(white, [""])[0] == pytest.approx(0.5)
    assert Contrast().score(black, ["", ""]).tolist() == pytest.approx([0, 0])
    assert Sharpness().score(white, [""])[0] > 3 > 0.1 > Sharpness().score(black, [""] * 2)[0]


def test_colour_counts_and_grey_does_not():
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert Colourfulness().score(red, [""])[0] > 0.2
    assert Colourfulness().score(pictures(128), [""])[0] == pytest.approx(0)
    assert Colourfulness().score(pictures(128)[..., :1], [""])[0] == 0


def test_motion_of_videos():
    still = np.stack([pictures(90)[0]] * 5)[None]
    flicker = np.stack([pictures(0)[0], pictures(255)[0]] * 2)[None]
    assert Steadiness().score(still, [""])[0] == 1
    assert Steadiness().score(flicker, [""])[0] == pytest.approx(0)
    assert Movement().score(still, [""])[0] == 0
    assert Movement().score(flicker, [""])[0] == pytest.approx(1)
    assert Steadiness().score(pictures(3), [""])[0] == 1


@pytest.mark.parametrize("name", PIXELS)
def test_scores_lie_in_their_range_and_ignore_batch_mates(name):
    samples = np.random.default_rng(0).integers(0, 256, (5, 4, 8, 8, 3)).astype(np.uint8)
    verifier = PIXELS[name]()
    together = verifier.score(samples, [""] * 5)
    low, high = verifier.range
    assert np.all((low <= together) & (together <= high))
    alone = [verifier.score(s[None], [""])[0] for s in samples]
    assert together == pytest.approx(alone)


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        Brightness().score(np.zeros((1, 8, 8, 3)), [""])
