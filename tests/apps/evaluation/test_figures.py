"""Figures of samples whose truth is known; a broken method must come out worse."""

from __future__ import annotations

import numpy as np
import pytest

from accel.metrics.distribution import frechet
from apps.evaluation import figures as module
from apps.evaluation.figures import Looked, by_label, by_word, figures, unrelated, worst
from apps.evaluation.page import is_seen, verdict
from apps.evaluation.report import warnings
from apps.evaluation.tasks import paired


def _write(folder, stem, arrays):
    np.savez_compressed(folder / f"{stem}.npz", **arrays)


def _side(folder, name, arrays, parts=3):
    stems = []
    for i in range(parts):
        stems.append(f"look-{name}-{i}")
        _write(folder, stems[-1], {k: np.array_split(v, parts)[i] for k, v in arrays.items()})
    return Looked(folder, stems, len(next(iter(arrays.values()))))


def _arrays(seed, n=300, d=4, shift=0.0, share=0.9):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), n).astype(np.float32)
    return {
        "features": rng.normal(shift, 1, (n, d)).astype(np.float32),
        "probabilities": p, "right_all": rng.random(n) < share,
        "psnr": rng.normal(30, 3, n), "ssim": rng.random(n),
    }  # fmt: skip


def _real(n=300, d=4):
    return {f"features_{i}": np.random.default_rng(90 + i).normal(size=(n, d)) for i in (0, 1)}


KINDS = ("fidelity", "fid", "judge")


def test_figures_have_intervals_that_hold_the_estimate(tmp_path):
    base, ours = (_side(tmp_path, str(i), _arrays(i)) for i in (0, 1))
    found = figures(base, ours, _real(), KINDS)
    assert {"psnr", "ssim", "right_all", "frechet", "kid", "recall", "inception_score"} <= set(
        found
    )
    for name, figure in found.items():
        for key in ("value", "baseline", "difference"):
            value = figure.get(key)
            if value is not None:
                assert value["low"] <= value["estimate"] <= value["high"], (name, key)


def test_values_by_parts_are_those_of_the_whole(tmp_path):
    arrays = _arrays(0)
    one, many = (_side(tmp_path, f"p{n}", arrays, n) for n in (1, 7))
    assert all(np.array_equal(one.values[k], many.values[k]) for k in one.values)
    a = figures(one, one, _real(), KINDS)
    assert a == figures(many, many, _real(), KINDS)


def test_a_broken_method_is_worse_in_every_figure(tmp_path):
    base = _side(tmp_path, "base", _arrays(0))
    broken = _side(tmp_path, "broken", _arrays(1, shift=2.0, share=0.3))
    found = figures(base, broken, _real(), KINDS)
    for name in ("right_all", "frechet", "kid", "precision", "recall", "coverage"):
        change, sign = found[name]["difference"], 1 if found[name]["better"] == "higher" else -1
        assert sign * change["estimate"] < 0, name
        assert max(sign * change["low"], sign * change["high"]) < 0, name


def test_no_change_is_no_difference(tmp_path):
    arrays = _arrays(0)
    same = [_side(tmp_path, name, arrays) for name in ("a", "b")]
    found = figures(*same, _real(), KINDS)
    for name in ("right_all", "precision", "recall"):
        assert found[name]["difference"]["estimate"] == 0
        assert found[name]["p"] == 1
    assert found["frechet"]["difference"]["estimate"] == 0


def test_the_interval_of_a_kernel_distance_holds_its_truth():
    """The unbiased estimate of equal distributions is 0 on average; 95 % of intervals hold it."""
    held = 0
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=(3, 120, 3))
        value = module._kid(x[0], x[0], x[1], x[2])["value"]
        held += value["low"] <= 0 <= value["high"]
    assert held >= 33  # of 38 expected, 3.6 standard deviations below


def test_large_sets_are_streamed_to_the_same_distance(tmp_path, monkeypatch):
    """Only a fixed choice of rows is kept, and the distance is that of all."""
    monkeypatch.setattr(module, "KEPT", 50)
    arrays, real = _arrays(0), _real()
    looked = _side(tmp_path, "a", arrays)
    assert len(looked.values["features"]) == 50
    assert len(looked.values["psnr"]) == 300
    found = figures(looked, looked, real, KINDS)
    expected = frechet(arrays["features"], real["features_0"])
    assert found["frechet"]["value"]["estimate"] == pytest.approx(expected, rel=1e-4)
    assert "groups" in found["frechet"]["note"]
    assert 0 < found["inception_score"]["value"]["estimate"] < 3


