"""One worker, one task: fallbacks, notes, and what a recipe may do to a render."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import accel
from accel.method import Method, Recipe
from accel.recipe_file import RecipeFile
from accel.testing import tiny
from apps.render import plan as plan_module
from apps.render import worker as worker_module
from apps.render.faults import InvalidJob, NotFinite
from apps.render.jobs import read_jobs
from apps.render.media import frames_sha256
from apps.render.outputs import read_sidecar
from apps.render.worker import Worker
from apps.render.worker_settings import WORK_FOLDER, WorkerSettings


@dataclass(frozen=True)
class Touch(Method):
    """Scales the denoiser's output; `factor` NaN spoils it, 1 changes nothing."""

    SLOTS = ("denoiser.call",)
    factor: float = 1.0

    def claims(self, pipe):
        if self.factor < 0:
            raise ValueError("Touch.factor = -1: must not be negative; use 1")
        return frozenset({("denoiser.call", frozenset({"transformer"}))})

    def build(self, pipe, live):
        def layer(call_next, *args, **kwargs):
            output = call_next(*args, **kwargs)
            output.sample.mul_(self.factor)
            live.count("changed", int(self.factor != 1.0))
            return output

        live.around_call(pipe.transformer, layer)


@dataclass(frozen=True)
class TouchDecoder(Method):
    """Acts on the autoencoder, so it must be attached while that runs."""

    SLOTS = ("linear",)

    def claims(self, pipe):
        return frozenset({("linear", frozenset({"vae.decoder"}))})

    def build(self, pipe, live):
        live.patch.around(pipe.vae.decoder, "forward", lambda call, *a, **k: call(*a, **k) * 0.5)


@pytest.fixture
def run(tmp_path, planned, rows, monkeypatch):
    """`run(method, **settings)`: render one job with a recipe of one method; (result, sidecar)."""
    out = tmp_path / "out"
    (out / WORK_FOLDER).mkdir(parents=True)
    monkeypatch.setattr(plan_module, "_RECIPES", {})
    events = []

    def go(method=None, job=None, **settings):
        if method is not None:
            found = RecipeFile(Recipe((method,)), "test")
            monkeypatch.setattr(accel, "read_recipe", lambda path: found)
            settings["recipe"] = str(tmp_path / "recipe.yaml")
        (task,) = planned(rows(1, **(job or {})), **settings)
        worker = Worker(WorkerSettings(str(out)))
        worker.emit = events.append
        result = worker.run(task.id, task.payload)
        return result, read_sidecar(out / f"{task.stem}.json")

    go.events = events
    return go


def test_a_plain_job_and_its_story(run):
    result, sidecar = run()
    assert result["files"] == ["job0.png"]
    assert result["fallback"] is None
    assert set(sidecar["timings"]) == {"encode", "denoise", "decode", "total"}
    assert sidecar["report"]["runs"][0]["steps"] == 2
    kinds = [event["event"] for event in run.events]
    assert kinds == ["loading", "step", "step", "stage", "stage"]
    assert sidecar["versions"]["torch"] == torch.__version__


def test_a_stochastic_scheduler_without_a_generator_is_repeatable(tmp_path, job_file, rows):
    """DiTPipeline gives its scheduler no generator: the seed must decide all the same."""
    pipe = tiny("dit").pipe
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(str(tmp_path / "ddpm"))
    path = job_file(rows(2))
    settings = plan_module.Settings(model=str(tmp_path / "ddpm"))
    tasks = plan_module.plan(read_jobs(path), settings, path.parent)
    hashes = []
    for order in (tasks, tasks[::-1]):
        out = tmp_path / f"out{len(hashes)}"
        (out / WORK_FOLDER).mkdir(parents=True)
        worker = Worker(WorkerSettings(str(out)))
        state = torch.get_rng_state()
        made = {task.id: worker.run(task.id, task.payload)["frames_sha256"] for task in order}
        assert torch.equal(state, torch.get_rng_state())
        hashes.append(made)
    assert hashes[0] == hashes[1]


def test_a_recipe_acts_and_reports(run):
    plain, _ = run()
    touched, sidecar = run(Touch(0.9))
    assert touched["frames_sha256"] != plain["frames_sha256"]
    assert sidecar["report"]["members"][0]["effect"] == "some"
    assert touched["fallback"] is None


