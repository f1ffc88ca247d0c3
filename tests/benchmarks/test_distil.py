"""The command that distils the embedded models, on two updates of one of them."""

import dataclasses
import sys

import pytest
import torch

import accel
from accel import zoo
from benchmarks import distil
from samplers.tdm import TDM


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["distil", *map(str, argv)])
    distil.main()


def test_a_gpu_that_is_not_there_is_asked_for_in_vain(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        run(monkeypatch, "digits-wan-4-steps", "--device", "cuda", "--out", tmp_path)


def test_minutes_alone_are_the_only_end():
    trainer = TDM((899, 449), updates=5)
    assert distil.limited(trainer, None, None) == trainer
    assert distil.limited(trainer, 7, None) == dataclasses.replace(trainer, updates=7)
    loop = distil.limited(trainer, None, 0.5)._loop()
    assert loop.minutes == 0.5
    assert (loop.steps or 0) > 10**6
    both = distil.limited(trainer, 7, 0.5)
    assert (both.updates, both.minutes) == (7, 0.5)


@pytest.mark.skipif("digits-dit" not in zoo.names(), reason="digits-dit is not shipped")
def test_a_student_is_trained_within_its_time_and_loads(monkeypatch, tmp_path):
    student = distil.STUDENTS["digits-dit-4-steps"]
    quick = dataclasses.replace(student.trainer, warmup=1, fake_updates=1)
    students = {"tried": dataclasses.replace(student, trainer=quick, batches=2, shipped=False)}
    monkeypatch.setattr(distil, "STUDENTS", students)
    run(monkeypatch, "tried", "--minutes", 0.01, "--batch", 2, "--out", tmp_path)
    recipe = accel.read_recipe(tmp_path / "tried.yaml").recipe
    pipe = accel.load(student.model)
    with accel.attached(recipe, pipe):
        call = {"class_labels": [3], "num_inference_steps": 4, "guidance_scale": 1.0}
        images = pipe(**call, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
