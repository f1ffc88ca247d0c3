"""The waterfall's picture: of its results, the same every time, with the numbers on it."""

from __future__ import annotations

import copy
import json

import pytest
from PIL import Image

from benchmarks import waterfall_picture

INTERVAL = {"estimate": 2.0, "low": 1.9, "high": 2.1}
SHARE = {"estimate": 0.95, "low": 0.9, "high": 0.98}
BAR = {
    "speedup": INTERVAL,
    "psnr": INTERVAL,
    "over_previous": INTERVAL,
    "judged": {
        "referee": "r",
        "accuracy": {"before": SHARE, "after": SHARE, "difference": SHARE},
        "frechet": {"before": 1.0, "after": 1.5, "floor": 0.5},
    },
}
RESULT = {
    "environment": {
        "hardware": "a processor",
        "threads": 1,
        "versions": {"torch": "2", "diffusers": "0.42"},
        "commit": "abc",
        "date": "2026-01-31",
    },
    "model": "m",
    "steps": 50,
    "batch": 2,
    "samples": 4,
    "rows": {"one": BAR, "control: two": {**BAR, "over_previous": None}},
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "waterfall.json"
    path.write_text(json.dumps(RESULT))
    return path


def test_the_picture_knows_its_results(source, tmp_path):
    picture = tmp_path / "w.png"
    assert not waterfall_picture.drawn_from(picture, source)
    waterfall_picture.draw(source, picture)
    assert waterfall_picture.drawn_from(picture, source)
    with Image.open(picture) as image:
        assert image.width <= 1000, "README shows no more"
    first = picture.read_bytes()
    waterfall_picture.draw(source, picture)
    assert picture.read_bytes() == first
    source.write_text(json.dumps({**RESULT, "samples": 5}))
    assert not waterfall_picture.drawn_from(picture, source)


def test_without_a_referee_it_is_drawn_too(source, tmp_path):
    content = copy.deepcopy(RESULT)
    for row in content["rows"].values():
        row["judged"] = None
    source.write_text(json.dumps(content))
    waterfall_picture.draw(source, tmp_path / "w.png")
    assert waterfall_picture.drawn_from(tmp_path / "w.png", source)


def test_the_caption_names_hardware_commit_and_floor():
    text = waterfall_picture.caption(RESULT)
    for part in ("a processor", "1 thread(s)", "commit abc", "2026-01-31", "4 samples", "0.5"):
        assert part in text
