"""The demo from end to end on a tiny model, and the jobs it ships with."""

import json
from pathlib import Path

from apps import demo
from apps.render.jobs import read_jobs

ROOT = Path(__file__).resolve().parents[2]


def test_shipped_jobs_are_valid_and_named_after_their_classes():
    from accel.zoo.world import class_label

    placed = read_jobs(ROOT / "examples" / "demo.jsonl")
    assert len(placed) == 12
    for item in placed:
        (label,) = item.job.inputs["class_labels"]
        assert item.job.name == class_label(label).replace(" ", "-")


def test_from_jobs_to_sheet(tmp_path, tiny_model, job_file, rows, capsys):
    recipe = tmp_path / "fast.yaml"
    recipe.write_text(
        "accel_recipe: 1\nname: fast\nmethods:\n"
        "  - {method: 'samplers.swap:SwapScheduler', settings: {scheduler: DDPMScheduler}}\n"
    )
    arguments = ["--jobs", job_file(rows(2)), "--model", tiny_model, "--out", tmp_path / "demo"]
    arguments = [str(a) for a in [*arguments, "--recipes", recipe]]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "baseline" in shown
    assert "fast" in shown
    assert "dB" in shown
    assert (tmp_path / "demo" / "sheet.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").glob("*/*.json")}
    assert len(before) == 4
    assert demo.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before, "finished work was done again"


def test_wrong_input_is_told(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"sed": 1}))
    assert demo.main(["--jobs", str(bad), "--out", str(tmp_path / "out")]) == 2
    assert "unknown field 'sed'" in capsys.readouterr().err


def test_every_shipped_recipe_of_the_demo_s_model_is_in_the_demo(monkeypatch):
    names = [path.stem for path in demo.measured_on("zoo:digits-dit")]
    assert names[-1] == "dpm-cache", "the combination comes last"
    assert {"dpm", "taylor", "digits-dit-4-steps", "digits-dit-1-step"} < set(names)
    assert not [name for name in names if name.startswith("digits-sd")]


def test_a_student_is_timed_as_it_is_called(tmp_path, monkeypatch):
    """Its recipe calls without guidance, and the plain side stays guided."""
    monkeypatch.setattr(demo, "ROUNDS", 1)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text((ROOT / "examples" / "demo.jsonl").read_text().splitlines()[0] + "\n")
    student = ROOT / "recipes" / "digits-dit-4-steps.yaml"
    results = demo.run(jobs, "zoo:digits-dit", [student], tmp_path / "out", 1)
    assert [result.rendered[0].evaluations for result in results] == [100, 4]
    assert results[1].time is not None
