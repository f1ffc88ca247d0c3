"""Recipe files: round trip, artifacts, and everything a hostile or careless one may hold."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import accel
from accel.artifact import Artifact, Fingerprint
from accel.method import Recipe
from accel.recipe_file import read_recipe, write_recipe
from accel.settings import Settings
from accel.testing import tiny
from caches.native import FirstBlockCache, MagCache, TaylorSeer
from samplers.swap import SwapScheduler

RECIPE = Recipe(
    (
        SwapScheduler("DPMSolverMultistepScheduler", Settings(use_karras_sigmas=True)),
        TaylorSeer(interval=4, modules="attention"),
    )
)


def test_round_trip(tmp_path):
    measured = {"speedup": 1.5, "hardware": "cpu"}
    written = write_recipe(tmp_path / "fast.yaml", RECIPE, description="d", measured=measured)
    read = read_recipe(tmp_path / "fast.yaml")
    assert read.recipe == RECIPE
    assert (read.name, read.description, read.measured) == ("fast", "d", measured)
    assert read.sha256 == written.sha256 == RECIPE.digest()


@given(threshold=st.floats(0, 1e6), retention=st.floats(0, 1))
def test_numbers_survive(tmp_path_factory, threshold, retention):
    recipe = Recipe(
        (FirstBlockCache(threshold), MagCache(retention=retention, ratios=(threshold,)))
    )
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    write_recipe(path, recipe)
    assert read_recipe(path).recipe == recipe


@pytest.fixture
def artifact_ref(tmp_path):
    fingerprint = Fingerprint.of(tiny("dit").pipe.transformer)
    artifact = Artifact(MagCache.name(), fingerprint, {"ratios": torch.ones(4)})
    return artifact.save(tmp_path / "elsewhere" / "mag.safetensors")


def test_artifacts_travel_with_the_recipe(tmp_path, artifact_ref):
    recipe = Recipe((MagCache(artifact=artifact_ref),))
    write_recipe(tmp_path / "one" / "r.yaml", recipe)
    (tmp_path / "one").rename(tmp_path / "two")
    read = read_recipe(tmp_path / "two" / "r.yaml")
    assert read.sha256 == recipe.digest()
    read.recipe.attach(tiny("dit").pipe).detach()


def test_changed_or_missing_artifacts(tmp_path, artifact_ref):
    write_recipe(tmp_path / "r.yaml", Recipe((MagCache(artifact=artifact_ref),)))
    (stored,) = (tmp_path / "artifacts").iterdir()
    stored.write_bytes(stored.read_bytes() + b"x")
    changed = read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="SHA-256"):
        changed.recipe.attach(tiny("dit").pipe)
    with pytest.raises(ValueError, match="has changed"):
        write_recipe(tmp_path / "again.yaml", changed.recipe)
    stored.unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_recipe(tmp_path / "r.yaml")


GOOD = "accel_recipe: 1\nmethods:\n  - method: caches.native:FirstBlockCache\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no 'accel_recipe' key"),
        ("[1, 2]", "no 'accel_recipe' key"),
        ("accel_recipe: 2\nmethods: []", "format 2"),
        (GOOD + "metods: 1", "unknown key 'metods'"),
        ("accel_recipe: 1\nmethods: 3", "must be a list"),
        (GOOD + "    setings: {}", "nothing else"),
        (GOOD + "    settings: 4", "must be a mapping"),
        (GOOD + "    settings: {threshold: high}", r"methods\[0\].*threshold"),
        (GOOD + "    settings: {threshold: .nan}", "threshold"),
        (GOOD + "    settings: {treshold: 1.0}", "no setting 'treshold'"),
        (GOOD + "    settings: {threshold: 1.0, threshold: 2.0}", "there twice"),
        (GOOD + "measured: 3", "'measured'"),
        (GOOD + "measured: {day: 2020-01-01}", "what JSON cannot say.*date"),
        (GOOD + "measured: {speedup: .nan}", "what JSON cannot say"),
        (GOOD + "name: '\\ud800'".replace("'", '"'), "what JSON cannot say"),
        (GOOD + "name: [x]", "'name'"),
        ("accel_recipe: 1\nmethods: [{method: 'os:System'}]", "not a method name"),
        ("accel_recipe: 1\nmethods: [{method: 'os.path:Join'}]", "'os' is not registered"),
        ("accel_recipe: 1\nmethods: [{method: 'caches._x:Y'}]", "not a method name"),
        ("accel_recipe: 1\nmethods: [{method: 'caches.nowhere:Y'}]", "no module"),
        ("accel_recipe: 1\nmethods: [{method: 'caches.native:Nothing'}]", "no method 'Nothing'"),
        ("accel_recipe: 1\nmethods: [{method: 'caches.native:Artifact'}]", "no method 'Artifact'"),
        ("accel_recipe: 1\nmethods: [{method: 3}]", "not a method name"),
        ("accel_recipe: 1\nmethods: [!!python/object/apply:os.system ['true']]", "not a readable"),
        ("accel_recipe: &a [1]\nmethods: [*a, *a]", "aliases .* are not allowed"),
        ("accel_recipe: 1\n3: x\nmethods: []", "key 3 is no text"),
        ("\t:\n- ]", "not a readable"),
        ("[" * 5000, "not a readable"),
        ("\ud800", "not a readable"),
        ("accel_recipe: 1\nmethods: []\n#" + "x" * (1 << 20), "too large"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=words) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_many_keys_are_read_in_time_that_grows_with_their_number(tmp_path):
    path, count = tmp_path / "r.yaml", 20_000
    path.write_text(GOOD + "measured:\n" + "".join(f"  k{i}: 1\n" for i in range(count)))
    started = time.process_time()
    found = read_recipe(path)
    assert found.measured is not None
    assert len(found.measured) == count
    # 1 s is YAML's own; comparing each key with each other took 12 s here.
    assert time.process_time() - started < 8


@pytest.mark.parametrize("path", ["../up.safetensors", "/etc/passwd", "a/../../b"])
def test_artifacts_lie_beside_the_recipe(tmp_path, path):
    text = (
        "accel_recipe: 1\nmethods:\n  - method: caches.native:MagCache\n"
        f"    settings: {{artifact: {{path: '{path}', sha256: '00'}}}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match="must lie beside the recipe"):
        read_recipe(tmp_path / "r.yaml")


def test_no_more_of_a_file_is_read_than_a_recipe_may_have(tmp_path, monkeypatch):
    hostile = tmp_path / "large.yaml"
    with hostile.open("wb") as file:
        file.truncate(1 << 30)  # takes no room, until it is read
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("all of it was read"))
    with pytest.raises(ValueError, match="too large for a recipe"):
        read_recipe(hostile)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        read_recipe(tmp_path / "none.yaml")


def test_public_names_resolve_lazily():
    assert accel.read_recipe is read_recipe
    assert set(accel.__all__) <= {name for name in accel.__all__ if hasattr(accel, name)}
    with pytest.raises(AttributeError, match="nothing"):
        _ = accel.nothing
