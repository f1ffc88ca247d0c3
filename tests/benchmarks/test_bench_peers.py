"""The table of everything: its rows, what of an earlier run it keeps, and how it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import accel
from accel.artifact import ArtifactRef
from accel.metrics.protocol import Protocol
from benchmarks import bench_peers, tables
from caches.interval import IntervalCache
from caches.residual_gate import ResidualGate
from caches.router import RouterCache
from quant.tfmq import TFMQ

ARTIFACT = ArtifactRef("/a.safetensors", "0" * 64)
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=1)
HERE = {"commit": "abc", "hardware": "h", "threads": 1, "versions": {"torch": "2"}}


@pytest.fixture
def plans(monkeypatch):
    """All rows, with nothing calibrated."""
    monkeypatch.setattr(bench_peers, "_ratios", lambda pipe, folder: ARTIFACT)
    monkeypatch.setattr(bench_peers, "_gate", lambda pipe, folder: ResidualGate(ARTIFACT))
    monkeypatch.setattr(bench_peers, "_router", lambda pipe, folder: (RouterCache(ARTIFACT),))
    monkeypatch.setattr(bench_peers, "_integers", lambda pipe, folder: TFMQ(ARTIFACT))
    return bench_peers.rows(None, Path())


def test_every_row_is_a_recipe_of_whose_code_it_says(plans):
    groups = set()
    for name, plan in plans.items():
        methods = plan.methods()
        accel.Recipe(methods)
        peers = [m for m in methods if type(m).__module__.startswith("benchmarks.")]
        assert bool(peers) == (plan.whose in ("cache-dit", "torchao", "quanto")), name
        assert (plan.whose == "control") <= (len(methods) == 1)
        groups.add(plan.whose)
    assert groups == {"ours", "diffusers", "recipe", "cache-dit", "torchao", "quanto", "control"}


def old(**environment):
    row = {"environment": {**HERE, **environment}}
    return {"protocol": PROTOCOL.as_json(), "rows": {"a": row}}


def test_rows_of_the_same_machine_and_protocol_are_kept():
    assert list(bench_peers.kept_rows(old(), PROTOCOL, HERE)) == ["a"]
    assert bench_peers.kept_rows(old(commit="def"), PROTOCOL, HERE), "a row names its own commit"
    for key, value in (("hardware", "g"), ("threads", 2), ("versions", {})):
        assert bench_peers.kept_rows(old(**{key: value}), PROTOCOL, HERE) == {}, key
    other = Protocol(model="m", inputs="i", samples=5, seeds=1)
    assert bench_peers.kept_rows(old(), other, HERE) == {}
    assert bench_peers.kept_rows(None, PROTOCOL, HERE) == {}


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
