"""What makes two jobs the same job, and two models the same model."""

import shutil

import pytest

from apps.render.environment import versions
from apps.render.identity import identity, model_folder, model_revision


def test_revision_follows_content(tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert model_revision(str(folder)) == model_revision(tiny_model)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    assert model_revision(str(folder)) != model_revision(tiny_model)


def test_a_card_is_no_part_of_a_model(tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("figures of it")
    (folder / "samples.png").write_bytes(b"pictures of it")
    assert model_revision(str(folder)) == model_revision(tiny_model)
    (folder / "scheduler" / "notes.md").write_text("not at the card's place")
    assert model_revision(str(folder)) != model_revision(tiny_model)


def test_a_recipe_and_what_it_refers_to_is_no_part_of_a_model(tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "accel_recipe.yaml").write_text("measured: null")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "table.safetensors").write_bytes(b"of the recipe")
    assert model_revision(str(folder)) == model_revision(tiny_model)
    (folder / "accel_recipe.yaml").unlink()
    assert model_revision(str(folder)) != model_revision(tiny_model), "whose are they?"


def test_identity_is_in_every_part_that_decides_pixels():
    payload = {
        "job": {"seed": 1}, "model_revision": "m", "recipe_sha256": None, "threads": 1,
        "dtype": "float32", "device": "cpu", "model": "here", "recipe": None, "metadata": True,
    }  # fmt: skip
    base = identity(payload)
    for key in ("model_revision", "recipe_sha256", "threads", "dtype", "device", "job"):
        assert identity(payload | {key: "other"}) != base, key
    for key in ("model", "recipe", "metadata"):
        assert identity(payload | {key: "other"}) == base, f"{key} decides no pixel"


def test_hub_ids_are_told_from_missing_folders():
    assert model_folder("someone/some-model") is None
    for wrong in ("no-slash", "a/b/c", "../up", "/no/where", "http://x/y"):
        with pytest.raises(ValueError, match="is no folder, no zoo:NAME and no hub id"):
            model_folder(wrong)


def test_a_hub_model_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the hub says") as caught:
        model_revision("someone/some-model-that-is-not-there")
    assert "\n" not in str(caught.value)


def test_versions_name_what_decides_pixels():
    assert {"torch", "diffusers", "python"} <= set(versions())
