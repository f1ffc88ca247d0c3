"""The guard's constants are those of the measured results; a GPU's are measured once and kept."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.results_file import read
from sparse_attn import speed
from sparse_attn.speed import Line, Size, cpu_line, measure, measured_line, worth_it

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def size(tokens, device=CPU, blocks=(256, 64), heads=12):
    return Size(device, torch.float32, heads, 16, tokens, blocks)


def test_break_even_is_what_was_measured():
    result = read("sparse")
    assert result is not None
    for row in result["attention"]:
        if row["density"] < 1:  # there the kernel attends densely, without a copy
            expected = cpu_line(tuple(row["blocks"])).at(row["executed"])
            measured = 1 / row["speedup"]["estimate"]
            # three rounds on a busy machine: their intervals are up to a quarter wide
            assert expected == pytest.approx(measured, rel=0.35, abs=0.03)


def test_short_sequences_and_dense_maps_are_not_worth_it():
    assert worth_it(size(8190), 0.25)
    assert not worth_it(size(1280), 0.25)
    assert not worth_it(size(8190), 0.9)
    assert not worth_it(size(1280, GPU), 0.1)


def test_a_line_is_measured_once_a_size_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a part")
    asked = []
    monkeypatch.setattr(speed, "measure", lambda s: asked.append(s) or Line(0.2, 1.6))
    measured_line.cache_clear()
    assert worth_it(size(8190, GPU), 0.4)
    assert not worth_it(size(9000, GPU), 0.6)  # 8,192 tokens stand for both
    (once,) = asked
    assert (once.tokens, once.heads) == (8192, 4)
    (kept,) = json.loads(speed.speeds_file().read_text()).items()
    assert kept[0].startswith("a part, torch ")
    assert kept[1] == [0.2, 1.6]
    measured_line.cache_clear()  # another process
    assert worth_it(size(8190, GPU), 0.4)
    assert len(asked) == 1
    speed.speeds_file().write_text("{ cut off")
    measured_line.cache_clear()
    assert worth_it(size(8190, GPU), 0.4)
    assert len(asked) == 2
    measured_line.cache_clear()


@pytest.mark.parametrize("text", ["[]", "null", '{"KEY": 5}', '{"KEY": [NaN, 1]}', '{"KEY": [1]}'])
def test_a_damaged_file_is_measured_again(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "measure", lambda s: Line(0.2, 1.6))
    file, wanted = speed.speeds_file(), size(8192)
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("KEY", wanted.key()))
    measured_line.cache_clear()
    assert measured_line(wanted) == Line(0.2, 1.6)
    assert json.loads(file.read_text()) == {wanted.key(): [0.2, 1.6]}
    measured_line.cache_clear()


def test_what_another_process_wrote_meanwhile_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, wanted = speed.speeds_file(), size(8192)
    file.parent.mkdir(parents=True)

    def slow(size):
        file.write_text('{"other": [0.1, 1.0]}')
        return Line(0.2, 1.6)

    monkeypatch.setattr(speed, "measure", slow)
    measured_line.cache_clear()
    measured_line(wanted)
    assert json.loads(file.read_text()) == {"other": [0.1, 1.0], wanted.key(): [0.2, 1.6]}
    measured_line.cache_clear()


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "accel").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a part")
    monkeypatch.setattr(speed, "measure", lambda s: Line(0.2, 1.6))
    measured_line.cache_clear()
    assert worth_it(size(8190, GPU), 0.4)
    measured_line.cache_clear()


def test_a_line_goes_through_what_was_measured(monkeypatch):
    """Dense 10 s, sparse 2 s at density 0.1 and 5 s at 0.4; the runs are real ones."""
    seconds = {0: 10.0, 1: 2.0, 2: 5.0}

    def in_turn(runs):
        shapes = [run() for run in runs]
        assert shapes[0].shape == shapes[1].out.shape
        return [[seconds[i]] for i in range(len(runs))]

    monkeypatch.setattr(speed, "_in_turn", in_turn)
    line = measure(size(256, blocks=(64, 64), heads=2))
    assert line.at(0.1) == pytest.approx(0.2)
    assert line.at(0.4) == pytest.approx(0.5)
    assert line.at(1.0) == pytest.approx(1.1)


def test_rounds_are_timed_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(speed, "ROUNDS", 2)
    seconds = speed._in_turn([lambda: order.append("a"), lambda: order.append("b")])
    assert order == ["a", "b"] * 3  # one round more, which does not count
    assert [len(times) for times in seconds] == [2, 2]
