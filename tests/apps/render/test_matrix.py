"""Few lines of YAML become many jobs; hostile YAML becomes one line of complaint."""

import pytest

from apps.render.jobs import JobFileError, read_jobs
from apps.render.matrix import apply_dotted, parse_override

GOOD = """
defaults: {inputs: {num_inference_steps: 4}}
matrix:
  seed: [0, 1, 2]
  inputs.class_labels: [[3], [14]]
jobs:
  - {seed: 9, inputs: {class_labels: [7]}}
"""


def _read(tmp_path, text):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    return [placed.job for placed in read_jobs(path)]


def test_product_plus_single_jobs(tmp_path):
    jobs = _read(tmp_path, GOOD)
    assert len(jobs) == 7
    assert {(job.seed, job.inputs["class_labels"][0]) for job in jobs} == {
        *((seed, label) for seed in (0, 1, 2) for label in (3, 14)),
        (9, 7),
    }
    assert all(job.inputs["num_inference_steps"] == 4 for job in jobs)


BAD = {
    "code": ("jobs: [!!python/object/apply:os.system ['true']]", "not valid YAML"),
    "alias bomb": ("a: &a [1]\njobs: [*a, *a]", "aliases"),
    "key twice": ("matrix: {seed: [1]}\nmatrix: {seed: [2]}", "is there twice"),
    "number as key": ("1: 2", "is no text"),
    "unknown section": ("matrices: {}", "unknown section 'matrices'"),
    "no list": ("matrix: {seed: 3}", "matrix.seed must be a list"),
    "empty list": ("matrix: {seed: []}", "matrix.seed must be a list with at least one"),
    "too many": (
        "matrix: {" + ", ".join(f"x{i}: [{', '.join('0123456789')}]" for i in range(8)) + "}",
        "expands to 100,000,000 jobs",
    ),
    "date": ("jobs: [{inputs: {a: 2026-01-01}}]", "date"),
    "infinity": ("jobs: [{inputs: {a: .inf}}]", "not finite"),
    "empty": ("", "is empty"),
    "list": ("[1]", "must be a mapping"),
    "broken": ("jobs: [", "not valid YAML"),
    "deep": ("jobs: " + "[" * 3000 + "]" * 3000, "nested"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(JobFileError) as caught:
        _read(tmp_path, text)
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]


def test_a_bad_job_in_the_matrix_is_named(tmp_path):
    with pytest.raises(JobFileError, match=r"jobs.yaml: matrix 2: seed: Input should be a valid"):
        _read(tmp_path, "matrix: {seed: [1, x]}")


def test_overrides():
    assert parse_override("seed=3") == ("seed", 3)
    assert parse_override("inputs.prompt=a=b") == ("inputs.prompt", "a=b")
    assert parse_override("inputs.x=[1, 2]") == ("inputs.x", [1, 2])
    for bad in ("seed", "=3", "a..b=3", "inputs.a-b=1"):
        with pytest.raises(ValueError, match="is not of the form"):
            parse_override(bad)
    before = {"inputs": {"a": 1}}
    assert apply_dotted(before, {"inputs.b": 2}) == {"inputs": {"a": 1, "b": 2}}
    assert before == {"inputs": {"a": 1}}
    with pytest.raises(ValueError, match="'seed' is not an object"):
        apply_dotted({"seed": 1}, {"seed.a": 2})
