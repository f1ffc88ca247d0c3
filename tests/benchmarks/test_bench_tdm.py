"""What the study of students measures and keeps."""

from __future__ import annotations

import argparse
import sys

from accel.method import Recipe
from accel.metrics.protocol import Protocol
from benchmarks import bench_tdm
from benchmarks.digits_study import WAN, records
from caches.interval import IntervalCache

HERE = {"hardware": "h", "threads": 1, "versions": {}}
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=[0])


def _run(monkeypatch, there, planned):
    """The study with made-up figures on rows that are there; names measured, rows written."""
    compared, files = [], []

    def compare(recipe, rounds):
        compared.append(next(name for name, one in planned.items() if one is recipe))

    bench = argparse.Namespace(protocol=lambda: PROTOCOL, compare=compare)
    old = {"protocol": PROTOCOL.as_json(), "environment": HERE, "rows": there}
    monkeypatch.setattr(bench_tdm, "rows", lambda model: planned)
    monkeypatch.setattr(bench_tdm, "study", lambda *given, **more: bench)
    monkeypatch.setattr(bench_tdm, "environment", lambda *given: HERE)
    monkeypatch.setattr(bench_tdm, "head", lambda *given: {})
    monkeypatch.setattr(bench_tdm, "row", lambda recipe, *given: _row(recipe))
    monkeypatch.setattr(bench_tdm, "read", lambda *given: old)
    monkeypatch.setattr(bench_tdm, "write", lambda *given: files.append(given[-1]["rows"]))
    monkeypatch.setattr(sys, "argv", ["bench_tdm", "--model", WAN])
    bench_tdm.main()
    return compared, files[-1] if files else there


def _row(recipe):
    return {"methods": records(recipe), "speedup": 1, "judged": None}


def test_another_student_of_the_same_name_is_measured_again(monkeypatch):
    before, now = (Recipe((IntervalCache(i),)) for i in (3, 4))
    name = "digits-wan-4-steps"
    compared, rows = _run(monkeypatch, {name: _row(before)}, {name: now})
    assert compared == [name]
    assert _run(monkeypatch, rows, {name: now}) == ([], rows)


def test_rows_of_students_that_were_trained_elsewhere_stay(monkeypatch):
    trained = ("digits-wan-4-steps", bench_tdm.AFTERWARDS)
    there = dict.fromkeys(trained, _row(Recipe((IntervalCache(),))))
    control = "control: teacher, UniPC 4"
    _, rows = _run(monkeypatch, there, {control: Recipe((IntervalCache(),))})
    assert list(rows) == [*trained, control]
