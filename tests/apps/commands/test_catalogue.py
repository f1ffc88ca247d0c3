"""What `accel methods` prints of a measured row."""

import json

import pytest
from typer.testing import CliRunner

import accel
import accel.methods
from accel.recipe_file import write_recipe
from apps.cli import app
from caches.native import TaylorSeer

ROW = {
    "name": "caches.native:TaylorSeer",
    "summary": "Forecasts what it skips.",
    "paper": "arXiv:2503.06923",
    "slots": ["block.skip"],
    "measured": {
        "setting": "interval 3",
        "model": "zoo:digits-dit",
        "hardware": "a processor, 2 cores",
        "speedup": {"estimate": 1.7312, "low": 1.6, "high": 1.8},
        "nfe": [100, 100],
        "psnr": {"estimate": 47.5, "low": 46.0, "high": 49.0},
    },
}


def test_a_measured_and_an_unmeasured_method(monkeypatch):
    rows = [ROW, ROW | {"name": "caches.native:MagCache", "measured": None}]
    monkeypatch.setattr(accel.methods, "index", lambda: rows)
    shown = CliRunner().invoke(app, ["methods"]).output
    assert "speedup 1.73 (1.6 to 1.8), nfe 100 -> 100, psnr 47.5 (46 to 49)" in shown
    assert "[interval 3, zoo:digits-dit, a processor, 2 cores]" in shown
    assert "not measured yet" in shown
    assert json.loads(CliRunner().invoke(app, ["methods", "--json"]).output) == rows


@pytest.mark.parametrize("name", ["TaylorSeer", "taylorseer", "caches.native:TaylorSeer"])
def test_a_method_is_explained_with_a_recipe_that_can_be_pasted(tmp_path, name):
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0, shown.output
    assert "Compute modules every ``interval`` steps" in shown.output
    assert "warmup: first steps computed in full" in shown.output
    recipe = tmp_path / "r.yaml"
    recipe.write_text(shown.output[shown.output.index("accel_recipe: 1") :])
    assert accel.read_recipe(recipe).recipe == accel.Recipe((TaylorSeer(),))


def test_what_a_method_wants_has_no_default_in_its_recipe():
    shown = CliRunner().invoke(app, ["methods", "Distilled"]).output
    assert "artifact: {path: artifacts/FILE.safetensors, sha256: ...}" in shown
    assert "steps: null  # int | None" in shown
    sparse = CliRunner().invoke(app, ["methods", "SubblockLSE"]).output
    assert "canary: every so" in sparse, "what its policies have in common"


@pytest.mark.parametrize("name", ["Nothing", "caches.native:Nothing", "os:system"])
def test_no_such_method_is_one_line(name):
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 2
    assert len(shown.output.strip().splitlines()) == 1


def test_the_figures_of_a_recipe_are_one_short_line(tmp_path):
    measured = {k: v for k, v in ROW["measured"].items() if k not in ("hardware", "setting")}
    measured |= {"environment": {"hardware": "a processor"}, "protocol": {"seeds": [0] * 500}}
    write_recipe(tmp_path / "r.yaml", accel.Recipe((TaylorSeer(),)), measured=measured)
    shown = CliRunner().invoke(app, ["recipe", "check", str(tmp_path / "r.yaml")]).output
    assert "  measured: speedup 1.73 (1.6 to 1.8), nfe 100 -> 100, psnr 47.5 (46 to 49)" in shown
    assert shown.strip().endswith("[zoo:digits-dit, a processor]")
