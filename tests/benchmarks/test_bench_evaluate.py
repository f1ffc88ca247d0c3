"""What the evaluation's own study keeps and refuses."""

from __future__ import annotations

import sys

import pytest

from benchmarks import bench_evaluate


def test_without_the_official_code_its_figure_stays(monkeypatch):
    rows = [{"of": "prdc", "ours": 1.0}, {"of": "vbench 0.1.5", "ours": 2.0}]
    monkeypatch.setattr(bench_evaluate, "read", lambda name: {"agreement": rows})
    assert bench_evaluate._kept_vbench() == rows[1:]
    monkeypatch.setattr(bench_evaluate, "read", lambda name: None)
    assert bench_evaluate._kept_vbench() == []


@pytest.mark.parametrize("given", [["--vbench", "python"], ["--videos", "folder"]])
def test_the_official_code_wants_videos(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_evaluate", *given])
    with pytest.raises(SystemExit):
        bench_evaluate.main()
    assert "go together" in capsys.readouterr().err
