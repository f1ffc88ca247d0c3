"""The picture of a schedule has a coloured cell for every letter."""

from __future__ import annotations

from PIL import Image

from caches.heat_map import COLOURS, RESTS, draw
from caches.schedule import Schedule


def _count(path):
    image = Image.open(path).convert("RGB")
    return {c: n for n, c in image.getcolors(1 << 20)}


def _rgb(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


INSIDE = 11 * 11  # pixels of a cell within its frame


def test_cells_have_the_colours_of_their_letters(tmp_path):
    schedule = Schedule(("t.a", "t.b"), ("CC", "RF", "CR", "RR"))
    counts = _count(draw(schedule, tmp_path / "map.png"))
    for letter, number in (("C", 3), ("R", 4), ("F", 1)):
        assert counts[_rgb(COLOURS[letter])] == (number + 1) * INSIDE  # and one in the legend
    assert _rgb(COLOURS["F"]) not in _count(
        draw(Schedule(("t.a",), ("C", "R")), tmp_path / "other.png")
    )


def test_columns_inside_a_resting_one_are_grey(tmp_path):
    schedule = Schedule(("t", "t.a"), ("CC", "RC"), (("uncond", ("CC", "CC")),))
    assert _count(draw(schedule, tmp_path / "map.png", "a title"))[_rgb(RESTS)] >= INSIDE
    plain = _count(draw(Schedule(("t", "t.a"), ("CC", "CC")), tmp_path / "plain.png"))
    assert plain.get(_rgb(RESTS), 0) < INSIDE