def test_what_a_recipe_changes_in_the_call_is_done_and_said(run, monkeypatch):
    monkeypatch.setattr(Touch, "call_changes", lambda self: {"guidance_scale": 1.0})
    _, before = run()
    _, after = run(Touch(0.9))
    nfe = [sidecar["report"]["runs"][0]["nfe"] for sidecar in (before, after)]
    assert nfe == [4, 2], "guided, and without guidance"
    assert after["call_changes"] == {"guidance_scale": 1.0}
    assert before["call_changes"] == {}
    assert after["notes"] == before["notes"] == [], "nothing to warn of"


def test_a_recipe_for_the_autoencoder_is_there_when_it_decodes(run, tiny_model):
    result, sidecar = run(TouchDecoder())
    pipe = accel.load(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    job = sidecar["payload"]["job"]
    call = {**job["inputs"], "generator": torch.Generator("cpu").manual_seed(job["seed"])}
    with accel.attached(TouchDecoder(), pipe), pytest.warns(accel.NoEffectWarning):
        (image,) = pipe(**call).images
    assert result["frames_sha256"] == [frames_sha256(np.asarray(image))]
    assert result["frames_sha256"] != run()[0]["frames_sha256"]


def test_nan_under_a_recipe_is_made_again_without(run):
    plain, _ = run()
    result, sidecar = run(Touch(1e300))  # beyond float32, so that what follows is no number
    assert result["frames_sha256"] == plain["frames_sha256"]
    assert result["fallback"]["reason"] == "nan"
    assert sidecar["fallback"]["recipe"] == sidecar["payload"]["recipe_sha256"]


def test_nan_without_a_recipe_is_a_failure(run, monkeypatch):
    monkeypatch.setattr(worker_module.stages, "decode", lambda *a: np.full((1, 4, 4, 3), np.nan))
    with pytest.raises(NotFinite, match="without acceleration too"):
        run()


@pytest.mark.parametrize("reason", ["black", "frozen", "nan"])
def test_suspicious_frames_under_a_recipe_are_made_again(run, monkeypatch, reason):
    plain, _ = run()
    verdicts = [reason, None]
    monkeypatch.setattr(worker_module, "suspicion", lambda frames: verdicts.pop(0))
    result, _ = run(Touch(0.9))
    assert result["fallback"]["reason"] == reason
    assert result["frames_sha256"] == plain["frames_sha256"]


def _search(**more):
    return {"search": {"verifier": "brightness", "budget": "2 renders", **more}}


@pytest.mark.parametrize("reason", ["black", "nan"])
def test_what_was_found_under_a_recipe_is_made_again_without(run, monkeypatch, reason):
    verdicts, finite = ["black", None], [False, True]
    if reason == "black":
        monkeypatch.setattr(worker_module, "suspicion", lambda frames: verdicts.pop(0))
    else:
        judged = worker_module.latents_file.Latents
        monkeypatch.setattr(judged, "is_finite", lambda latents: finite.pop(0))
    _, sidecar = run(Touch(0.9), _search())
    assert sidecar["fallback"]["reason"] == reason
    assert sidecar["report"]["members"] == []
    monkeypatch.undo()
    result, _ = run(None, {"noise": sidecar["search"]["path"]})
    assert result["frames_sha256"] == [file["frames_sha256"] for file in sidecar["files"]]


def test_a_recipe_of_drafts_is_no_reason_to_render_again(run, monkeypatch):
    monkeypatch.setattr(worker_module, "suspicion", lambda frames: "black")
    job = _search(algorithm="draft-commit", settings={"candidates": 2})
    result, _ = run(Touch(0.9), job)
    assert result["fallback"] is None
    assert result["notes"][-1] == "the output is black, without acceleration too"


def test_commands_of_a_verifier_are_trusted_by_a_person_and_not_by_a_payload(
    tmp_path, planned, rows
):
    started = tmp_path / "started"
    job = _search(verifier=f"worker:touch {started}")
    (task,) = planned(rows(1, **job), trusted=True)
    (tmp_path / WORK_FOLDER).mkdir()
    with pytest.raises(InvalidJob, match=r"starts no command .* --trust-verifiers"):
        Worker(WorkerSettings(str(tmp_path))).run(task.id, task.payload | {"trusted": True})
    assert not started.exists()
    trusting = WorkerSettings(str(tmp_path), trusted=frozenset({task.id}))
    with pytest.raises(Exception, match="touch"):
        Worker(trusting).run(task.id, task.payload)
    assert started.exists()


def test_black_with_and_without_a_recipe_is_kept_with_a_note(run, monkeypatch):
    monkeypatch.setattr(worker_module.stages, "decode", lambda *a: np.zeros((1, 4, 4, 3)))
    for method in (None, Touch(0.9)):
        result, _ = run(method)
        assert result["notes"] == ["the output is black, without acceleration too"]


def test_a_recipe_without_effect_is_noted_or_refused(run):
    result, _ = run(Touch(1.0))
    assert "NoEffectWarning" in result["notes"][0]
    with pytest.raises(InvalidJob, match="changed nothing"):
        run(Touch(1.0), strict=True)


def test_a_recipe_that_does_not_fit_is_an_invalid_job(run):
    with pytest.raises(InvalidJob, match=r"Touch.factor = -1: must not be negative"):
        run(Touch(-1.0))


def test_a_model_that_cannot_be_loaded_is_tried_once(run, tmp_path, planned, rows, monkeypatch):
    calls = []

    def load(*_, **__):
        calls.append(1)
        raise OSError("no file named\n diffusion_pytorch_model.safetensors")

    monkeypatch.setattr(accel, "load", load)
    worker = Worker(WorkerSettings(str(tmp_path / "out")))
    for task in planned(rows(3)):
        with pytest.raises(InvalidJob, match=r"cannot be loaded: no file named diffusion"):
            worker.run(task.id, task.payload)
    assert len(calls) == 1
    monkeypatch.setattr(worker_module, "FORGET_SECONDS", 0.0)
    with pytest.raises(InvalidJob, match="cannot be loaded"):
        worker.run(task.id, task.payload)
    assert len(calls) == 2, "what is there again is loaded"


def test_threads_are_put_back(run):
    before = torch.get_num_threads()
    _, sidecar = run(threads=before + 1)
    assert torch.get_num_threads() == before
    assert sidecar["payload"]["threads"] == before + 1


def test_several_samples_of_one_job(tmp_path, planned):
    out = tmp_path / "out"
    (out / WORK_FOLDER).mkdir(parents=True)
    inputs = {"class_labels": [1, 2], "num_inference_steps": 2}
    (task,) = planned([{"name": "two", "inputs": inputs}])
    result = Worker(WorkerSettings(str(out))).run(task.id, task.payload)
    assert result["files"] == ["two.000.png", "two.001.png"]
    assert len(set(result["frames_sha256"])) == 2


def test_a_video_from_file_to_file(tmp_path, monkeypatch):
    """A text-free tiny Wan cannot take JSON inputs; its embeddings are put in by hand."""
    pytest.importorskip("av")
    from accel.tiny import tiny

    subject = tiny("wan")
    tensors = {k: v for k, v in subject.inputs.items() if torch.is_tensor(v)}
    plain = {k: v for k, v in subject.inputs.items() if k not in tensors and k != "output_type"}
    real = worker_module.stages.denoise
    monkeypatch.setattr(
        worker_module.stages, "denoise", lambda pipe, call, cut: real(pipe, call | tensors, cut=cut)
    )
    monkeypatch.setattr(accel, "load", lambda *a, **k: subject.pipe)
    monkeypatch.setattr(worker_module, "model_revision", lambda ref: "sha256:x")
    payload = {
        "job": {"seed": 3, "inputs": plain, "format": "auto", "fps": 8},
        "model": "x", "model_revision": "sha256:x", "recipe": None, "recipe_sha256": None,
        "threads": 1, "dtype": "float32", "device": "cpu", "strict": False, "metadata": True,
        "stem": "clip",
    }  # fmt: skip
    (tmp_path / WORK_FOLDER).mkdir()
    result = Worker(WorkerSettings(str(tmp_path))).run("id", payload)
    assert result["files"] == ["clip.mp4"]
    sidecar = json.loads((tmp_path / "clip.json").read_text())
    assert len(sidecar["files"][0]["shape"]) == 4
