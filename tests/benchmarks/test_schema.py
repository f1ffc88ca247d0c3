"""Results files hold what the schema says, all of it and nothing else."""

from __future__ import annotations

import copy
import json

import pytest

from accel.metrics.protocol import Protocol
from accel.recipe_file import read_recipe
from benchmarks import results_file, schema

FILES = sorted(results_file.RESULTS.glob("*.json"))
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=[0]).as_json()
ENVIRONMENT = {
    "hardware": "a processor",
    "threads": 1,
    "versions": {"torch": "2"},
    "commit": None,
    "date": "2026-01-31",
    "load": [0.1, 1.0],
}
INTERVAL = {"estimate": 2.0, "low": 1.9, "high": 2.1}
ROW = {
    "speedup": INTERVAL,
    "flops": [4, 2],
    "nfe": [8, 8],
    "peak_bytes": [100, 120],
    "psnr": INTERVAL,
    "ssim": None,
    "judged": {
        "referee": "r",
        "accuracy": {"before": INTERVAL, "after": INTERVAL, "difference": INTERVAL},
        "feature_distance": None,
        "frechet": {"before": 1.0, "after": 1.5, "floor": 0.5},
    },
    "methods": [{"method": "caches.native:TaylorSeer", "settings": {"interval": 3}}],
    "effect": ["some"],
    "seconds": [[2.0, 2.0], [1.0, 1.0]],
    "per_sample": {"psnr": [30.0, 31.0], "right": [0.0, 1.0]},
    "protocol": PROTOCOL["sha256"],
    "environment": ENVIRONMENT,
}
STUDY = {
    "environment": ENVIRONMENT,
    "protocol": PROTOCOL,
    "model": "m",
    "steps": 50,
    "guidance": 3.0,
    "batch": 2,
    "samples": 4,
    "rows": {"alone": ROW},
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_results_file_is_valid(file):
    device = file.stem.rpartition("_")[2]
    name = file.stem.removesuffix(f"_{device}") if device in results_file.DEVICES else file.stem
    assert schema.checked(name, file.read_text("utf-8"))


RECIPES = sorted((results_file.RESULTS.parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.name)
def test_every_shipped_recipe_carries_its_measured_effect(file):
    measured = read_recipe(file).measured
    assert schema.checked("recipe", json.dumps(measured)) == measured


def test_there_are_results():
    assert {"native.json", "overhead.json", "kill.json"} <= {f.name for f in FILES}


def test_the_example_is_valid_and_comes_back_as_written():
    text = json.dumps(STUDY)
    assert schema.checked("native", text) == STUDY


def _changed(*path, value):
    content = copy.deepcopy(STUDY)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unknown",), 1, "Extra inputs"),
        (("rows", "alone", "speed"), 1, "Extra inputs"),
        (("steps",), "50", "valid integer"),
        (("rows", "alone", "flops"), [1], "at least 2"),
        (("rows", "alone", "speedup"), {"estimate": 1.0, "low": 2.0, "high": 1.0}, "interval"),
        (("rows", "alone", "protocol"), "0" * 64, "another protocol"),
        (("rows", "alone", "environment"), {**ENVIRONMENT, "hardware": "x"}, "one machine"),
        (("rows", "alone", "environment"), {**ENVIRONMENT, "threads": 2}, "one machine"),
        (("protocol",), {**PROTOCOL, "samples": 5}, "edited"),
        (("environment", "date"), "yesterday", "isoformat"),
        (("rows", "alone", "psnr"), {"estimate": float("nan"), "low": 0, "high": 0}, "finite"),
    ],
)
def test_what_is_wrong_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        schema.checked("native", _changed(*path, value=value))


def test_a_waterfall_says_what_each_bar_adds():
    bar = {**ROW, "over_previous": INTERVAL}
    assert schema.checked("waterfall", json.dumps({**STUDY, "rows": {"a": bar}}))
    with pytest.raises(ValueError, match="over_previous"):
        schema.checked("waterfall", json.dumps(STUDY))


def test_files_of_the_zoo_have_the_envelope_and_their_own_content():
    own = {"environment": ENVIRONMENT, "protocol": PROTOCOL, "anything": [1]}
    assert schema.checked("zoo_digits-x", json.dumps(own)) == own
    with pytest.raises(ValueError, match="environment"):
        schema.checked("zoo_digits-x", json.dumps({"anything": 1}))


def test_kills_must_add_up():
    kill = {
        "environment": ENVIRONMENT,
        "protocol": None,
        "what": "w",
        "tried": 2,
        "survived": 3,
        "renders": 1,
        "jobs_per_render": 1,
        "workers": [1],
        "last_event_before_kill": {"step": 2},
        "problems": [],
    }
    with pytest.raises(ValueError, match="3 of 2"):
        schema.checked("kill", json.dumps(kill))
    assert schema.checked("kill", json.dumps({**kill, "survived": 2}))


@pytest.mark.parametrize("kind", schema.KINDS)
def test_every_kind_has_a_json_schema(kind):
    made = schema.json_schema(kind)
    assert "environment" in made["required"]
    assert json.loads(json.dumps(made)) == made


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no kind of results"):
        schema.checked("nothing", "{}")
