import numpy as np
import pytest

from accel.zoo import world
from accel.zoo.world import DigitWorld


def test_sample_depends_on_split_seed_and_index_only():
    images, what = DigitWorld("train", seed=3).batch(np.arange(40))
    again, same = DigitWorld("train", seed=3).batch(np.arange(39, -1, -1))
    assert np.array_equal(images, again[::-1])
    assert np.array_equal(what.scan, same.scan[::-1])
    alone, _ = DigitWorld("train", seed=3).sample(17)
    assert np.array_equal(alone, images[17])
    for other in (DigitWorld("train", seed=4), DigitWorld("heldout", seed=3)):
        assert not np.array_equal(other.batch(np.arange(40))[0], images)


def test_world_is_pinned():
    """Shipped weights were trained on this world; moving it makes every accuracy meaningless."""
    images, what = DigitWorld("train", seed=0).batch(np.arange(4))
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == np.uint8
    assert what.captions() == [
        "a brown six on a white background",
        "a yellow five on a black background",
        "a blue seven on a black background",
        "a yellow one on a black background",
    ]


def test_splits_are_disjoint_balanced_and_complete():
    rows = {split: world.split_scans(split) for split in world.SPLITS}
    assert {k: len(v) for k, v in rows.items()} == world.SPLITS
    assert len(np.unique(np.concatenate(list(rows.values())))) == len(world.scans()[1])
    for split in rows.values():
        counts = np.bincount(world.scans()[1][split], minlength=10)
        assert counts.min() > 0.9 * counts.max()


@pytest.mark.parametrize("split", world.SPLITS)
def test_pictures_use_scans_of_their_split_and_show_their_digit(split):
    what = DigitWorld(split).attributes(np.arange(500))
    assert np.isin(what.scan, world.split_scans(split)).all()
    assert np.array_equal(world.scans()[1][what.scan], what.digit)


def test_every_attribute_occurs_about_equally_often():
    what = DigitWorld().attributes(np.arange(20_000))
    # Five standard deviations of a binomial count.
    for values, count in ((what.class_id, 100), (what.background, len(world.BACKGROUNDS))):
        share = np.bincount(values, minlength=count) / len(values)
        assert np.abs(share - 1 / count).max() < 5 * np.sqrt((1 / count) / len(values))
    textures = np.bincount(what.texture, minlength=len(world.TEXTURES)) / len(what.texture)
    assert textures[0] == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(20_000))
    assert textures.min() > 0.15


def test_class_and_background_can_be_asked_for():
    classes, grounds = np.arange(100), np.arange(100) % 5
    images, what = DigitWorld().batch(np.arange(100), class_ids=classes, backgrounds=grounds)
    assert np.array_equal(what.class_id, classes)
    assert np.array_equal(what.background, grounds)
    # The most saturated pixel is ink, the corner is background: both have the named colour.
    chroma = images.max(-1).astype(int) - images.min(-1)
    at = chroma.reshape(100, -1).argmax(1)
    ink = images.reshape(100, -1, 3)[np.arange(100), at].astype(int)
    palette = np.array(list(world.PALETTE.values()))
    named = np.abs(ink[:, None] - palette).sum(-1).argmin(1)
    assert (named == what.colour).mean() > 0.95
    corner = images[:, 0, 0].mean(-1) / 255
    levels = np.array(list(world.LEVELS.values()))
    assert np.array_equal(np.abs(corner[:, None] - levels).argmin(1), grounds)


def test_digit_contrasts_with_every_background():
    """No colour of the palette is near any grey that a background can take."""
    reach = world.LEVEL_JITTER + world.TEXTURE_AMPLITUDE
    greys = np.concatenate(
        [np.linspace(max(0, v - reach), min(1, v + reach), 9) for v in world.LEVELS.values()]
    )
    for name, colour in world.PALETTE.items():
        distance = np.linalg.norm(np.array(colour) / 255 - greys[:, None], axis=1)
        assert distance.min() > 0.3, name


def test_digit_stays_inside_the_picture():
    corners = np.array([[14.0, 14.0], [18.0, 14.0], [14.0, 18.0], [18.0, 18.0]])  # the farthest
    glyphs, size = world.scans()[0][:200], np.full(200, 27.0)
    for corner in corners:
        centre = np.tile(corner, (200, 1))
        whole = world.ink(glyphs, centre + 8, size, 48).sum((1, 2))
        seen = world.ink(glyphs, centre, size, 32).sum((1, 2))
        assert (seen / whole).min() > 0.97
        assert (seen / whole).mean() > 0.995


