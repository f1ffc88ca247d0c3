import json

import numpy as np
import pytest

from accel import zoo
from accel.zoo.world import DigitWorld
from benchmarks import bench_zoo, results_file


def test_card_is_what_the_results_say():
    """No figure is typed by hand: write it again with `python -m benchmarks.bench_zoo --card`."""
    results = results_file.read(bench_zoo.RESULT)
    assert (zoo.path(bench_zoo.NAME) / "README.md").read_text() == bench_zoo.card(results)


def test_results_are_of_the_shipped_weights():
    results = results_file.read(bench_zoo.RESULT)
    shipped = json.loads((zoo.path(bench_zoo.NAME) / "training.json").read_text())
    assert results["training"] == shipped


def test_nearest_finds_the_picture_itself_whatever_its_background():
    pool, _ = DigitWorld("train", seed=1).batch(np.arange(5), class_ids=np.full(5, 37))
    found, distance = bench_zoo.nearest(pool, np.full(5, 37), count=2)
    assert np.array_equal(found[:, 0], pool)
    assert distance[:, 0] == pytest.approx(0, abs=1e-6)
    assert (distance[:, 1] > 0.01).all()


def test_grid_keeps_reading_order():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    joined = bench_zoo.grid(images, columns=3)
    assert joined.shape == (12, 18, 3)
    assert [joined[3 + 6 * r, 3 + 6 * c, 0] for r in range(2) for c in range(3)] == [*range(6)]
