"""New rows stand beside old ones only where both compare."""

from __future__ import annotations

import pytest

from accel.metrics.protocol import Protocol
from benchmarks import bench_native, digits_study

HERE = {"hardware": "h", "threads": 1}
PROTOCOL = Protocol(model="m", inputs="i", samples=4, seeds=[0])


def _old(protocol=PROTOCOL, **environment):
    record = None if protocol is None else protocol.as_json()
    return {"protocol": record, "environment": {**HERE, **environment}, "rows": {"a": 1}}


def test_rows_of_the_same_protocol_and_machine_stay():
    assert bench_native.kept_rows(_old(), PROTOCOL, HERE) == {"a": 1}
    assert bench_native.kept_rows(None, PROTOCOL, HERE) == {}


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (_old(Protocol(model="m", inputs="i", samples=5, seeds=[0])), "samples: 5 against 4"),
        (_old(None), "no protocol"),
        (_old(hardware="g"), "hardware 'g'"),
        (_old(threads=2), "threads 2"),
    ],
)
def test_rows_that_do_not_compare_are_refused(old, message):
    with pytest.raises(ValueError, match=message):
        bench_native.kept_rows(old, PROTOCOL, HERE)


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
