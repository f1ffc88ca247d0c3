"""Shared by the tests of the programs: one tiny model folder, and jobs for it."""

import json

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny random DiT pipeline as a stock folder; do not change it."""
    from accel.tiny import tiny

    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny("dit").pipe.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def job_file(tmp_path):
    """Write rows as a job file: `job_file([{...}, ...]) -> path`."""

    def write(rows, name="jobs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def planned(tiny_model, job_file):
    """Plan jobs for the tiny model: `planned([{...}], recipe=...) -> tasks`."""
    from apps.render.jobs import read_jobs
    from apps.render.plan import Settings, plan

    def make(rows, **settings):
        path = job_file(rows)
        return plan(read_jobs(path), Settings(model=tiny_model, **settings), path.parent)

    return make


@pytest.fixture
def rows():
    """`rows(3)`: that many different, quick jobs called job0, job1, ..."""

    def make(count, **more):
        return [
            {
                "name": f"job{i}",
                "seed": i,
                "inputs": {"class_labels": [i], "num_inference_steps": 2},
                **more,
            }
            for i in range(count)
        ]

    return make
