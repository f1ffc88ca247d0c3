"""From what the tasks found to a report: every figure with its interval, plain JSON.

A figure is ``{label, unit, better, value, baseline, difference, p, note}``: ``value`` of a recipe,
``baseline`` and ``difference`` where the baseline has one too, all with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch

from accel.metrics.distribution import SAMPLES_PER_FEATURE, frechet, kid
from accel.metrics.fidelity import feature_distance, psnr
from accel.metrics.manifold import FEWEST, manifold
from accel.metrics.statistics import SetInterval, bootstrap, bootstrap_sets, paired_test, share
from accel.metrics.streaming import ClassSums, Moments, frechet_jackknife
from accel.referee import paired_difference
from apps.evaluation.tasks import Arrays, read_arrays

KEPT = 5000  # samples of which kernel distance, precision and coverage are taken at most
GROUPS = 10  # of the jackknife
HALVES = 40  # random halves, for the interval of a kernel distance
BOOTSTRAP_WORK = 2e8  # n d^2 up to which a Frechet distance is resampled; beyond, jackknife
FEW = 30  # samples below which a percentile bootstrap holds the truth less often than it says
WORST = 6
ARTICLES = frozenset({"a", "an", "the"})  # words of labels that say nothing of what is shown

Figure = dict[str, Any]


class Measure(NamedTuple):
    """A value that each sample has."""

    label: str
    unit: str
    better: str  # "higher", "lower" or "same" (as the baseline)
    kind: str  # of evaluation
    paired: bool  # said of a pair, so that the baseline has none


MEASURES = {
    "psnr": Measure("PSNR to the baseline", "dB", "higher", "fidelity", True),
    "ssim": Measure("SSIM to the baseline", "", "higher", "fidelity", True),
    "worst_frame_psnr": Measure("PSNR of the worst frame", "dB", "higher", "fidelity", True),
    "temporal_error": Measure("error of frame differences", "", "lower", "fidelity", True),
    "feature_distance": Measure("distance seen by the judge", "", "lower", "fidelity", True),
    "brightness": Measure("mean brightness (of 255)", "", "same", "fidelity", False),
    "flicker": Measure("flicker", "", "lower", "fidelity", False),
    "motion": Measure("motion", "", "same", "fidelity", False),
    "clip": Measure("CLIP score", "", "higher", "clip", False),
}


class Looked:
    """All looks at one side, read part by part: values of each sample in memory, features as
    moments of groups and as the rows of a fixed random choice of samples."""

    def __init__(self, folder: Path, stems: Sequence[str], total: int):
        rows = np.random.default_rng(0).permutation(total)[:KEPT]
        chosen, group_of = np.zeros(total, bool), np.arange(total) * GROUPS // total
        chosen[rows] = True
        parts: dict[str, list[np.ndarray]] = {}
        self.moments: dict[int, Moments] = {}
        self.classes: list[ClassSums] = []
        seen, names = 0, None
        for arrays in _parts(folder, stems):
            count = len(next(iter(arrays.values())))
            here = slice(seen, seen + count)
            names = set(arrays) if names is None else names & set(arrays)
            self._add(arrays, group_of[here])
            for name, values in arrays.items():
                large = name in ("features", "probabilities", "looks")
                parts.setdefault(name, []).append(values[chosen[here]] if large else values)
            seen += count
        if seen != total:
            raise ValueError(f"evaluate: {seen} samples were looked at, {total} were rendered")
        self.total = total
        self.values: Arrays = {k: np.concatenate(parts[k]) for k in names or ()}

    def _add(self, arrays: Arrays, groups: np.ndarray) -> None:
        if "features" in arrays:
            for group in np.unique(groups).tolist():
                part = Moments.of(arrays["features"][groups == group])
                old = self.moments.get(group)
                self.moments[group] = part if old is None else old + part
        if "probabilities" in arrays:
            self.classes.append(ClassSums.of(arrays["probabilities"]))


def _parts(folder: Path, stems: Sequence[str]) -> Iterator[Arrays]:
    for stem in stems:
        yield read_arrays(folder, stem)


def figures(base: Looked, ours: Looked, real: Arrays | None, kinds: Sequence[str]) -> dict:
    """All figures of a recipe, by name, for the kinds asked for."""
    found: dict[str, Figure] = {}
    if "seen" in ours.values and ours.total > 1:
        pair = (torch.from_numpy(x.values["seen"]) for x in (ours, base))
        ours.values["feature_distance"] = feature_distance(*pair).numpy()
    for name, measure in MEASURES.items():
        if measure.kind in kinds and name in ours.values:
            found[name] = _mean(measure, base.values.get(name), ours.values[name])
    if "judge" in kinds or ("fidelity" in kinds and "right_all" in ours.values):
        found |= _judged(base.values, ours.values)
    if real is not None:
        found |= _distances(base, ours, real)
    return found


def _mean(measure: Measure, before: np.ndarray | None, after: np.ndarray) -> Figure:
    figure = {
        "label": measure.label, "unit": measure.unit, "better": measure.better,
        "value": _json(bootstrap(after.tolist())),
    }  # fmt: skip
    if measure.paired or before is None:
        return figure
    test = paired_test(after.tolist(), before.tolist())
    return figure | {
        "baseline": _json(bootstrap(before.tolist())),
        "difference": _json(test.difference),
        "p": float(f"{test.p:.3g}"),
    }


def _judged(before: Arrays, after: Arrays) -> dict[str, Figure]:
    """Share judged right, of all attributes together first."""
    names = [n for n in after if n.startswith("right_") and n in before]
    names.sort(key=lambda n: (n != "right_all", n))
    if len(names) == 2:
        names = names[:1]  # one attribute is all of them
    found = {}
    for name in names:
        what = name.removeprefix("right_")
        a, b = after[name], before[name]
        test = paired_test(a.astype(float).tolist(), b.astype(float).tolist())
        found[name] = {
            "label": "judged right" + ("" if what == "all" else f": {what}"),
            "unit": "%", "better": "higher", "value": _json(share(a), 100),
            "baseline": _json(share(b), 100), "difference": _json(paired_difference(b, a), 100),
            "p": float(f"{test.p:.3g}"),
        }  # fmt: skip
    return found


# -- distances of distributions ----------------------------------------------------------------


def _distances(base: Looked, ours: Looked, real: Arrays) -> dict[str, Figure]:
    """Distances to real samples, and what of them is covered; the floor is real to other real."""
    found: dict[str, Figure] = {}
    first, other = real["features_0"], real.get("features_1", np.empty((0, 0)))
    a, b = base.values["features"], ours.values["features"]
    dimension = a.shape[1]
    if min(base.total, len(first)) >= SAMPLES_PER_FEATURE * dimension:
        found["frechet"] = _frechet(base, ours, first, other)
    if "looks_0" in real and "looks" in ours.values:
        looks = [base.values["looks"], ours.values["looks"], real["looks_0"]]
        if min(len(x) for x in looks) >= SAMPLES_PER_FEATURE * looks[0].shape[1]:
            floor = _floor(looks[2], real.get("looks_1", np.empty(0)))
            found["looks"] = _set_figure("Frechet distance of looks (untrained)", looks, floor)
    found["kid"] = _kid(a, b, first[:KEPT], other[:KEPT])
    found |= _covered(a, b, first[:KEPT], other[:KEPT])
    if "probabilities" in ours.values:
        found["inception_score"] = _inception(base, ours)
    return found


def _frechet(base: Looked, ours: Looked, first: np.ndarray, other: np.ndarray) -> Figure:
    label, floor = "Frechet distance to real samples", _floor(first, other)
    count, dimension = len(first), first.shape[1]
    if ours.total <= KEPT and max(count, ours.total) * dimension**2 <= BOOTSTRAP_WORK:
        sets = [base.values["features"], ours.values["features"], first]
        return _set_figure(label, sets, floor)
    groups = np.arange(count) * GROUPS // count
    reals = [Moments.of(first[groups == g]) for g in range(GROUPS)]
    sides = [[looked.moments[g] for g in range(GROUPS)] for looked in (base, ours)]
    before, after = (frechet_jackknife(side, reals) for side in sides)
    note = f"intervals by leaving out one of {GROUPS} groups; not of the difference"
    return _distance(label, before, after, None, floor) | {"note": note}


def _set_figure(label: str, sets: list[np.ndarray], floor: float | None) -> Figure:
    """Distance of before and of after to the same real samples; pairs stay pairs."""
    before, after, real = sets
    width = before.shape[1]
    both = np.concatenate([before, after], axis=1)
    seen: list[tuple[float, float]] = []

    def change(pair: np.ndarray, rows: np.ndarray) -> float:
        seen.append((_any_count(pair[:, :width], rows), _any_count(pair[:, width:], rows)))
        return seen[-1][1] - seen[-1][0]

    difference = bootstrap_sets([both, real], change)
    *draws, estimate = np.asarray(seen)  # the sets themselves come last
    a, b = (_of_draws(np.asarray(draws)[:, i], estimate[i]) for i in (0, 1))
    return _distance(label, a, b, difference, floor)


def _of_draws(draws: np.ndarray, estimate: float) -> SetInterval:
    """As `bootstrap_sets`: percentiles, moved down by what resampling adds."""
    bias = float(draws.mean()) - float(estimate)
    low, high = np.percentile(draws, [2.5, 97.5]) - bias
    return SetInterval(float(estimate), float(low), float(high), bias)


def _distance(
    label: str,
    before: SetInterval,
    after: SetInterval,
    change: SetInterval | None,
    floor: float | None,
) -> Figure:
    return {
        "label": label, "unit": "", "better": "lower", "value": _json(after),
        "baseline": _json(before), "difference": None if change is None else _json(change),
        "floor": floor,
    }  # fmt: skip


def _any_count(a: np.ndarray, b: np.ndarray) -> float:
    return frechet(a, b, unequal=True)


def _floor(first: np.ndarray, other: np.ndarray) -> float | None:
    """Of other real samples, where there are as many: no less can be asked of a model."""
    return _round(frechet(other, first)) if len(other) == len(first) else None


def _kid(a: np.ndarray, b: np.ndarray, first: np.ndarray, other: np.ndarray) -> Figure:
    """Kernel distance of all pairs, with an interval from random halves of samples and real ones.

    A half drawn without replacement varies about the whole as the whole does about the truth (the
    variance is s^2 (2 / n - 1 / n)); before and after take the same halves, so they pair.
    """
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(HALVES):
        rows, real = (rng.permutation(len(x))[: len(x) // 2] for x in (a, first))
        halves.append([kid(x[rows], first[real], subsets=None).mean for x in (a, b)])
    whole = [kid(x, first, subsets=None).mean for x in (a, b)]
    spread = np.asarray(halves)
    changes = spread[:, 1] - spread[:, 0]
    floor = kid(other, first, subsets=None).mean if len(other) > 1 else None
    return {
        "label": "kernel distance (KID)", "unit": "", "better": "lower",
        "value": _around(whole[1], spread[:, 1]), "baseline": _around(whole[0], spread[:, 0]),
        "difference": _around(whole[1] - whole[0], changes),
        "floor": None if floor is None else _round(floor),
        "note": "of independent samples unbiased; sets that go round the same classes fall below 0",
    }  # fmt: skip


def _around(estimate: float, values: np.ndarray) -> dict[str, float]:
    width = NormalDist().inv_cdf(0.975) * float(np.std(values, ddof=1))
    ends = (estimate, estimate - width, estimate + width)
    return dict(zip(("estimate", "low", "high"), map(_round, ends), strict=True))


def _covered(a: np.ndarray, b: np.ndarray, first: np.ndarray, other: np.ndarray) -> dict:
    """Precision, recall, density and coverage; intervals are over the rows they are said of."""
    before, after = manifold(a, first), manifold(b, first)
    floors = manifold(other, first) if len(other) >= FEWEST else None
    found = {}
    for name, label in (
        ("precision", "precision: samples among real ones"),
        ("recall", "recall: real ones among samples"),
        ("density", "density around real ones"),
        ("coverage", "coverage of real ones"),
    ):
        x, y = (getattr(m, name).astype(float) for m in (before, after))
        test = paired_test(y.tolist(), x.tolist())
        found[name] = {
            "label": label, "unit": "", "better": "higher",
            "value": _json(bootstrap(y.tolist())), "baseline": _json(bootstrap(x.tolist())),
            "difference": _json(test.difference), "p": float(f"{test.p:.3g}"),
            "floor": None if floors is None else _round(float(getattr(floors, name).mean())),
        }  # fmt: skip
    return found


def _inception(base: Looked, ours: Looked) -> Figure:
    """Over all samples at once; the interval is a bootstrap of those kept."""
    values = []
    for looked in (base, ours):
        whole = looked.classes[0]
        for part in looked.classes[1:]:
            whole = whole + part
        rows = looked.values["probabilities"]
        spread = bootstrap_sets([rows], lambda p: ClassSums.of(p).score)
        shift = whole.score - spread.estimate
        values.append({k: _round(v + shift) for k, v in spread._asdict().items() if k != "bias"})
    return {
        "label": "inception score", "unit": "", "better": "higher", "value": values[1],
        "baseline": values[0], "difference": None,
    }  # fmt: skip


# -- where it hurts ----------------------------------------------------------------------------


def worst(values: Arrays, base: Arrays, labels: Sequence[str], count: int = WORST) -> list[dict]:
    """The samples that were hurt most: right before and wrong now first, then by PSNR."""
    order = np.argsort(values["psnr"], kind="stable")
    rows = order[:count].tolist()
    if "right_all" in values and "right_all" in base:
        lost = np.flatnonzero(base["right_all"] & ~values["right_all"])
        lost = lost[np.argsort(values["psnr"][lost], kind="stable")][:count].tolist()
        rows = lost + [i for i in rows if i not in lost]
    found = []
    for i in rows:
        row = {"sample": i, "label": labels[i], "psnr": _round(float(values["psnr"][i]))}
        for name in ("ssim", "feature_distance", "clip"):
            if name in values:
                row[name] = _round(float(values[name][i]))
        if "right_all" in values and "right_all" in base:
            row["right"] = [bool(base["right_all"][i]), bool(values["right_all"][i])]
        if "frame_psnr" in values:
            row["frame_psnr"] = [_round(x) for x in values["frame_psnr"][i].tolist()]
        found.append(row)
    return found


def by_label(values: Arrays, labels: Sequence[str], count: int = 8) -> list[dict[str, Any]]:
    """Mean PSNR of the samples that share a label, worst first; nothing if no label comes twice."""
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    rows = [
        {
            "label": label,
            "samples": len(rows),
            "psnr": _json(bootstrap(values["psnr"][rows].tolist())),
        }
        for label, rows in groups.items()
        if len(rows) > 1
    ]
    return sorted(rows, key=lambda row: row["psnr"]["estimate"])[:count]


def by_word(values: Arrays, labels: Sequence[str], count: int = 10) -> list[dict[str, Any]]:
    """Mean PSNR of samples whose label has a word, beside those without, the worst word first.

    Of words that the same samples have, the longest stands for all.
    strength: difference over its standard error. Many words are tried, so it is no test.
    """
    words: dict[str, np.ndarray] = {}
    for i, label in enumerate(labels):
        for word in set(label.lower().replace(",", " ").replace(".", " ").split()) - ARTICLES:
            words.setdefault(word, np.zeros(len(labels), bool))[i] = True
    longest = {words[word].tobytes(): word for word in sorted(words, key=lambda w: (len(w), w))}
    rows = []
    for word in longest.values():
        has = words[word]
        if min(has.sum(), (~has).sum()) < 5:
            continue
        inside, outside = values["psnr"][has], values["psnr"][~has]
        spread = np.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
        change = float(inside.mean() - outside.mean())
        rows.append({
            "word": word, "samples": int(has.sum()), "psnr": _json(bootstrap(inside.tolist())),
            "difference": _round(change), "strength": _round(change / max(float(spread), 1e-9)),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["strength"])[:count]


def unrelated(frames: Sequence[np.ndarray]) -> float:
    """Mean PSNR of some baseline samples to the next: what having nothing in common scores."""
    stack = torch.from_numpy(np.stack(frames)).double() / 255
    return _round(float(psnr(stack, stack.roll(1, 0)).clamp(max=100).mean()))


def _json(interval: Any, factor: float = 1.0) -> dict[str, float]:
    return {k: _round(factor * getattr(interval, k)) for k in ("estimate", "low", "high")}


def _round(x: float) -> float:
    return float(f"{x:.5g}")