def test_ink_moves_with_its_centre():
    """What videos are made of: a shift of the centre is a shift of the picture."""
    glyph = world.scans()[0][:1]
    here = world.ink(glyph, np.array([[20.0, 30.0]]), np.array([24.0]), 64)
    there = world.ink(glyph, np.array([[25.0, 28.0]]), np.array([24.0]), 64)
    assert np.allclose(np.roll(here, (-2, 5), axis=(1, 2)), there, atol=1e-5)


def test_captions_follow_the_grammar():
    assert world.caption(3, 0, 1) == "a red three on a dark background"
    assert world.caption(8, 1, 4) == "an orange eight on a white background"
    moving = world.caption(7, 6, 3, motion=0)
    assert moving == "a blue seven moving left on a bright background"
    assert world.class_label(23) == "yellow three"


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'; known: train, referee, heldout"):
        DigitWorld("test")


def test_drawing_is_cheap():
    """Under 1 ms a picture, or training would wait for its data."""
    import time

    digits = DigitWorld()
    digits.batch(np.arange(8))
    start = time.perf_counter()
    digits.batch(np.arange(256))
    assert (time.perf_counter() - start) / 256 < 1e-3


def centre_of_colour(video: np.ndarray) -> np.ndarray:
    """Where the coloured ink is in each frame: (frames, 2) as x, y."""
    values = video.astype(float)
    ink = values.max(-1) - values.min(-1) > 60
    ys, xs = np.mgrid[: video.shape[1], : video.shape[2]]
    return np.array([[xs[frame].mean(), ys[frame].mean()] for frame in ink])


def test_digit_moves_the_way_it_is_asked_to_while_the_background_stands():
    motions = np.arange(8) % 4
    videos, what = DigitWorld("train", canvas=64).videos(np.arange(8), motions=motions)
    assert videos.shape == (8, 17, 64, 64, 3)
    assert videos.dtype == np.uint8
    for video, motion, text in zip(videos, motions, what.captions(), strict=True):
        path = centre_of_colour(video)
        way = np.array(world.DIRECTIONS[world.MOTIONS[motion]])
        assert 15 < (path[-1] - path[0]) @ way < 17  # 16 px, and the pixel grid
        assert abs((path[-1] - path[0]) @ way[::-1]) < 2
        steps = np.diff(path @ way)
        assert steps.min() > 0.5  # constant speed: 1.1 to 1.6 px, and the pixel grid
        assert f"moving {world.MOTIONS[motion]} on" in text
        corners = video[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.array_equal(corners, np.broadcast_to(corners[:1], corners.shape))


def test_fewer_frames_are_the_same_movement():
    five, _ = DigitWorld("heldout", canvas=64).videos(np.arange(3), frames=5)
    whole, _ = DigitWorld("heldout", canvas=64).videos(np.arange(3))
    assert np.array_equal(five, whole[:, ::4])
    middle, _ = DigitWorld("heldout", canvas=64).videos(np.arange(3), frames=1)
    assert np.array_equal(middle, whole[:, 8:9])


def test_pictures_have_no_motion_and_videos_every_one():
    assert DigitWorld().attributes(np.arange(3)).motion is None
    _, what = DigitWorld(canvas=64).videos(np.arange(2000), frames=1)
    counts = np.bincount(what.motion, minlength=4)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_plain_world_draws_the_same_digits_at_one_size_and_place():
    rows = np.arange(200)
    _, what = DigitWorld(seed=3).batch(rows)
    images, plain = DigitWorld(seed=3, plain=True).batch(rows)
    assert np.array_equal(plain.scan, what.scan)
    assert np.array_equal(plain.class_id, what.class_id)
    assert not plain.texture.any()
    # The scan's cells are 24.5 / 8 pixels wide and in the middle: a border of 3 pixels is free.
    border = np.ones((32, 32), dtype=bool)
    border[3:-3, 3:-3] = False
    edge = images[:, border].reshape(200, -1)
    assert (edge.max(axis=1) == edge.min(axis=1)).all()
    assert (images.reshape(200, -1).std(axis=1) > 0).all()
