"""Models and recipes are resolved before anything starts."""

import json

import pytest

import accel
from apps.render.identity import identity
from apps.render.jobs import JobFileError, check_jobs
from apps.render.plan import (
    PlannedTask,
    Settings,
    load_plan,
    merge_plans,
    plan,
    save_plan,
)

RECIPE = """
accel_recipe: 1
name: swap
methods:
  - {method: "samplers.swap:SwapScheduler", settings: {scheduler: DDPMScheduler}}
"""


def _plan(rows, folder, **settings):
    placed = check_jobs((f"line {n}", row) for n, row in enumerate(rows, 1))
    return plan(placed, Settings(**settings), folder)


def _problem(rows, folder, **settings):
    with pytest.raises(JobFileError) as caught:
        _plan(rows, folder, **settings)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_missing_things_are_one_line_each(tmp_path, tiny_model):
    assert _problem([{}], tmp_path) == "line 1: no model: give the job one, or use --model"
    assert "is no folder, no zoo:NAME" in _problem([{"model": "/no/where"}], tmp_path)
    assert "no model_index.json" in _problem([{"model": str(tmp_path)}], tmp_path)
    assert "no embedded model 'none'" in _problem([{"model": "zoo:none"}], tmp_path)
    missing = _problem([{"recipe": "r.yaml"}], tmp_path, model=tiny_model)
    assert missing.startswith("line 1: no recipe at")
    (tmp_path / "r.yaml").write_text("accel_recipe: 1\nmethods: [!!python/name:os.system x]")
    broken = _problem([{"recipe": "r.yaml"}], tmp_path, model=tiny_model)
    assert "not a readable recipe" in broken


def test_which_recipe_a_job_gets(tmp_path, tiny_model):
    for name in ("own.yaml", "given.yaml"):
        (tmp_path / name).write_text(RECIPE)
    given = str(tmp_path / "given.yaml")
    rows = [{"seed": 1}, {"seed": 2, "recipe": None}, {"seed": 3, "recipe": "own.yaml"}]
    tasks = _plan(rows, tmp_path, model=tiny_model, recipe=given)
    assert [t.payload["recipe"] for t in tasks] == [given, None, str(tmp_path / "own.yaml")]
    assert tasks[0].payload["recipe_sha256"] == accel.read_recipe(given).sha256
    assert tasks[0].bucket != tasks[1].bucket


def test_a_model_folder_brings_its_recipe(tmp_path, tiny_model):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "accel_recipe.yaml").write_text(RECIPE)
    (task,) = _plan([{}], tmp_path, model=str(folder))
    assert task.payload["recipe"] == str(folder / "accel_recipe.yaml")


def test_a_hub_id_brings_its_recipe(tmp_path, monkeypatch):
    """Of the commit that the job's model has, by the link in the hub's cache, fetched once."""
    commit, asked = "c" * 40, []
    snapshot = tmp_path / "hub" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blob").write_text(RECIPE)
    (snapshot / "accel_recipe.yaml").symlink_to(tmp_path / "hub" / "blob")

    def download(ref, *, allow_patterns, revision=None):
        asked.append((ref, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    first, second, without = _plan(
        [{"seed": 1}, {"seed": 2}, {"seed": 3, "recipe": None}], tmp_path, model="me/fast-plan"
    )
    assert first.payload["model_revision"] == f"hub:{commit}"
    assert first.payload["recipe"] == str(snapshot / "accel_recipe.yaml")
    assert second.payload["recipe"] == first.payload["recipe"]
    assert without.payload["recipe"] is None
    assert asked == [("me/fast-plan", None), ("me/fast-plan", commit)]


def _task(seed, stem, **more):
    parts = {"model_revision": "m", "recipe_sha256": None, "threads": 1, "dtype": "float32"}
    payload = {"job": {"seed": seed}, **parts, "device": "cpu", **more}
    return PlannedTask(identity(payload), stem, payload)


def test_plans_merge_by_identity_and_stem(tmp_path):
    old = [_task(1, "a"), _task(2, "b")]
    new = [_task(2, "b", recipe="moved"), _task(3, "A"), _task(4, "c")]
    merged = merge_plans(old, new)
    assert merged == new
    save_plan(tmp_path, merged)
    assert load_plan(tmp_path) == merged
    lines = (tmp_path / "plan.jsonl").read_text().splitlines()
    assert [json.loads(line)["stem"] for line in lines] == list("bAc")
    with pytest.raises(FileNotFoundError, match="holds no render"):
        load_plan(tmp_path / "none")


@pytest.mark.parametrize("space", ["\u2028", "\u2029", "\u0085"])
def test_a_prompt_may_hold_any_line_break(tmp_path, space):
    tasks = [_task(1, "a", prompt=f"a red{space}three"), _task(2, "b")]
    save_plan(tmp_path, tasks)
    assert load_plan(tmp_path) == tasks


def test_a_job_that_was_changed_in_the_plan_is_refused(tmp_path):
    task = _task(1, "a")
    save_plan(tmp_path, [PlannedTask(task.id, "a", task.payload | {"job": {"seed": 2}})])
    with pytest.raises(ValueError, match="'a' is not the job that its identity is of"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        "[]",
        json.dumps({"id": "1" * 64, "stem": "../a", "payload": {}}),
        json.dumps({"id": "../" * 20, "stem": "a", "payload": {}}),
    ],
)
def test_a_damaged_plan_is_explained(tmp_path, line):
    (tmp_path / "plan.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"plan.jsonl is damaged .* remove it and run"):
        load_plan(tmp_path)
