"""The block that every figure is stored with."""

from __future__ import annotations

import subprocess

import torch

from accel import environment


def test_names_everything_a_time_depends_on():
    block = environment.environment("cpu", load_before=0.5)
    assert block["threads"] == torch.get_num_threads()
    assert "cores" in block["hardware"]
    assert {"python", "torch", "diffusers"} <= set(block["versions"])
    before, after = block["load"]
    assert before == 0.5
    assert after is None or after >= 0


def test_a_changed_file_is_not_passed_off_as_its_commit(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    code = tmp_path / "accel" / "environment.py"
    code.parent.mkdir()
    code.write_text("a = 1\n")
    monkeypatch.setattr(environment, "__file__", str(code))
    git("init")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    clean = environment.commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "accel" / "result.json").write_text("{}")
    assert environment.commit() == clean, "results are no code"
    code.write_text("a = 2\n")
    assert environment.commit() == f"{clean}+changed"


def test_without_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "accel" / "environment.py"))
    assert environment.commit() is None


def test_an_accelerator_is_named_with_its_driver(monkeypatch):
    said = subprocess.CompletedProcess([], 0, stdout="580.159.04\n580.159.04\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: said)
    environment._driver.cache_clear()
    found = environment.accelerator_versions("cuda")
    environment._driver.cache_clear()
    assert found["driver"] == "580.159.04"
    assert all(isinstance(value, str) for value in found.values())
    assert environment.accelerator_versions("cpu") == {}
