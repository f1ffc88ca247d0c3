"""kill -9 at random moments: after `resume` every job is done exactly once."""

import pytest

from benchmarks import bench_kill


def test_three_kills_of_one_render(tmp_path):
    model = bench_kill.write_model(tmp_path / "model")
    jobs = bench_kill.write_jobs(tmp_path / "jobs.jsonl")
    expected = bench_kill.finish(jobs, model, tmp_path / "reference")
    assert len(set(expected.values())) == bench_kill.JOBS, "jobs must differ to be told apart"
    result = bench_kill.trial(
        jobs, model, tmp_path / "out", expected, kills=3, workers=1, seed=2026
    )
    assert result.kills > 0
    assert result.problems == []


@pytest.mark.slow
def test_many_kills(tmp_path):
    figures = bench_kill.study(25, [1, 2], seed=1)
    assert figures["tried"] >= 25
    assert figures["survived"] == figures["tried"], figures["problems"]
