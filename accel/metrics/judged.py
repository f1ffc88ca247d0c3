"""Accuracy: whether samples show what was asked for, per attribute and for all at once.

Arrays in, intervals out: whose answers they are (digits-judge, another classifier, people) is the
caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from accel.metrics.statistics import Interval, share

ALL = "all"


def right(
    answers: Mapping[str, np.ndarray], asked: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Which samples are right: bool (n,) per asked attribute, and under "all" in every one of them.

    Args:
        answers, asked: integers (n,) per attribute; attributes that were not asked are left out.

    Raises:
        ValueError: nothing asked, an attribute without an answer, or other shapes.
    """
    if not asked or set(asked) - set(answers) or ALL in asked:
        raise ValueError(f"judged: asked {sorted(asked)}, answered {sorted(answers)}")
    ok = {name: _right(answers[name], asked[name], name) for name in asked}
    if len({len(x) for x in ok.values()}) > 1:
        raise ValueError(f"judged: samples per attribute { {k: len(v) for k, v in ok.items()} }")
    return {**ok, ALL: np.logical_and.reduce(list(ok.values()))}


def accuracy(
    answers: Mapping[str, np.ndarray], asked: Mapping[str, np.ndarray]
) -> dict[str, Interval]:
    """Share of samples that are `right`, with its interval. Arguments and errors of `right`."""
    return {name: share(ok) for name, ok in right(answers, asked).items()}


def by_class(answer: np.ndarray, asked: np.ndarray) -> dict[int, Interval]:
    """Share of right answers among the samples that asked for each class, classes in order.

    Args:
        answer, asked: integers (n,).
    """
    ok = _right(answer, asked, "by_class")
    asked = np.asarray(asked)
    return {int(value): share(ok[asked == value]) for value in np.unique(asked)}


def confusion(answer: np.ndarray, asked: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes): row what was asked, column what was answered.

    Raises ValueError for other shapes, or a class outside 0 .. classes - 1.
    """
    _right(answer, asked, "confusion")
    pairs = np.stack([asked, answer])
    if pairs.min() < 0 or pairs.max() >= classes:
        raise ValueError(f"confusion: classes {pairs.min()} to {pairs.max()} of {classes}")
    flat = np.bincount(pairs[0] * classes + pairs[1], minlength=classes**2)
    return flat.reshape(classes, classes)


def _right(answer: np.ndarray, asked: np.ndarray, name: str) -> np.ndarray:
    answer, asked = np.asarray(answer), np.asarray(asked)
    good = answer.shape == asked.shape and asked.ndim == 1 and len(asked) > 0
    if not good or {answer.dtype.kind, asked.dtype.kind} - {"i", "u"}:
        raise ValueError(
            f"judged: {name} is {answer.dtype} {answer.shape} against {asked.dtype} {asked.shape}; "
            "wants integers (n,)"
        )
    return answer == asked
