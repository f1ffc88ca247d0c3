"""Accuracies: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.metrics.judged import accuracy, by_class, confusion, right
from accel.metrics.statistics import share

ASKED = {"digit": np.array([1, 2, 2, 3]), "colour": np.array([0, 0, 1, 1])}
ANSWERS = {"digit": np.array([1, 2, 0, 3]), "colour": np.array([0, 9, 0, 1]), "motion": np.zeros(4)}


def test_accuracy_of_each_attribute_and_of_all():
    found = accuracy(ANSWERS, ASKED)
    assert list(found) == ["digit", "colour", "all"]
    assert {k: v.estimate for k, v in found.items()} == {"digit": 0.75, "colour": 0.5, "all": 0.5}
    assert found["all"] == share(np.array([True, False, False, True]))
    assert right(ANSWERS, ASKED)["colour"].tolist() == [True, False, False, True]


def test_by_class():
    found = by_class(ANSWERS["digit"], ASKED["digit"])
    assert {k: v.estimate for k, v in found.items()} == {1: 1.0, 2: 0.5, 3: 1.0}
    assert found[2] == share(np.array([True, False]))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1), st.randoms())
def test_confusion_holds_every_sample_and_no_order(pairs, random):
    answer, asked = np.array(pairs).T
    table = confusion(answer, asked, 4)
    assert table.sum() == len(pairs)
    assert table.trace() == right({"x": answer}, {"x": asked})["all"].sum()
    assert all(table[q, a] == pairs.count((a, q)) for q in range(4) for a in range(4))
    random.shuffle(pairs)
    assert (confusion(*np.array(pairs).T, 4) == table).all()


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        (ANSWERS, {}),
        (ANSWERS, {"size": np.zeros(4, int)}),
        (ANSWERS, {"motion": np.zeros(4, int)}),  # answered in floats
        (ANSWERS, {"digit": np.zeros(3, int)}),
        ({"all": np.zeros(4, int)}, {"all": np.zeros(4, int)}),
        ({"x": np.zeros(0, int)}, {"x": np.zeros(0, int)}),
        ({"x": np.zeros(2, int), "y": np.zeros(3, int)},) * 2,
    ],
)
def test_refusals(answers, asked):
    with pytest.raises(ValueError, match="judged"):
        accuracy(answers, asked)


def test_confusion_refuses_unknown_classes():
    with pytest.raises(ValueError, match="0 to 3 of 3"):
        confusion(ANSWERS["digit"], ASKED["digit"], 3)
