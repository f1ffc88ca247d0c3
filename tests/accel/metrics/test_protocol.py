"""Protocols: content is hashed, edits are found, differences are named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.metrics.protocol import Protocol, file_sha256, require_same

BASE = Protocol(
    model="digits-dit",
    inputs="heldout",
    samples=2000,
    seeds=[0, 1],
    steps=20,
    guidance=4.0,
    more={"crop": {"policy": "none"}},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=30)
@given(JSON, JSON)
def test_a_record_on_disk_reads_back_with_its_hash(seeds, other):
    protocol = replace(BASE, seeds=seeds if seeds is not None else 0, more={"x": other})
    again = Protocol.read(json.loads(json.dumps(protocol.as_json())))
    assert again == protocol
    assert hash(again) == hash(protocol)
    assert again.as_json() == protocol.as_json()


def test_the_hash_is_of_the_canonical_content():
    text = (
        '{"crop":{"policy":"none"},"guidance":4,"inputs":"heldout","model":"digits-dit",'
        '"samples":2000,"seeds":[0,1],"steps":20}'
    )
    assert BASE.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert replace(BASE, guidance=4).sha256 == BASE.sha256
    assert replace(BASE, guidance=4.5).sha256 != BASE.sha256


@pytest.mark.parametrize("name", list(BASE.as_json()))
def test_an_edited_record_is_rejected(name):
    record = BASE.as_json()
    record[name] = "0" * 64 if name == "sha256" else 7
    with pytest.raises(ValueError, match="edited"):
        Protocol.read(record)
    del record[name]
    with pytest.raises(ValueError, match=r"edited|the record has no"):
        Protocol.read(record)


def test_differences_are_named():
    other = replace(BASE, steps=10, resize="bicubic", more={"crop": {"policy": "centre"}})
    require_same(BASE, replace(BASE))
    require_same(BASE, other, ignore=("steps", "resize", "crop"))
    with pytest.raises(ValueError) as error:
        require_same(BASE, other, ignore=("steps",))
    assert "resize: None against 'bicubic'" in str(error.value)
    assert "crop: " in str(error.value)
    assert "steps" not in str(error.value)
    assert "model" not in str(error.value)
    with pytest.raises(ValueError, match="guidance: True against 1"):
        require_same(replace(BASE, guidance=True), replace(BASE, guidance=1))


def test_nothing_of_it_can_be_changed():
    given_seeds = [0, 1]
    protocol = replace(BASE, seeds=given_seeds)
    before = protocol.sha256
    given_seeds.append(2)
    protocol.as_json()["crop"]["policy"] = "centre"
    assert protocol.sha256 == before
    with pytest.raises(FrozenInstanceError):
        protocol.steps = 5  # pyright: ignore
    with pytest.raises(TypeError):
        protocol.more["crop"] = 5  # pyright: ignore


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.int64(3), {1: 2}, {3}, b"x"])
def test_refuses_what_is_not_plain_json(value):
    with pytest.raises(ValueError, match=r"seeds\[1\] is .*plain JSON"):
        replace(BASE, seeds=[0, value])


@pytest.mark.parametrize("name", ["steps", "sha256", "more"])
def test_refuses_names_that_are_taken(name):
    with pytest.raises(ValueError, match="taken"):
        replace(BASE, more={name: 1})


def test_file_sha256(tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(b"weights").hexdigest()
