"""A trial is the renderer's work, told as it goes; with a device that works at once, in place."""

import pytest

from apps.web.batches import Batches
from apps.web.site import Refused, Site
from apps.web.trial_view import view, work_share
from apps.web.trials import Trials

RECIPE = """accel_recipe: 1
name: cached
methods:
- method: caches.interval:IntervalCache
  settings: {interval: 2}
"""
JOB = {"seed": 3, "inputs": {"class_labels": [1], "num_inference_steps": 4}}


@pytest.fixture
def site(tmp_path, tiny_model):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "cached.yaml").write_text(RECIPE)
    return Site(tmp_path / "out", (tiny_model,), (tmp_path / "recipes",))


def test_both_sides_are_rendered_watched_and_compared(site, tiny_model, inline):
    device = inline()
    trial = Trials(site, device).start(tiny_model, site.recipe("cached"), JOB)
    assert trial.finished
    assert [w.warm_up for w in device.ran] == [True, True, False, False]
    assert [w.payload["recipe"] is None for w in device.ran] == [True, False, True, False]
    assert [len(side.rows) for side in trial.sides] == [4, 4]
    assert 0 < work_share(trial) < 1
    assert trial.pair.baseline.content["payload"]["recipe"] is None
    assert trial.pair.psnr is not None
    page = view(trial)
    for words in ("Baseline", "Accelerated", "Difference", "Speed", "Map of what was computed"):
        assert words in page


def test_a_kept_baseline_is_not_rendered_again_and_shows_no_speed(site, tiny_model, inline):
    device = inline()
    trials = Trials(site, device)
    trials.start(tiny_model, None, JOB)
    device.ran.clear()
    trial = trials.start(tiny_model, site.recipe("cached"), JOB, keep=True)
    assert [w.warm_up for w in device.ran] == [True, True, False]
    assert trial.sides[0].state == "kept"
    assert work_share(trial) < 1, "what ran is remembered with the file"
    assert "Speed" not in view(trial)


def test_what_cannot_be_rendered_is_said(site, tiny_model, inline):
    trials = Trials(site, inline())
    bad = {"seed": 1, "inputs": {"class_labels": [1], "nothing": 2}}
    trial = trials.start(tiny_model, None, bad)
    assert trial.over
    assert "takes no argument 'nothing'" in trial.error
    assert "takes no argument" in view(trial)
    with pytest.raises(Refused, match="cannot be given here"):
        trials.start(tiny_model, None, {"inputs": {"output_type": "pt"}})


def test_words_of_a_job_are_no_markup(site, tiny_model, inline):
    trial = Trials(site, inline()).start(tiny_model, None, JOB | {"name": "a&b <i>"[:3]})
    trial.error = "<script>alert(1)</script>"
    page = view(trial)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_what_is_to_be_known_of_a_render_stands_above_it(site, tiny_model, inline):
    trial = Trials(site, inline()).start(tiny_model, site.recipe("cached"), JOB)
    content = trial.sides[1].rendered.content
    content["notes"] = ["NoEffectWarning: a.b:C changed nothing in this run"]
    content["fallback"] = {"reason": "black frames"}
    page = view(trial)
    assert page.index("Accelerated: a.b:C changed nothing") < page.index("<img")
    assert "Accelerated: the recipe gave black frames, so this was rendered without it." in page


def test_a_batch_name_is_no_path(site, tiny_model, inline):
    batches = Batches(site, inline())
    line = b'{"inputs": {"class_labels": [1]}}'
    for name in ("../x", "a/b", ".hidden", "con"):
        with pytest.raises(Refused, match="The name"):
            batches.create(name, line, tiny_model, "none")
    assert batches.names() == []
