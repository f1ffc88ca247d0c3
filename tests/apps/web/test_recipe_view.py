"""Which recipe a newcomer is offered first."""

from types import SimpleNamespace

import pytest

from apps.web import recipe_view
from apps.web.recipe_view import default_choice
from apps.web.site import PLAIN


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
