"""Everything wrong with a job file is said before anything starts, with its line number."""

import json

import pytest

from apps.render.jobs import JobFileError, job_schema, read_jobs

GOOD = '{"seed": 1, "inputs": {"class_labels": [3]}}'


def _problems(tmp_path, raw, name="jobs.jsonl", overrides=None):
    path = tmp_path / name
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(JobFileError) as caught:
        read_jobs(path, overrides)
    assert all("\n" not in problem and len(problem) < 300 for problem in caught.value.problems)
    return caught.value.problems


BAD_LINES = {
    "unknown field": ('{"sed": 1}', "unknown field 'sed'"),
    "argument beside inputs": (
        '{"num_inference_steps": 2}',
        "an argument of the call is inputs.num_inference_steps",
    ),
    "text for a number": ('{"seed": "1"}', "seed: Input should be a valid integer, got '1'"),
    "fraction for a number": ('{"seed": 1.5}', "seed: Input should be a valid integer"),
    "truth for a number": ('{"seed": true}', "seed: Input should be a valid integer"),
    "negative seed": ('{"seed": -1}', "seed: Input should be greater than or equal to 0"),
    "huge seed": ('{"seed": 9223372036854775808}', "seed: Input should be less than"),
    "many digits": ('{"seed": ' + "9" * 5000 + "}", "whole number of 5000 digits"),
    "no object": ("[1]", "a job is a JSON object"),
    "no JSON": ("{seed: 1}", "is not valid JSON"),
    "two objects": (GOOD + GOOD, "is not valid JSON: Extra data"),
    "NaN": ('{"inputs": {"a": NaN}}', "contains NaN"),
    "infinity": ('{"inputs": {"a": -Infinity}}', "contains -Infinity"),
    "overflow": ('{"inputs": {"a": 1e999}}', "too large"),
    "key twice": ('{"seed": 1, "seed": 2}', "has the key 'seed' twice"),
    "half a surrogate": ('{"inputs": {"prompt": "\\ud800"}}', "surrogate"),
    "too deep": ('{"inputs": {"a": ' + "[" * 40 + "]" * 40 + "}}", "nested deeper"),
    "far too deep": ('{"inputs": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "nested deeper"),
    "object as argument": ('{"inputs": {"a": {"b": 1}}}', "'a' holds an object"),
    "object in a list": ('{"inputs": {"a": [1, {"b": 1}]}}', "'a' holds an object"),
    "reserved argument": ('{"inputs": {"generator": 1}}', "'generator' cannot be given here"),
    "fewer steps than one": (
        '{"inputs": {"num_inference_steps": -4}}',
        "num_inference_steps is -4; a whole number from 1 on",
    ),
    "odd argument": ('{"inputs": {"a b": 1}}', "'a b' is not an argument name"),
    "traversal": ('{"name": "../up"}', "name: '../up' contains a path separator"),
    "absolute": ('{"name": "/etc/passwd"}', "path separator"),
    "backslash": ('{"name": "a\\\\b"}', "path separator"),
    "control character": ('{"name": "a\\u0007b"}', "control"),
    "right-to-left mark": ('{"name": "a\\u202eb"}', "control or invisible"),
    "hidden": ('{"name": ".ssh"}', "starts with a dot"),
    "reserved name": ('{"name": "nul.x"}', "reserved"),
    "ours": ('{"name": "ledger"}', "reserved"),
    "numbered": ('{"name": "a.001"}', "ends with a dot and a number"),
    "trailing space": ('{"name": "a "}', "ends with a space"),
    "long name": ('{"name": "' + "a" * 300 + '"}', "is longer than 120 bytes"),
    "empty name": ('{"name": ""}', "is empty"),
    "empty model": ('{"model": " "}', "is empty or has control"),
    "format": ('{"format": "exe"}', "format: Input should be 'auto', 'png' or 'mp4'"),
    "frames per second": ('{"fps": 0}', "fps: Input should be greater than or equal to 1"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_one_clear_line_with_its_number(tmp_path, line, message):
    (problem,) = _problems(tmp_path, f"{GOOD}\n\n{line}\n")
    assert problem.startswith("jobs.jsonl:3: ")
    assert message in problem


def test_all_problems_are_told_at_once(tmp_path):
    problems = _problems(tmp_path, '{"sed": 1, "fps": 0}\n' + GOOD + "\n{")
    assert [p.split(": ")[0] for p in problems] == ["jobs.jsonl:1", "jobs.jsonl:1", "jobs.jsonl:3"]


def test_bytes_that_are_no_text(tmp_path):
    (problem,) = _problems(tmp_path, GOOD.encode() + b'\n{"name": "\xff"}\n')
    assert problem == "jobs.jsonl:2: is not valid UTF-8 (byte 11)"
    for mark in (b"\xef\xbb\xbf", b"\xff\xfe"):
        (problem,) = _problems(tmp_path, mark + GOOD.encode())
        assert "byte order mark" in problem


def test_a_line_of_megabytes_is_refused(tmp_path):
    (problem,) = _problems(tmp_path, '{"name": "' + "a" * (1 << 20) + '"}')
    assert "bytes long" in problem


@pytest.mark.parametrize("raw", ["", "\n\n  \n"])
def test_an_empty_file(tmp_path, raw):
    assert _problems(tmp_path, raw) == ["the job file is empty: no job in it"]


def test_a_missing_file(tmp_path):
    with pytest.raises(JobFileError, match="cannot be read: No such file"):
        read_jobs(tmp_path / "none.jsonl")


def test_duplicates_name_the_first(tmp_path):
    (problem,) = _problems(tmp_path, f"{GOOD}\n{GOOD}")
    assert problem == "jobs.jsonl:2: the same job as jobs.jsonl:1"
    (problem,) = _problems(tmp_path, '{"name": "A", "seed": 1}\n{"name": "a", "seed": 2}')
    assert problem == "jobs.jsonl:2: name 'a' is already used by jobs.jsonl:1"


def test_a_good_file(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(GOOD.encode() + b'\r\n{"recipe": null}\r\n{}')
    one, two, three = (placed.job for placed in read_jobs(path, {"inputs.guidance_scale": 2.0}))
    assert one.inputs == {"class_labels": [3], "guidance_scale": 2.0}
    assert two.chooses_recipe()
    assert not three.chooses_recipe()


def test_schema_is_json_and_closed():
    schema = json.loads(json.dumps(job_schema()))
    assert schema["additionalProperties"] is False
    assert {"seed", "inputs", "name"} <= set(schema["properties"])
