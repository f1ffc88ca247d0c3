"""Results are checked before they are written and when they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import results_file

GOOD = {
    "environment": {
        "hardware": "h",
        "threads": 1,
        "versions": {},
        "commit": None,
        "date": "2026-01-31",
        "load": [0.0, None],
    },
    "curve": [[1, -2.5], [2, 1e-07]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    return tmp_path


def test_what_is_wrong_is_not_written_and_the_old_file_stays(folder):
    file = results_file.write("zoo_a", "cpu", GOOD)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="environment"):
        results_file.write("zoo_a", "cpu", {"curve": []})
    assert file.read_bytes() == before


def test_what_was_edited_is_not_read(folder):
    file = results_file.write("zoo_a", "cpu", GOOD)
    assert results_file.read("zoo_a") == GOOD
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 0'))
    with pytest.raises(ValueError, match="threads"):
        results_file.read("zoo_a")


def test_devices_have_files_of_their_own_and_nothing_is_none(folder):
    results_file.write("zoo_a", "cuda", GOOD)
    assert results_file.read("zoo_a") is None
    assert results_file.read("zoo_a", "cuda") == GOOD


def test_lists_of_numbers_take_one_line():
    text = results_file.as_text(GOOD)
    assert "[2, 1e-07]" in text
    assert json.loads(text) == GOOD


ROOT = Path(__file__).resolve().parents[2]


def test_make_measures_again_what_another_machine_has_measured():
    """Every study that would refuse it is told so, and has the options that it is given."""
    makefile = (ROOT / "Makefile").read_text()
    calls = re.findall(r"-m benchmarks\.(\w+)(.*)", makefile)
    assert {"bench_quant", "bench_search", "waterfall"} <= {name for name, _ in calls}
    for name, options in calls:
        code = (ROOT / "benchmarks" / f"{name}.py").read_text()
        shared = (ROOT / "benchmarks" / "digits_study.py").read_text()
        known = code + shared * ("command_line" in code)
        for option in re.findall(r"--[a-z]+", options):
            assert f'"{option}"' in known, f"{name} {option}"
        fresh = "$(FRESH)" in options or "--kill" in options
        assert ("add_fresh(" in code) == fresh, name
