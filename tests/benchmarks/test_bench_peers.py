"""The table of everything: its rows, what of an earlier run it keeps, and how it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import accel
from accel.artifact import ArtifactRef
from accel.metrics.protocol import Protocol
from benchmarks import bench_peers, tables
from benchmarks.kept import Calibrated
from caches.interval import IntervalCache
from caches.native import MagCache
from caches.residual_gate import ResidualGate
from caches.router import RouterCache
from quant.tfmq import TFMQ

ARTIFACT = ArtifactRef("/a.safetensors", "0" * 64)
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=1)
HERE = {"commit": "abc", "hardware": "h", "threads": 1, "versions": {"torch": "2"}}


@pytest.fixture
def plans(monkeypatch):
    """All rows, with nothing calibrated."""
    monkeypatch.setattr(bench_peers, "_ratios", lambda pipe, folder: MagCache(artifact=ARTIFACT))
    monkeypatch.setattr(bench_peers, "_gate", lambda pipe, folder: ResidualGate(ARTIFACT))
    monkeypatch.setattr(bench_peers, "_router", lambda pipe, folder: (RouterCache(ARTIFACT),))
    monkeypatch.setattr(bench_peers, "_integers", lambda pipe, folder: TFMQ(ARTIFACT))
    return bench_peers.rows(None, Path())


def test_every_row_is_a_recipe_of_whose_code_it_says(plans):
    groups = set()
    for name, plan in plans.items():
        made = plan.recipe()
        methods = (made.make(),) if isinstance(made, Calibrated) else made.methods
        accel.Recipe(methods)
        peers = [m for m in methods if type(m).__module__.startswith("benchmarks.")]
        assert bool(peers) == (plan.whose in ("cache-dit", "torchao", "quanto")), name
        assert (plan.whose == "control") <= (len(methods) == 1)
        groups.add(plan.whose)
    assert groups == {"ours", "diffusers", "recipe", "cache-dit", "torchao", "quanto", "control"}


def _run(monkeypatch, old, *options):
    """The study with made-up figures on what is there; what is written."""
    files = []
    monkeypatch.setattr(bench_peers, "study", lambda *given: Study)
    monkeypatch.setattr(bench_peers, "here", lambda *given: HERE)
    monkeypatch.setattr(bench_peers, "head", lambda *given: {"environment": given[-1]})
    monkeypatch.setattr(bench_peers, "read", lambda *given: old)
    monkeypatch.setattr(bench_peers, "write", lambda *given: files.append(given[-1]))
    monkeypatch.setattr(sys, "argv", ["bench_peers", *options])
    bench_peers.main()
    return files


class Study:
    pipe = None

    @staticmethod
    def protocol():
        return PROTOCOL


def _old(environment=HERE, **more):
    rows = {"DDIM 10 steps": {"environment": environment, "methods": [], "whose": "control"}}
    return {"protocol": PROTOCOL.as_json(), "environment": environment, "rows": rows,
            "left_out": {}, **more}  # fmt: skip


def test_rows_that_do_not_compare_are_refused_and_not_written_over(monkeypatch):
    for key, value, said in (("hardware", "g", "hardware"), ("versions", {"torch": "1"}, "torch")):
        with pytest.raises(ValueError, match=f"{said}.*--fresh"):
            _run(monkeypatch, _old({**HERE, key: value}))
    other = Protocol(model="m", inputs="i", samples=5, seeds=1)
    with pytest.raises(ValueError, match="samples"):
        _run(monkeypatch, _old(protocol=other.as_json()))


def test_a_reason_is_whole_and_what_was_measured_keeps_its_date(monkeypatch):
    reason = "it does not work here. " * 20

    def measured(bench, recipe, *given):
        raise ValueError(reason)

    monkeypatch.setattr(bench_peers, "measured", measured)
    before = {**HERE, "commit": "before"}
    (made,) = _run(monkeypatch, _old(before), "--only", "leap")
    assert made["left_out"] == {"leap": reason.strip()}
    assert list(made["rows"]) == ["DDIM 10 steps"]
    assert made["environment"] == before
    assert "leap" not in made["waiting"]
    assert "int8 weights" in made["waiting"]


def test_the_table_has_groups_fastest_first_and_names_what_is_not_in_it():
    def row(whose, speed, method):
        speedup = {"estimate": speed, "low": speed, "high": speed}
        return {"whose": whose, "speedup": speedup, "methods": [method], "judged": None}

    rows = {
        "slow": row("ours", 1.5, IntervalCache().to_json()),
        "peer": row("torchao", 0.5, {"method": "benchmarks.quant_peers:TorchAO", "settings": {}}),
        "fast": row("diffusers", 2.5, IntervalCache(3).to_json()),
        "blank": row("control", 9.0, IntervalCache(4).to_json()),
        "both": row("recipe", 2.0, IntervalCache(5).to_json()),
    }
    environment = {"hardware": "h", "threads": 1}
    head = {"environment": environment, "model": "m", "samples": 4, "batch": 2, "steps": 9}
    head |= {"left_out": {"leap": "needs a flow"}, "waiting": ["int8 dynamic", "int8 weights"]}
    made = tables._peers_on({**head, "rows": rows})
    order = [line.split(" | ")[1] for line in made.splitlines() if line.startswith("| ")][1:]
    assert order == ["both", "fast", "slow", "peer", "blank"]
    missing = made.splitlines()[-1]
    assert "EncoderPropagation" in missing
    assert "IntervalCache" not in missing
    assert "Left out here: leap (needs a flow)." in missing
    assert missing.endswith("Not measured yet: int8 dynamic; int8 weights.")
