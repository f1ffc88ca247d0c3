"""Time-shift as a method: every sample by itself, told to the network."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

import accel
from accel.testing import assert_equal, checks, conform, tiny
from samplers.shifted_time import TimeShiftDDIMScheduler
from samplers.time_shift import TimeShift

WIDE = {"window": 200, "cutoff": 0}
LATENT = {"variance_model": "signal", "v0": 0.5}


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(
    ("method", "pipeline"),
    [
        (TimeShift(**WIDE), "ddim"),
        (TimeShift(**WIDE, variant="pnm"), "ddpm"),
        (TimeShift(**WIDE, **LATENT), "dit"),
        (TimeShift(**WIDE, **LATENT, scheduler="PNDMScheduler"), "sd"),
    ],
    ids=["ddim", "ddpm-pnm", "dit", "sd-pndm"],
)
def test_conformance(check, method, pipeline):
    conform(check, method, pipeline)


def test_one_sample_equals_the_scheduler_alone():
    """Of one sample the batch's mean variance is its own, and the grid tells it."""
    host = tiny("ddim")
    with accel.attached(TimeShift(**WIDE), host.pipe) as live:
        by_method = host.run()
    assert live.report()["runs"][0]["detail"]["shifted_steps"] == 2  # at 500 and 250; not at 750, 0
    host.pipe.scheduler = TimeShiftDDIMScheduler.from_config(host.pipe.scheduler.config, **WIDE)
    assert_equal(by_method, host.run(), "the scheduler by hand")


@pytest.mark.parametrize("name", ["ddim", "dit"])
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    """DiT doubles its batches for guidance: both halves are told the time of their sample."""
    host = tiny(name)
    latent = LATENT if name == "dit" else {}

    def run(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        what = {"class_labels": [1] * len(seeds)} if name == "dit" else {"batch_size": len(seeds)}
        return host.run(generator=generators, **what)

    with accel.attached(TimeShift(**WIDE, **latent), host.pipe):
        together = run([5, 6])
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], run([5 + i]), rtol=1e-4, atol=1e-4)


def test_the_network_is_told_other_times():
    host = tiny("dit")
    told = []

    def listen(module, args, kwargs):
        told.append(kwargs["timestep"].tolist())

    host.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(listen, with_kwargs=True)
    with accel.attached(TimeShift(window=100, cutoff=0, variant="constant"), host.pipe):
        host.run()
    assert told == [[750, 750], [550, 550], [300, 300], [0, 0]]


def test_any_supported_scheduler_can_be_asked_for():
    host = tiny("ddpm")
    other = TimeShift(window=0, scheduler="DDIMScheduler")
    with accel.attached(other, host.pipe, strict=True) as live:
        assert isinstance(host.pipe.scheduler, TimeShiftDDIMScheduler)
        host.run()
        assert live.report()["effect"] == "some", "another solver is a change"
    assert type(host.pipe.scheduler) is DDPMScheduler


@pytest.mark.parametrize(
    ("method", "pipeline", "words"),
    [
        (TimeShift(), "dit", "variance does not tell time"),
        (TimeShift(), "flux", "no shifted form of FlowMatchEulerDiscreteScheduler"),
        (TimeShift(scheduler="EulerDiscreteScheduler"), "ddpm", "set scheduler to one of DDIM"),
        (TimeShift(scheduler="PNDMScheduler"), "ddpm", "with generator="),
    ],
)
def test_refusals(method, pipeline, words):
    with pytest.raises(ValueError, match=words):
        method.attach(tiny(pipeline).pipe)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"ShiftedTime: v0 = 0.9; .* does not tell time"):
        TimeShift(variance_model="signal", v0=0.9)


CANDIDATES = tuple(
    TimeShift(window=window, cutoff=0, variant=variant)
    for window in (100, 300)
    for variant in ("paper", "pnm")
)
CALLS = [{"batch_size": 1, "num_inference_steps": 4}] * 4


def darkness(images) -> float:
    return -float(images.mean())


def test_calibration_takes_the_best_of_those_that_beat_no_shift_in_both_halves():
    host = tiny("ddim")
    artifact = TimeShift.calibrate(host.pipe, CALLS, [1, 2, 3, 4], darkness, CANDIDATES)
    scores = artifact.tensors["scores"]
    assert scores.shape == (1 + len(CANDIDATES), 2)
    # by hand: one row and one half
    with accel.attached(CANDIDATES[2], host.pipe):
        images = [
            host.run(generator=torch.Generator().manual_seed(seed), output_type="np")
            for seed in (2, 4)
        ]
    assert float(scores[3, 1]) == pytest.approx(sum(map(darkness, images)) / 2, abs=1e-6)
    fair = [i for i in range(1, len(scores)) if (scores[i] < scores[0]).all()]
    assert fair, "none is brighter: this test shows nothing"
    best = min(fair, key=lambda i: float(scores[i].sum()))
    assert TimeShift.calibrated(artifact, host.pipe) == CANDIDATES[best - 1]


def test_calibration_chooses_no_shift_where_none_is_better(tmp_path):
    host = tiny("ddim")
    scores = iter([1.0, 1.0, 0.5, 1.5, 1.5, 0.5, 2.0, 2.0, 1.0, 1.0])
    artifact = TimeShift.calibrate(
        host.pipe, CALLS, [1, 2, 3, 4], lambda images: next(scores), CANDIDATES
    )
    loaded = type(artifact).load(artifact.save(tmp_path / "choice.safetensors"))
    assert TimeShift.calibrated(loaded, host.pipe) == TimeShift(window=0)
    with pytest.raises(ValueError, match="it is for UNet2DModel"):
        TimeShift.calibrated(loaded, tiny("dit").pipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": CALLS[:1], "seeds": [1]},
        {"seeds": [1, 2]},
        {"candidates": ()},
        {"candidates": (TimeShift(), TimeShift(scheduler="PNDMScheduler"))},
    ],
)
def test_calibration_says_what_it_wants(wrong):
    arguments = {"inputs": CALLS, "seeds": [1, 2, 3, 4], "candidates": CANDIDATES} | wrong
    with pytest.raises(ValueError, match="wants two calls or more"):
        TimeShift.calibrate(tiny("ddim").pipe, score=darkness, **arguments)
