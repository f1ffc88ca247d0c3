"""Wrong outputs are caught, and ordinary ones are not."""

import numpy as np
import pytest

from apps.render.sentinels import suspicion

NOISE = np.random.default_rng(0).random((2, 5, 8, 8, 3), dtype=np.float32)


def test_ordinary_frames_pass():
    assert suspicion(NOISE) is None
    assert suspicion(NOISE[:, 0]) is None
    assert suspicion(np.ones((1, 8, 8, 3), np.float32)) is None, "white is a picture"
    assert suspicion(NOISE[:, :1]) is None, "one frame cannot move"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    frames = NOISE.copy()
    frames[1, 2, 3, 4, 0] = bad
    assert suspicion(frames) == "nan"


def test_black_at_the_threshold():
    assert suspicion(np.full((1, 8, 8, 3), 1.9 / 255, np.float32)) == "black"
    assert suspicion(np.full((1, 8, 8, 3), 2.1 / 255, np.float32)) is None
    one_of_two = NOISE[:, 0].copy()
    one_of_two[1] = 0
    assert suspicion(one_of_two) == "black"


def test_frozen_at_the_threshold():
    still = np.repeat(NOISE[:, :1], 5, axis=1)
    assert suspicion(still) == "frozen"
    still[:, 4, 0, 0, 0] += 1.1 / 255
    assert suspicion(still) is None
