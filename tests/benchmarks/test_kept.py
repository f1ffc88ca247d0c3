"""Rows of an earlier run stay where they are what would be measured."""

from __future__ import annotations

import pytest

from accel.artifact import ArtifactRef
from accel.method import Recipe
from accel.metrics.protocol import Protocol
from benchmarks.kept import Calibrated, due, kept_rows, stays
from caches.interval import IntervalCache
from caches.residual_gate import ResidualGate

VERSIONS = {"accel": "1", "torch": "2", "diffusers": "3"}
HERE = {"hardware": "h", "threads": 1, "versions": {**VERSIONS, "cache-dit": "4"}}
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=[0])


def _old(protocol=PROTOCOL, row=None, **environment):
    there = {**HERE, **environment}
    record = None if protocol is None else protocol.as_json()
    return {"protocol": record, "environment": there, "rows": {"a": row or {"environment": there}}}


def _with(**versions):
    return {**HERE["versions"], **versions}


def test_rows_of_the_same_protocol_and_machine_stay():
    assert list(kept_rows(_old(), PROTOCOL, HERE)) == ["a"]
    assert kept_rows(None, PROTOCOL, HERE) == {}
    assert kept_rows(_old(versions=_with(accel="2")), PROTOCOL, HERE), "a row names its commit"
    unnamed = {"environment": {**HERE, "versions": VERSIONS}}
    assert kept_rows(_old(row=unnamed), PROTOCOL, HERE), "not every row is of a peer"


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (_old(Protocol(model="m", inputs="i", samples=5, seeds=[0])), "samples: 5 against 4"),
        (_old(None), "no protocol"),
        (_old(hardware="g"), "hardware 'g'"),
        (_old(threads=2), "threads 2"),
        (_old(versions=_with(torch="1")), "of torch 1, this is 2"),
        (_old(versions=_with(diffusers="2")), "of diffusers 2, this is 3"),
        (_old(versions=_with(**{"cache-dit": "3"})), "of cache-dit 3, this is 4"),
        (_old(row={"environment": {**HERE, "versions": _with(torch="1")}}), "of torch 1"),
    ],
)
def test_rows_that_do_not_compare_are_refused(old, message):
    with pytest.raises(ValueError, match=message):
        kept_rows(old, PROTOCOL, HERE)


def _recipe(folder, sha256):
    return Recipe((ResidualGate(ArtifactRef(f"{folder}/gate.safetensors", sha256)),))


def test_a_row_of_another_artifact_or_setting_is_measured_again():
    one, two = _recipe("/x", "1" * 64), _recipe("/y", "2" * 64)
    settings = {"path": "gate.safetensors", "sha256": "1" * 64}
    method = one.methods[0].to_json()
    row = {"methods": [{**method, "settings": {**method["settings"], "artifact": settings}}]}
    assert stays(row, one, "/x")
    assert not stays(row, two, "/y")
    assert not stays(row, Recipe((IntervalCache(),)))
    assert not stays(None, one)


def test_what_is_calibrated_is_known_by_its_settings():
    def calibrate():
        raise AssertionError("it is not looked at by being made")

    planned = Calibrated(calibrate, {"quality": 40, "times": (1, 2)})
    there = {"calibration": {"quality": 40, "times": [1, 2]}}
    assert due({"a": planned}, {"a": there}, False) == []
    assert due({"a": planned}, {"a": {}}, False) == [], "its settings were not kept"
    assert due({"a": planned}, {"a": {"calibration": {"quality": 30}}}, False) == ["a"]
    assert due({"a": planned}, {}, False) == due({"a": planned}, {"a": there}, True) == ["a"]
