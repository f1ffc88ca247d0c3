"""Searches of the page, with a device that works in place: every algorithm, what is picked."""

import pytest

from apps.web.checks import Checks
from apps.web.method_settings import about, edited, fields
from apps.web.search_tab import gallery, shown, view
from apps.web.searches import MAX_RENDERS, Searches, algorithms
from apps.web.site import Refused, Site

MODEL = "zoo:digits-sd"
INPUTS = {"prompt": "a red three on a dark background", "num_inference_steps": 8,
          "guidance_scale": 2.0}  # fmt: skip
# what is small enough for a test, where the algorithm's own settings are not
SMALL = {
    "draft-commit": {"candidates": 2},
    "paths": {"survivors": 1, "copies": 2, "start": 0.4, "up": 0.3, "down": 0.5},
    "particles": {"particles": 2, "rounds": 1},
    "evolution": {"at": [0.0, 0.5], "populations": [2, 2, 2]},
    "rollover": {"starts": 2, "quota": 1},
    "gradient": {"starts": 1, "iterations": 1},
    "correctors": {"particles": 2, "rounds": 1},
}
ALGORITHMS = {one.name: one for one in algorithms()}


@pytest.fixture(scope="module")
def device(inline):
    return inline()


@pytest.fixture(scope="module")
def searches(device, tmp_path_factory):
    from pathlib import Path

    site = Site(tmp_path_factory.mktemp("out"), (MODEL,), (Path("recipes").resolve(),))
    return Searches(site, device)


def hunt(searches, name, renders=3, recipe=None, verifier="brightness"):
    asked = {"algorithm": name, "settings": SMALL.get(name, {}), "verifier": verifier,
             "renders": renders}  # fmt: skip
    return searches.start(MODEL, recipe, {"seed": 3, "inputs": INPUTS}, asked)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_searches_and_any_candidate_is_rendered(searches, name):
    student = searches._site.recipe("digits-sd-4-steps")
    found = hunt(searches, name, recipe=student if ALGORITHMS[name].drafts else None)
    assert found.state == "done", found.error
    assert found.share > 0
    kinds = {c["purpose"] for c in found.candidates}
    assert ("draft" in kinds) == ALGORITHMS[name].drafts
    assert found.winner.content["search"]["search"].endswith(type(ALGORITHMS[name].search).__name__)
    one = found.candidates[0]
    searches.pick(found, one["index"])
    assert found.error is None
    picked = found.picked[one["index"]]
    if ALGORITHMS[name].drafts:
        steps = picked.content["report"]["runs"][-1]["steps"]
        assert steps == INPUTS["num_inference_steps"], "rendered as its drafts are"
    page = view(found)
    assert "Winner" in page
    assert "Candidate 0, rendered" in page
    assert f"{len(found.candidates)} candidates" in gallery(found)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_is_a_field_and_comes_back(name):
    one = ALGORITHMS[name]
    shown = fields(one.search)
    assert edited(one.search, {f.name: f.value for f in shown}) == one.search
    assert about(one.search)[-1].startswith("Source: ")
    assert len(one.words) > 20
    small = edited(one.search, {k: str(v) if isinstance(v, list) else v
                                for k, v in SMALL.get(name, {}).items()})  # fmt: skip
    assert (small != one.search) == (name in SMALL)


def test_a_wrong_setting_of_several_is_a_sentence():
    with pytest.raises(ValueError, match=r"^Evolution wants other settings: populations of at"):
        edited(ALGORITHMS["evolution"].search, {"elites": 9})


def test_the_best_is_of_what_is_nearest_to_the_winner_and_always_shown(searches):
    found = hunt(searches, "random", renders=2)
    kinds = ["draft", "render", *["preview"] * 200]
    found.candidates = [
        {"index": i, "purpose": kind, "score": score, "path": [], "png": None}
        for i, (kind, score) in enumerate(zip(kinds, [5.0, 1.0, *[9.0] * 200], strict=True))
    ]
    assert found.best()["index"] == 1
    assert [c["index"] for c in shown(found)][:2] == [1, 155]
    assert "202 candidates: 1 render, 1 draft, 200 previews; the newest 48" in gallery(found)


def test_reasons_are_sentences(tiny_model):
    every = [one.search for one in ALGORITHMS.values()]
    checks = Checks()
    call = {"class_labels": [1], "num_inference_steps": 4}
    found = dict(zip(ALGORITHMS, checks.searches(tiny_model, call, every, "sharpness", None),
                     strict=True))  # fmt: skip
    assert [found.pop(name) for name in ("random", "draft-commit")] == [None, None]
    assert all(why.startswith("DiTPipeline shows no first noise") for why in found.values())
    assert all(why.endswith(".") for why in found.values())
    wrong = checks.searches(tiny_model, call, every, "clip:/etc", None)
    assert all(why is not None for why in wrong)


def test_what_cannot_be_asked_for_is_refused(searches):
    for renders in (1, 2.5, None, MAX_RENDERS + 1, True):
        with pytest.raises(Refused, match="whole number of renders"):
            hunt(searches, "random", renders=renders)
    for verifier in ("clip:/etc", "worker:touch /tmp/x", None):
        with pytest.raises(Refused, match="no such measure"):
            hunt(searches, "random", verifier=verifier)
    with pytest.raises(Refused, match="no algorithm 'magic'"):
        hunt(searches, "magic")
    with pytest.raises(Refused, match="Choose one of the candidates"):
        searches.pick(hunt(searches, "random", renders=2), 99)


def test_the_best_is_rendered_if_none_is_picked(searches):
    found = hunt(searches, "random", renders=3)
    searches.pick(found, None)
    assert found.error is None
    assert list(found.picked) == [found.best()["index"]]
    found.candidates = []
    with pytest.raises(Refused, match="Choose one of the candidates"):
        searches.pick(found, None)
