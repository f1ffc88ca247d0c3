"""Renewing the measured block of a recipe leaves the rest of the file alone."""

from __future__ import annotations

import pytest
import yaml

from apps.recipe_text import store_measured, with_measured

HEAD = """# why this recipe is there
accel_recipe: 1
name: fast   # short
methods:
- method: samplers.swap:SwapScheduler
  settings: {scheduler: DDIMScheduler}   # as the model has it
"""
NEW = {"speedup": {"estimate": 2.0}, "samples": 3}


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "measured: null\n",
        "measured: null  # not yet",
        "measured:\n  speedup:\n    estimate: 1.0\n\n  samples: 2\n",
        "measured: {speedup: {estimate: 1.0}}\n",
    ],
)
def test_everything_before_stays_byte_for_byte(tail):
    text = with_measured(HEAD + tail, NEW)
    assert text.startswith(HEAD)
    assert yaml.safe_load(text) == {**yaml.safe_load(HEAD), "measured": NEW}
    assert with_measured(text, NEW) == text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_and_line_ends_stay(tmp_path, newline):
    before, after = HEAD, "\n\ndescription: x\n"
    path = tmp_path / "recipe.yaml"
    text = before + "measured:\n  speedup: 1.0\n\n  samples: 2\n" + after
    path.write_bytes(text.replace("\n", newline).encode())
    store_measured(path, NEW)
    stored = path.read_bytes().decode()
    assert stored.startswith(before.replace("\n", newline))
    assert stored.endswith("samples: 3\n".replace("\n", newline) + after.replace("\n", newline))
    assert stored.count("\n") == stored.count(newline), "one kind of line end"


def test_what_follows_stays_too():
    text = with_measured("measured:\n  samples: 2\n# end\n" + HEAD, NEW)
    assert text.endswith("# end\n" + HEAD)


@pytest.mark.parametrize(
    "text",
    [
        '{"accel_recipe": 1, "name": "a", "methods": [], "measured": null}',
        "measured: {a: 1,\nb: 2}",
    ],
)
def test_a_file_that_is_not_in_lines_is_refused_and_left(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="in place"):
        store_measured(path, NEW)
    assert path.read_text() == text


def test_store_is_atomic_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD)
    store_measured(path, NEW)
    assert yaml.safe_load(path.read_text())["measured"] == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
