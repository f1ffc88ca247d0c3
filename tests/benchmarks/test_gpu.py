"""What runs on a card by the minute: limits hold, trainings are held, and all is packed."""

from __future__ import annotations

import tarfile
from importlib.metadata import distributions

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part, Session

GROUP = "accel.methods"
TRAINING = """
import sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
end = time.monotonic() + 60 * float(sys.argv[sys.argv.index("--minutes") + 1])
out.mkdir(parents=True)
with (out / "ticks").open("w", buffering=1) as ticks:
    while time.monotonic() < end:
        print(time.monotonic(), file=ticks)
        time.sleep(0.02)
(out / "optimizer.bin").write_text("large")
"""
TIMED = """
import sys, time
print("from", time.monotonic())
time.sleep(float(sys.argv[1]))
print("to", time.monotonic())
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "some_training.py").write_text(TRAINING)
    (tmp_path / "some_study.py").write_text(TIMED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, seconds in {"STARTING": 1, "ENDING": 0, "LEAST": 0.1}.items():
        monkeypatch.setattr(gpu, name, seconds)


def test_a_training_is_held_while_something_is_timed(modules, tmp_path, capsys):
    session = Session(tmp_path / "out", 5)
    session.train({"one": "some_training"})
    session.together([Part("some_study 0.5", 9)])
    session.alone([Part("some_study 0.6", 9), Part("some_study 60", 0.3)])
    session.finish()
    ticks = [float(x) for x in (tmp_path / "out/trained/one/ticks").read_text().split()]
    first = (tmp_path / "out/log/some_study_0.5.txt").read_text().split()
    timed = (tmp_path / "out/log/some_study_0.6.txt").read_text().split()
    assert any(float(first[1]) < t < float(first[3]) for t in ticks)
    assert not any(float(timed[1]) < t < float(timed[3]) for t in ticks)
    assert ticks[-1] > float(timed[3]), "it went on"
    said = capsys.readouterr().out
    assert "some_study 60: out of time" in said
    assert "one: status 0" in said
    with tarfile.open(tmp_path / "out/one.tgz") as archive:
        assert archive.getnames() == ["one", "one/ticks"]
    assert {"log.tgz", "results.tgz"} <= {f.name for f in (tmp_path / "out").iterdir()}


def test_what_there_is_no_time_for_is_said(modules, tmp_path, capsys):
    session = Session(tmp_path / "out", 0)
    session.alone([Part("some_study 0", 9)])
    assert "no time for some_study 0" in capsys.readouterr().out
    assert not (tmp_path / "out/log/some_study_0.txt").exists()


def test_every_part_names_what_there_is():
    for part in (*gpu.TESTS, *gpu.TUNE, *gpu.BENCH):
        module = part.command.split()[0]
        assert module == "pytest" or (gpu.PROJECT / f"{module.replace('.', '/')}.py").is_file()
    names = [part.name for part in (*gpu.TESTS, *gpu.BENCH)]
    assert len(set(names)) == len(names), "logs would be written over"


def test_methods_of_a_project_that_is_not_installed_are_found(tmp_path):
    (found,) = distributions(name="accel", path=[str(gpu.registered(tmp_path))])
    (there,) = distributions(name="accel")
    ours, installed = ({e for e in d.entry_points if e.group == GROUP} for d in (found, there))
    assert {(e.name, e.value) for e in ours} == {(e.name, e.value) for e in installed}
    assert ours
