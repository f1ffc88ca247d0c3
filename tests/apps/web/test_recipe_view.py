"""Which recipe a newcomer is offered first."""

from types import SimpleNamespace

import pytest

from apps.web import recipe_view
from apps.web.recipe_view import default_choice
from apps.web.site import PLAIN

RECIPE = "accel_recipe: 1\nmethods: [{method: 'caches.native:FirstBlockCache'}]\nmeasured: "
FIGURE = "{estimate: 2.0, low: 1.0, high: 3.0}"


@pytest.mark.parametrize(
    ("figures", "first"),
    [
        ([("one-step", 14.0, 15.0), ("cache", 4.0, 40.0), ("dpm", 2.0, 45.0)], "cache"),
        ([("one-step", 14.0, 15.0), ("no-faster", 1.04, 40.0)], "one-step"),
        ([("one-step", 14.0, 15.0), ("unmeasured", None, None)], "one-step"),
        ([], PLAIN),
    ],
)
def test_the_first_is_fast_and_faithful_if_one_is(monkeypatch, figures, first):
    known = {
        name: speed and {"speedup": {"estimate": speed}, "psnr": {"estimate": psnr}}
        for name, speed, psnr in figures
    }
    monkeypatch.setattr(recipe_view, "read", lambda name: name)
    monkeypatch.setattr(recipe_view, "measured_on", lambda name, model: known[name])
    app = SimpleNamespace(site=SimpleNamespace(recipe=lambda name: name))
    fit = [("nothing", PLAIN), *((name, name) for name in known)]
    assert default_choice(app, "zoo:a", fit) == first


@pytest.mark.parametrize(
    "measured",
    [
        "{model: 'zoo:digits-dit'}",
        f"{{speedup: {FIGURE}, psnr: [1, 2]}}",
        f"{{speedup: {FIGURE}, psnr: {FIGURE}, flops: [0, 1]}}",
        f"{{speedup: {FIGURE}, psnr: {FIGURE}, environment: 3}}",
    ],
)
def test_figures_of_another_shape_are_refused_not_shown(tmp_path, measured):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + f"{{speedup: {FIGURE}, psnr: {FIGURE}}}")
    assert recipe_view.read(path).measured
    path.write_text(RECIPE + measured)
    with pytest.raises(ValueError, match="'measured' block"):
        recipe_view.read(path)
