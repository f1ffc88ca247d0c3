"""The bars, and which of them a stopped run measures again."""

from __future__ import annotations

import argparse

import pytest

from accel.artifact import ArtifactRef
from accel.method import Recipe, attached
from accel.metrics.protocol import Protocol
from accel.tiny import tiny
from benchmarks import waterfall
from benchmarks.digits_study import records
from quant.tfmq import TFMQ
from samplers.swap import SwapScheduler

ENVIRONMENT = {"hardware": "h", "threads": 1, "versions": {}}
FASTER = TFMQ(ArtifactRef("/a.safetensors", "0" * 64))


def test_the_control_computes_as_many_steps():
    """Blocks of the network that run in the bar of few steps, counted, and in the control."""
    cache, computed = waterfall.REPEATS, []
    for steps, methods in ((waterfall.FEW, (cache,)), (waterfall.COMPUTED, ())):
        host, calls = tiny("dit"), []
        pipe = host.pipe
        pipe.transformer.transformer_blocks[0].attn1.to_q.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        few = SwapScheduler(*waterfall.DPM, steps=steps)
        with attached(Recipe((few, *methods)), pipe):
            pipe(class_labels=[0], num_inference_steps=steps, output_type="np")
        computed.append(len(calls))
    assert computed[0] == computed[1] == waterfall.COMPUTED


class _Study:
    pipe = None

    def protocol(self):
        return Protocol(model="m", inputs="i", samples=4, seeds=[0])

    def compare(self, recipe, rounds):
        return recipe

    def paired_time(self, previous, recipe, rounds):
        interval = argparse.Namespace(as_json=lambda: [len(previous.methods), len(recipe.methods)])
        return argparse.Namespace(speedup=interval)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the study with made-up figures on what is there; the bars measured, and the file."""
    monkeypatch.setattr(waterfall, "study", lambda *given: _Study())
    monkeypatch.setattr(waterfall, "environment", lambda *given: ENVIRONMENT)
    monkeypatch.setattr(waterfall, "head", lambda bench, *given: {
        "protocol": bench.protocol().as_json(), "environment": ENVIRONMENT,
    })  # fmt: skip
    monkeypatch.setattr(waterfall, "quantised", lambda *given: (FASTER,))
    monkeypatch.setattr(waterfall, "row", lambda recipe, result, *folders: {
        "methods": records(recipe, *folders), "speedup": 1, "judged": None, "new": True,
    })  # fmt: skip

    def run(there):
        files = [there]
        monkeypatch.setattr(waterfall, "read", lambda *given: there)
        monkeypatch.setattr(waterfall, "write", lambda name, device, made: files.append(made))
        given = argparse.Namespace(samples=4, rounds=1, device="cpu", referee="r", fresh=False)
        waterfall.measure(given, tmp_path)
        rows = files[-1]["rows"]
        made = [name for name, row in rows.items() if row.pop("new", False)]
        return made, files[-1]

    return run


def test_a_stopped_run_goes_on_and_the_last_two_bars_go_together(run):
    names, file = run(None)
    assert names == [*waterfall.first_bars(), waterfall.EIGHT, waterfall.CONTROL]
    assert run(file)[0] == [], "all is there"
    del file["rows"][waterfall.CONTROL]
    made, file = run(file)
    assert made == [waterfall.EIGHT, waterfall.CONTROL], "of the same layers"
    first = names[0]
    file["rows"][first]["methods"] = []
    made, after = run(file)
    assert made == [first]
    assert list(after["rows"]) == names, "what comes later stays"
