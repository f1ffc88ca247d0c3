"""What runs of the studies measure and keep; their inputs."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from accel.method import Recipe
from accel.metrics.protocol import Protocol
from benchmarks import bench_backend, bench_caches, bench_native, digits_study
from benchmarks.digits_study import records
from caches.interval import IntervalCache
from sparse_attn.backend import AttentionBackend

ENVIRONMENT = {"hardware": "h", "threads": 1, "versions": {}}


class _Study:
    """As much of a study as a loop over rows asks for."""

    pipe, inputs = None, [{}]

    def protocol(self):
        return Protocol(model="m", inputs="i", samples=4, seeds=[0])


def _figures(bench, planned, rounds, *folders):
    return {"methods": records(planned), "speedup": 1, "psnr": 1, "judged": None, "new": True}


def _plans(*given):
    return {name: Recipe((IntervalCache(i),)) for i, name in enumerate("abc", 3)}


@pytest.fixture
def run(monkeypatch):
    """Runs a study with made-up figures on the rows that are there; the rows that are written."""

    def run(module, there, *options):
        files = []
        old = {"protocol": _Study().protocol().as_json(), "environment": ENVIRONMENT, "rows": there}
        monkeypatch.setattr(module, "study", lambda *given: _Study())
        monkeypatch.setattr(module, "here", lambda *given: ENVIRONMENT)
        monkeypatch.setattr(module, "head", lambda *given: {})
        monkeypatch.setattr(module, "measured", _figures)
        monkeypatch.setattr(module, "read", lambda *given: old)
        monkeypatch.setattr(module, "write", lambda *given: files.append(dict(given[-1]["rows"])))
        monkeypatch.setattr(bench_native, "rows", _plans)
        both = {name: lambda *given: _plans().items() for name in ("transformer_rows", "unet_rows")}
        for name, plans in both.items():
            monkeypatch.setattr(bench_caches, name, plans)
        monkeypatch.setattr(bench_caches, "planned", lambda made: made)
        monkeypatch.setattr(sys, "argv", ["bench", *options])
        module.main()
        return files

    return run


@pytest.mark.parametrize("module", [bench_native, bench_caches])
def test_a_run_that_was_cut_off_goes_on(module, run):
    there = {n: {"methods": records(r), "kept": True} for n, r in _plans().items() if n != "b"}
    there["c"]["methods"] = [{"method": "another", "settings": {}}]
    first, last = run(module, there)
    assert list(first) == list(last) == ["a", "b", "c"]
    assert [k for k, row in last.items() if "new" in row] == ["b", "c"]
    assert run(module, last) == []
    only = "--only" if module is bench_native else "--curves"
    (again,) = run(module, last, only, "b", "--fresh")
    assert list(again) == ["a", "b", "c"]
    assert list(run(module, last, "--fresh")[0]) == ["a"]


def test_kernels_that_are_there_are_not_measured_again(monkeypatch):
    works = ["_native_math"]
    there = {"_native_math": {"methods": records(Recipe((AttentionBackend(tuple(works)),)))}}
    old = {
        "protocol": _Study().protocol().as_json(),
        "environment": ENVIRONMENT,
        "rows": there,
        "refused": {},
    }
    files, compared = [], []
    monkeypatch.setattr(bench_backend, "study", lambda *given: _Study())
    monkeypatch.setattr(bench_backend, "environment", lambda *given: ENVIRONMENT)
    monkeypatch.setattr(bench_backend, "head", lambda *given: {})
    monkeypatch.setattr(bench_backend, "usable", lambda *given: (works, {}))
    monkeypatch.setattr(bench_backend, "read", lambda *given: old)
    monkeypatch.setattr(bench_backend, "write", lambda *given: files.append(given))
    monkeypatch.setattr(
        _Study, "compare", lambda self, r, rounds: compared.append(r), raising=False
    )
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench_backend.main()
    assert (files, compared) == ([], [])


def test_the_control_differs_from_what_it_controls_in_its_order_alone(monkeypatch, tmp_path):
    rows = bench_native.rows(None, tmp_path)
    ours, control = (
        rows[k].methods[0] for k in ("TaylorSeer(5)", "control: TaylorSeer(5), order 0")
    )
    assert control == replace(ours, max_order=0)
    assert not list(tmp_path.iterdir()), "nothing is calibrated before its turn"


def test_samples_go_round_all_classes():
    calls = digits_study.inputs(digits_study.SAMPLES)
    labels = [label for call in calls for label in call["class_labels"]]
    assert len(labels) == digits_study.SAMPLES
    assert {labels.count(c) for c in range(100)} == {digits_study.SAMPLES // 100}


def test_the_hash_of_weights_ignores_the_card(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "x.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_text("a")
    before = digits_study.weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert digits_study.weights_sha256(tmp_path) == before
    (tmp_path / "vae" / "x.safetensors").write_bytes(b"2")
    assert digits_study.weights_sha256(tmp_path) != before
