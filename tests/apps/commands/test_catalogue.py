"""What `accel methods` prints of a measured row."""

import json

from typer.testing import CliRunner

import accel.methods
from apps.cli import app

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