def test_too_few_samples_give_no_frechet_distance(tmp_path):
    looked = _side(tmp_path, "a", _arrays(0, n=12, d=8), 1)
    assert "frechet" not in figures(looked, looked, _real(12, 8), KINDS)


def test_a_missing_part_is_not_overlooked(tmp_path):
    _side(tmp_path, "a", _arrays(0))
    with pytest.raises(ValueError, match="were rendered"):
        Looked(tmp_path, ["look-a-0"], 300)


def test_what_was_right_and_is_wrong_comes_first_among_the_worst():
    values = {"psnr": np.array([9.0, 1, 5, 3]), "right_all": np.array([True, True, False, True])}
    base = {"right_all": np.array([True, True, True, True])}
    rows = worst(values, base, list("abcd"), 3)
    assert [r["sample"] for r in rows] == [2, 1, 3]
    assert rows[0]["right"] == [True, False]


def test_what_it_is_worst_at_is_found():
    rng = np.random.default_rng(0)
    words = ("a red up", "an orange up")
    labels = [f"{words[i % 2]} {('one', 'two')[i // 2 % 2]}" for i in range(80)]
    psnr = np.array([20.0 if "orange" in label else 30 for label in labels])
    psnr += rng.normal(0, 1, 80)
    found = by_word({"psnr": psnr}, labels)
    assert found[0]["word"] == "orange"
    assert found[0]["difference"] == pytest.approx(-10, abs=1)
    assert {w["word"] for w in found} == {"orange", "red", "one", "two"}  # all have "up"
    assert "orange" in by_label({"psnr": psnr}, labels)[0]["label"]


def test_words_of_the_same_samples_are_listed_once():
    labels = ["neon lime up", "brown seven"] * 8
    psnr = np.random.default_rng(0).normal(30, 1, 16)
    assert {w["word"] for w in by_word({"psnr": psnr}, labels)} == {"neon", "seven"}


def test_which_samples_lose_is_asked_of_labels_that_come_twice():
    psnr = np.zeros(80)
    assert by_label({"psnr": psnr}, [str(i) for i in range(80)]) == []


def test_unrelated_outputs_are_those_beside_each_other():
    black, white = (np.full((4, 4, 3), x, np.uint8) for x in (0, 255))
    assert unrelated([black, white]) == pytest.approx(0, abs=1e-9)


def test_paired_values_say_equal_and_different():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    b = a.copy()
    b[1] = 255 - b[1]
    found = paired(a, b)
    assert found["psnr"][0] == 100
    assert found["psnr"][1] < 10
    assert found["ssim"][0] == pytest.approx(1)
    assert found["ssim"][1] < 0.1
    video = rng.integers(0, 256, (1, 5, 16, 16, 3), dtype=np.uint8)
    other = video.copy()
    other[0, 3] = 0
    curve = paired(other, video)
    assert curve["frame_psnr"].argmin() == 3
    assert curve["worst_frame_psnr"][0] == curve["frame_psnr"].min()


def test_a_change_is_seen_only_where_interval_and_test_agree():
    change = {"estimate": -0.045, "low": -0.09, "high": -0.01}
    assert is_seen({"difference": change})
    assert is_seen({"difference": change, "p": 0.03})
    assert not is_seen({"difference": change, "p": 0.061})
    assert not is_seen({"difference": change | {"high": 0.01}, "p": 0.03})


def test_the_warning_of_a_missing_distance_says_how_many_samples_it_wants():
    found = {
        "samples": 40, "recipes": [], "lost": {}, "request": {"rounds": 0},
        "environment": {"threads": 1, "load": None},
    }  # fmt: skip
    (said,) = warnings(found, 64)
    assert "of 64 features it wants at least 128 samples" in said
    assert warnings(found, None) == []


def test_calls_that_came_out_broken_lead_what_is_said_of_a_recipe():
    same = {"estimate": 100.0, "low": 100.0, "high": 100.0}
    row = {"fallbacks": 2, "speedup": None, "figures": {"psnr": {"value": same}}}
    assert verdict(row).startswith("2 calls came out broken, made again without it; PSNR 100.0")
    assert verdict(row | {"fallbacks": 0}).startswith("PSNR")
