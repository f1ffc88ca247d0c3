"""README's figures and the method index come from results, and are up to date."""

from __future__ import annotations

import json

import pytest

from accel.methods import INDEX_FILE
from benchmarks import results_file, tables
from caches.native import TaylorSeer


def test_everything_generated_is_up_to_date():
    for path, content in tables.outputs().items():
        assert path.read_text("utf-8") == content, f"{path}: run python -m benchmarks.tables"


def test_a_figure_typed_by_hand_is_overwritten():
    text = "a\n<!-- generated: kills -->\n999 of 999\n<!-- end -->\nb\n"
    made = tables.render_readme(text)
    assert "999" not in made
    assert made.startswith("a\n<!-- generated: kills -->\n")
    assert made.endswith("\n<!-- end -->\nb\n")
    with pytest.raises(KeyError):
        tables.render_readme("<!-- generated: nothing -->\n<!-- end -->")


def test_a_method_without_a_measured_row_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    assert tables.index_rows("caches") == []
    interval = {"estimate": 2.0, "low": 1.9, "high": 2.1}
    figures = {"speedup": interval, "flops": [4, 2], "nfe": [8, 8], "psnr": interval, "ssim": None}
    rows = {
        "both": {"methods": [TaylorSeer().to_json()] * 2, **figures},
        "control: x": {"methods": [TaylorSeer().to_json()], **figures},
    }
    common = {"model": "m", "hardware": "h", "threads": 1}
    (tmp_path / "native.json").write_text(json.dumps({**common, "rows": rows}))
    assert tables.index_rows("caches") == [], "combinations and controls are not rows of a method"
    rows["alone"] = {"methods": [TaylorSeer().to_json()], **figures}
    (tmp_path / "native.json").write_text(json.dumps({**common, "rows": rows}))
    (row,) = tables.index_rows("caches")
    assert row["name"] == "caches.native:TaylorSeer"
    assert row["measured"]["setting"] == "alone"
    assert row["fields"] == ["interval", "warmup", "max_order", "modules"]
    assert tables.ROOT.joinpath("caches", INDEX_FILE).is_file()
