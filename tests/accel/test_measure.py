"""Paired timing, counted work, memory, and the comparison that goes into a recipe file."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from accel import measure
from accel.method import Recipe, attached
from accel.metrics.protocol import Protocol
from accel.testing import tiny
from caches.native import FirstBlockCache
from samplers.epsilon_scaling import EpsilonScaling
from samplers.swap import SwapScheduler


def test_paired_time_alternates_and_takes_ratios(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def slow():
        order.append("a")
        clock[0] += 4.0

    def fast():
        order.append("b")
        clock[0] += 1.0

    times = measure.paired_time(slow, fast, rounds=4, warmup=1)
    assert "".join(order) == "abbaabbaab"
    assert len(times.seconds_a) == len(times.seconds_b) == 4
    assert times.speedup.low == times.speedup.high == 4
    with pytest.raises(ValueError, match="rounds"):
        measure.paired_time(slow, fast, rounds=0)


def test_entering_and_leaving_is_not_timed():
    @contextmanager
    def slow():
        time.sleep(0.03)
        yield

    times = measure.paired_time(lambda: None, lambda: None, rounds=2, around=(slow, nullcontext))
    assert max(times.seconds_a) < 0.03


INPUTS = [{"class_labels": [c], "num_inference_steps": 4, "guidance_scale": 3.0} for c in (1, 2)]


def test_comparison_of_a_cache():
    host = tiny("dit")
    result = measure.compare(host.pipe, Recipe((FirstBlockCache(10.0),)), INPUTS, rounds=1)
    assert result.flops[1] < result.flops[0]
    assert result.nfe == (16, 16)  # the denoiser is still called; its blocks are not
    assert 0 < result.psnr.estimate < measure.PSNR_CAP
    assert result.report["effect"] == "some"
    measured = result.measured()
    assert json.loads(json.dumps(measured)) == measured
    assert measured["samples"] == 2
    assert {"hardware", "versions", "date", "threads", "commit", "load"} == set(
        measured["environment"]
    )
    assert Protocol.read(measured["protocol"]) == result.protocol
    assert len(result.per_sample["psnr"]) == 2
    assert result.judged is None, "nobody was asked"


def test_comparison_counts_fewer_evaluations_of_another_sampler():
    host = tiny("dit")
    same = measure.compare(host.pipe, Recipe(()), INPUTS, rounds=1)
    assert same.psnr.estimate == measure.PSNR_CAP
    assert same.flops[0] == same.flops[1]
    fewer = Recipe((SwapScheduler("DPMSolverMultistepScheduler", steps=3),))
    assert measure.compare(host.pipe, fewer, INPUTS, rounds=1).nfe == (16, 12)


def test_no_inputs():
    host = tiny("dit")
    with pytest.raises(ValueError, match="0 inputs"):
        measure.compare(host.pipe, Recipe(()), [])
    with pytest.raises(ValueError, match="2 inputs, 1 seeds"):
        measure.compare(host.pipe, Recipe(()), INPUTS, seeds=[1])


SOLVER = Recipe((SwapScheduler("DPMSolverMultistepScheduler", steps=3),))


def _blind(samples, inputs):
    """Right is what is bright; the features are the rows of the picture."""
    assert samples.dtype == np.uint8
    assert samples.shape[-1] == 3
    assert len(inputs) == len(samples)
    return measure.Verdict(samples.mean((1, 2, 3)) > 127, samples[:, :2, 0, 0].astype(float))


def test_a_referee_judges_both_sides_and_real_samples_give_the_floor():
    rng = np.random.default_rng(0)
    inputs = [{**INPUTS[0], "num_inference_steps": 2}] * 4

    def real(inputs, draw):
        return rng.normal(draw, 1, (len(inputs), 2))

    referee = measure.Referee("blind", "0" * 64, _blind, real)
    study = measure.Study(tiny("dit").pipe, inputs, timed=1, referee=referee)
    result = study.compare(SOLVER, rounds=1)
    assert result.judged is not None
    right = result.per_sample["right"]
    assert result.judged.after.estimate == np.mean(right)
    before = study.run().verdict.right
    assert result.judged.difference.estimate == pytest.approx(np.mean(right) - before.mean())
    assert result.judged.frechet is not None
    assert result.judged.feature_distance.estimate == pytest.approx(
        np.mean(result.per_sample["feature_distance"]), abs=1e-4
    )  # per-sample values are rounded to 4 places
    assert (result.protocol.features, result.protocol.features_sha256) == ("blind", "0" * 64)
    assert result.nfe == (4, 6), "work is of the one timed input"
    assert len(right) == 4, "quality is of all"


def test_too_few_samples_have_no_frechet_distance():
    referee = measure.Referee("blind", "0" * 64, _blind, lambda inputs, draw: np.zeros((2, 2)))
    study = measure.Study(tiny("dit").pipe, INPUTS, referee=referee)
    assert study.compare(SOLVER, rounds=1).judged.frechet is None  # 2 samples of 2 features


def test_the_plain_pipeline_runs_once_for_all_recipes(monkeypatch):
    study = measure.Study(tiny("dit").pipe, INPUTS[:1])
    plain = study.run()
    assert study.compare(SOLVER, rounds=1).psnr.estimate < measure.PSNR_CAP
    assert study.run() is plain
    over = study.compare(SOLVER, base=SOLVER, rounds=1)
    assert over.psnr.estimate == measure.PSNR_CAP
    assert over.nfe == (6, 6)


def test_protocols_of_other_inputs_or_weights_differ():
    pipe = tiny("dit").pipe
    one = measure.Study(pipe, INPUTS[:1]).protocol()
    assert measure.Study(pipe, INPUTS[:1]).protocol() == one
    assert measure.Study(pipe, INPUTS[1:2]).protocol() != one
    assert measure.Study(pipe, INPUTS[:1], seeds=[7]).protocol() != one
    for parameter in pipe.transformer.parameters():
        parameter.data += 1
    assert measure.Study(pipe, INPUTS[:1]).protocol() != one


def test_what_is_timed_must_be_there():
    with pytest.raises(ValueError, match="timed = 4 of 2"):
        measure.Study(tiny("dit").pipe, INPUTS, timed=4)


def test_a_call_that_ends_before_its_grid_is_counted():
    host = tiny("sdxl")
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    counted = measure.Study(host.pipe, [{**call, "denoising_end": 0.5}] * 2).run()
    assert [run["steps"] for run in counted.report["runs"]] == [2, 2]
    assert counted.nfe == 2 * 2 * 2  # calls, steps, guidance


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"class_labels": [3], "steps": 4}, "TypeError: .* unexpected keyword argument 'steps'"),
        ({"class_labels": [10**6], "num_inference_steps": 2}, "IndexError: index out of range"),
    ],
)
def test_a_call_that_fails_is_told_with_its_arguments_and_what_was_attached(inputs, words):
    study = measure.Study(tiny("dit").pipe, [inputs])
    with pytest.raises(ValueError, match=f"^DiTPipeline failed on .*class_labels.*: {words}"):
        study.compare(SOLVER, rounds=1)
    with pytest.raises(ValueError, match=r"^DiTPipeline under samplers.swap:SwapScheduler failed"):
        study.run(SOLVER)


def test_an_output_that_is_not_finite_has_no_figures():
    study = measure.Study(tiny("dit").pipe, INPUTS[:1])
    with pytest.raises(ValueError, match=r"under samplers\.epsilon_scaling:.* not finite"):
        study.compare(EpsilonScaling(scale=1e-300), rounds=1)


def test_a_scheduler_that_is_given_no_generator_draws_the_same_for_the_same_seed():
    pipe = tiny("dit").pipe
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    before = torch.get_rng_state()
    one, same, other = (measure.pipeline_samples(pipe, INPUTS[0], seed) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_accelerated_already_is_not_measured_as_plain():
    pipe = tiny("dit").pipe
    with attached(FirstBlockCache(0.1), pipe), pytest.raises(ValueError, match="before measuring"):
        measure.Study(pipe, INPUTS)


def test_inputs_of_two_sizes_are_told_apart():
    host = tiny("sd")
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    study = measure.Study(host.pipe, [call, {**call, "width": call["width"] * 2}])
    with pytest.raises(ValueError, match=r"input 1 makes samples of \[3, .*\], input 0 of \[3, "):
        study.run()
