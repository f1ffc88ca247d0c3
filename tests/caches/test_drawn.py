"""Inputs of calibrations are looked at before the work."""

from __future__ import annotations

import pytest
import torch

from accel.testing import tiny
from caches.early_exit import EarlyExit, ExitTraining
from caches.evolution import EvolutionSearch
from caches.native import MagCache
from caches.residual_gate import ResidualGate
from caches.router import RouterTrainer

WAYS = {
    "gate": lambda pipe, inputs, out: ResidualGate.calibrate(pipe, inputs, quality=30.0),
    "exit": lambda pipe, inputs, out: EarlyExit.calibrate(pipe, inputs, quality=30.0),
    "heads": lambda pipe, inputs, out: ExitTraining(updates=1).fit(pipe, inputs, out),
    "mag": lambda pipe, inputs, out: MagCache.calibrate(pipe, inputs),
    "router": lambda pipe, inputs, out: RouterTrainer().fit(pipe, inputs, out),
    "price": lambda pipe, inputs, out: RouterTrainer().calibrate(pipe, inputs, out, speed=2.0),
    "search": lambda pipe, inputs, out: EvolutionSearch().run(pipe, inputs, out),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "wants inputs"),
        ([{"class_labels": torch.tensor([1])}], "{'class_labels': 'Tensor'}: JSON values only"),
    ],
    ids=["none", "tensors"],
)
def test_bad_inputs_are_refused_before_a_run(way, inputs, words, tmp_path, monkeypatch):
    pipe = tiny("dit").pipe
    monkeypatch.setattr(type(pipe), "__call__", None)
    with pytest.raises(ValueError, match=words):
        WAYS[way](pipe, inputs, str(tmp_path))
