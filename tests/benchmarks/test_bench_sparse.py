"""The benchmark of sparse attention: what it times is the same attention, and its tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import bench_sparse, bench_sparse_quality, sparse_tables, tables
from benchmarks.bench_sparse import attention_rows, renewed, timed_in_turn
from benchmarks.bench_sparse_quality import BLOCKS, RandomMask, methods
from benchmarks.schema import SparseAttentionRow
from sparse_attn.budgets import Budgets, Checks, Curves
from sparse_attn.subblock_lse import SubblockLSE


def test_every_round_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timed_in_turn(runs, 2)
    assert order == ["a", "b"] * 3  # one round more, which does not count
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_a_row_is_what_the_schema_wants(monkeypatch):
    monkeypatch.setitem(bench_sparse.SHAPES, "cpu", ((512, 16, 1),))
    monkeypatch.setitem(bench_sparse.DENSITIES, "cpu", (0.5,))
    right = {}

    def flex():  # compiling takes half a minute; what is timed is checked here
        def attend(q, k, v, blocks):
            mask = blocks.tokens()
            right["flex"] = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            return right["flex"]

        return attend

    monkeypatch.setattr(bench_sparse, "flex", flex)
    kernel = bench_sparse.dispatch.attend

    def attend(*args, **kwargs):
        found = kernel(*args, **kwargs)
        if len(args) == 4:
            right["ours"] = found.out
        return found

    monkeypatch.setattr(bench_sparse.dispatch, "attend", attend)
    with torch.no_grad():
        (row,) = attention_rows("cpu", 1, None)
    SparseAttentionRow.model_validate(row)
    assert torch.allclose(right["ours"], right["flex"], atol=1e-5)
    assert row["executed"] == pytest.approx(0.5, abs=0.1)


def test_rows_measured_again_replace_their_own():
    rows = [{"tokens": 4, "head_dim": 8, "density": d, "x": 0} for d in (0.5, 0.1)]
    found = renewed(rows, [{**rows[1], "x": 1}])
    assert [(r["density"], r["x"]) for r in found] == [(0.5, 0), (0.1, 1)]


def test_a_part_stands_beside_figures_of_the_same_machine_only(monkeypatch):
    here = {"hardware": "h", "threads": 1}
    found = {"environment": here, "attention": [], "model": []}
    monkeypatch.setattr(bench_sparse, "read", lambda name, device: found)
    assert bench_sparse.kept_figures("cpu", here) is found
    with pytest.raises(ValueError, match="hardware 'h'"):
        bench_sparse.kept_figures("cpu", {**here, "hardware": "g"})


def test_the_share_of_attention_is_extrapolated():
    """2 s of rest and 8 s of attention: 4 s at density 0.25, 2.8 s at 0.1."""
    model = [
        {"executed": d, "seconds": [[10.0], [2 + 8 * d]]}
        for d in (0.25, 0.1)
    ]  # fmt: skip
    assert sparse_tables.attention_share({"model": model}) == pytest.approx(0.8)


def test_every_policy_is_asked_for_the_same_density():
    assert set(methods(0.2, None, parts=False)) < set(methods(0.2, None))
    for name, method in methods(0.2, None).items():
        if name != "SpargePrediction":  # it has no density to ask for
            assert getattr(method, "density", getattr(method, "high", None)) == 0.2, name
        assert method.blocks == BLOCKS
        assert not method.guard


def test_the_random_control_repeats():
    q = torch.zeros(1, 2, 256, 8)
    place = SimpleNamespace(layer=1, step=2, branch="cond", blocks=BLOCKS)
    one, two = (RandomMask(density=0.5).keep(q, q, place, None) for _ in "12")
    assert torch.equal(one, two)
    assert one.float().mean().item() == pytest.approx(0.5, abs=0.01)
    there = q.to("meta")
    assert RandomMask(density=0.5).keep(there, there, place, None).device.type == "meta"


def test_a_judged_density_that_is_not_measured_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["it", "--densities", "0.4", "--judged-density", "0.2"])
    with pytest.raises(SystemExit):
        bench_sparse_quality.main()
    assert "none of --densities" in capsys.readouterr().err


def test_rows_that_are_not_measured_again_stay_where_they_are():
    old = {"TopK @ 0.2": 1, "SubblockLSE @ 0.4": 2, "SubblockLSE, of old @ 0.2": 3}
    new = {"SubblockLSE, calibrated @ 0.2": 4, "SubblockLSE @ 0.4": 5}
    found = bench_sparse_quality.renewed(old, new)
    assert list(found.items()) == [
        ("SubblockLSE, calibrated @ 0.2", 4), ("TopK @ 0.2", 1), ("SubblockLSE @ 0.4", 5)
    ]  # fmt: skip


def test_rows_of_other_videos_or_machines_are_not_put_together(monkeypatch):
    here = {"hardware": "h", "threads": 1}
    old = {"environment": here, "protocol": {"sha256": "a"}, "videos": 8}
    args = SimpleNamespace(device="cpu", videos=8)
    monkeypatch.setattr(bench_sparse_quality, "read", lambda name, device: old)
    monkeypatch.setattr(bench_sparse_quality, "environment", lambda device: here)
    assert bench_sparse_quality.kept_figures(args, {"sha256": "a"}) is old
    with pytest.raises(ValueError, match="other videos"):
        bench_sparse_quality.kept_figures(args, {"sha256": "b"})
    monkeypatch.setattr(bench_sparse_quality, "environment", lambda device: {**here, "threads": 2})
    with pytest.raises(ValueError, match="threads 1"):
        bench_sparse_quality.kept_figures(args, {"sha256": "a"})


def test_a_promise_is_of_what_shares_out_as_the_calibration_did():
    curves = Curves(np.array([[[0.1, 0.0]]]), np.ones((1, 1, 1)), np.ones(1), np.ones(1))
    checks = Checks(np.array([10.0]), np.array([[9.0], [13.0]]))
    budgets = Budgets(np.array([0.2, 1.0]), {"transformer": curves}, checks, "head")
    found = [
        bench_sparse_quality.promised(SubblockLSE(density=0.2, allocate=allocate), budgets)
        for allocate in (None, "head", "layer")
    ]
    assert found[0] == found[1]
    assert found[0]["expected"] == pytest.approx(11)
    assert found[0]["expected_extremes"] == pytest.approx((9, 13))
    assert found[2] == {}


def test_the_table_and_the_list_of_methods(monkeypatch):
    """A row a policy, a column a density; what a policy lacks, or keeps otherwise, is said."""
    kept = {"psnr": {"estimate": 30.0, "low": 29.0, "high": 31.0}, "density": 0.2}
    kept["methods"] = [methods(0.2, None)["SubblockLSE"].to_json()]
    more = {**kept, "density": 0.35}
    foretold = {**kept, "expected": 29.0, "expected_extremes": (25.0, 34.0)}
    judged = {
        "videos": 16,
        "psnr": kept["psnr"],
        "judged": {
            "frechet": None,
            "accuracy": {
                "before": {"estimate": 0.5},
                "after": {"estimate": 0.25},
                "difference": {"low": -0.5, "high": 0.125},
            },
        },
    }
    result = {
        "model": "m",
        "steps": 20,
        "guidance": 4.0,
        "videos": 8,
        "environment": {"hardware": "h", "threads": 1},
        "protocol": {"sha256": "p"},
        "rows": {
            "A @ 0.2": kept,
            "B @ 0.2": more,
            "A @ 0.4": {**kept, "density": 0.4},
            "C @ 0.2": foretold,
        },
        "judged": {"A @ 0.2": judged},
    }
    lines = sparse_tables.quality(result).splitlines()
    assert "20 steps of which the first 20% are dense" in lines[0]
    assert "| A | 30.0 (29.0 to 31.0) | 30.0 (29.0 to 31.0) |" in lines
    assert "| B | 30.0 (29.0 to 31.0) (kept 0.35) | - |" in lines
    said = "30.0 (29.0 to 31.0) (expected 29.0, 25.0 to 34.0 between inputs)"
    assert f"| C | {said} | - |" in lines
    assert "| A @ 0.2 | 16 | 30.0 dB | 25.0% (dense 50.0%) | -50.0 to +12.5 |" in lines

    monkeypatch.setattr(sparse_tables, "read", lambda name: result)
    listed = sparse_tables.measured_by_psnr("sparse_attn.subblock_lse:SubblockLSE")
    assert listed is not None
    assert (listed["setting"], listed["judged"]) == ("A @ 0.2", judged["judged"])
    assert listed["speedup"] is None
    cells = "- | - | 30.0 dB (29.0 to 31.0) | - | 25.0 % (-50.0 to +12.5) | - |"
    assert tables._quality(listed) == cells
