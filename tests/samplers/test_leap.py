"""Ending a flow's path early."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline

import accel
from accel.testing import assert_equal, checks, conform, tiny
from samplers.leap import Leap, Steadiness, _steps, cosine
from samplers.swap import SwapScheduler

EULER = SwapScheduler("FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_conformance(check, name):
    conform(check, Leap(after=0.7), name)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["flux", "hunyuanvideo", "ltx"])
def test_conformance_matrix(check, name):
    conform(check, Leap(after=0.7), name)


@pytest.mark.parametrize(
    ("sequence", "leap"),
    [
        (lambda i: 0.99, 17),
        (lambda i: 1 - 0.5 * math.exp(-i / 3), 23),
        (lambda i: 1 - 0.5 * math.exp(-i / 6), None),
        (lambda i: 0.5 + i / 60, None),
    ],
)
def test_the_trigger_leaps_where_the_authors_does(sequence, leap):
    trigger = Steadiness(14, 1e-3, 3)
    found = next((i for i in range(30) if trigger.leaps(i, sequence(i))), None)
    assert found == leap


def test_cosines():
    a = torch.randn(2, 3, 4, 5, 6)
    b = torch.cat([a[:1], -a[1:]])
    assert cosine(a, a, "full") == pytest.approx(1)
    assert cosine(a, b, "full") == pytest.approx(-1), "the least steady sample counts"
    assert cosine(a, b, "official") == pytest.approx(1), "the first sample counts"
    row = torch.nn.functional.cosine_similarity(a[0, 0, 0], a[1, 0, 0], dim=-1).mean()
    assert cosine(a[:1], a[1:], "official") == pytest.approx(float(row), rel=1e-5)


@pytest.mark.parametrize(("name", "swap"), [("sd3", ()), ("wan", ()), ("wan", (EULER,))])
def test_the_leap_lands_at_the_predicted_clean_sample(name, swap):
    host = tiny(name)
    seen = []

    def note(pipe, step, t, given):
        seen.append(given["latents"].clone())
        return given

    with accel.attached([*swap, Leap(after=0.5)], host.pipe) as live:
        host.run(num_inference_steps=6, callback_on_step_end=note)
        report = live.report()["members"][-1]["runs"][0]
    assert report["detail"]["leapt_at"] == 2
    assert report["skipped"] == report["computed"], "as many steps after the leap as before"
    rows = 1 if name == "wan" else 2  # of a call: Wan asks for its branches one by one
    assert report["nfe"] == rows * report["computed"], "what was skipped is no evaluation"
    for later in seen[3:]:
        assert torch.equal(later, seen[2]), "nothing moves after the leap"
    plain = []
    with accel.attached(list(swap), host.pipe):
        host.run(
            num_inference_steps=6,
            callback_on_step_end=lambda p, s, t, g: plain.append(g["latents"].clone()) or g,
        )
    for before, after in zip(plain[:2], seen[:2], strict=True):
        assert torch.equal(before, after), "and before it everything is as it was"
    assert not torch.equal(plain[2], seen[2])


def test_two_stages_are_one_step():
    """Of ten of Heun's steps three are walked before: six calls, and the seventh leaps."""
    host = tiny("sd3")
    heun = SwapScheduler("FlowMatchHeunDiscreteScheduler")
    with accel.attached([heun, Leap(after=0.4)], host.pipe) as live:
        seen = []
        host.run(
            num_inference_steps=10,
            callback_on_step_end=lambda p, i, t, g: seen.append(g["latents"].clone()) or g,
        )
        run = live.report()["members"][-1]["runs"][0]
    assert run["detail"]["leapt_at"] == 3
    assert (run["computed"], run["skipped"]) == (7, 12)
    assert all(torch.equal(x, seen[6]) for x in seen[7:])


def test_a_share_is_of_the_steps_that_are_made():
    """Image to image at strength 0.5 makes ten of twenty steps; eight are walked."""
    host = tiny("sd3")
    pipe = StableDiffusion3Img2ImgPipeline(**host.pipe.components)
    call = {k: v for k, v in host.inputs.items() if k not in ("height", "width")}
    call |= {"image": torch.rand(len(call["prompt_embeds"]), 3, 32, 32), "strength": 0.5}
    with accel.attached(Leap(after=0.8), pipe) as live:
        pipe(**call | {"num_inference_steps": 20}, generator=torch.Generator().manual_seed(0))
        run = live.report()["runs"][0]
    assert run["detail"]["leapt_at"] == 17
    assert (run["computed"], run["skipped"]) == (8, 2)


@pytest.mark.parametrize(("share", "steps"), [(0.55, 11), (0.56, 12), (0.0, 0), (1.0, 20)])
def test_shares_round_up(share, steps):
    assert _steps(share, 20) == steps


def test_euler_s_own_last_step_is_the_leap():
    """x0 = x - sigma v, against the stock scheduler asked for it."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x, v = torch.randn(2, 1, 3, 3)
    for t in scheduler.timesteps[:-1]:
        scheduler.step(v, t, x)
    end = scheduler.step(v, scheduler.timesteps[-1], x).prev_sample
    sigma = float(scheduler.sigmas[3])
    torch.testing.assert_close(end, x - sigma * v)


def test_a_steady_flow_is_found_steady_and_runs_forget_each_other():
    host = tiny("sd3")
    free = Leap(earliest=0.2, tolerance=2.0, patience=1)  # no cosine improves by 2
    with accel.attached(free, host.pipe) as live:
        first = host.run(num_inference_steps=8)
        second = host.run(num_inference_steps=8)
        runs = live.report()["runs"]
    assert runs[0]["detail"]["leapt_at"] == runs[1]["detail"]["leapt_at"] == 2
    assert runs[0]["syncs"] >= 2
    assert_equal(first, second, "the same run again")


def test_no_leap_is_the_plain_pipeline_bit_for_bit():
    host = tiny("sd3")
    plain = host.run()
    with (
        accel.attached(Leap(earliest=1.0), host.pipe),
        pytest.warns(accel.NoEffectWarning, match="changed nothing"),
    ):
        assert torch.equal(plain, host.run())


@pytest.mark.parametrize(("name", "why"), [("sd", "diffusion"), ("wan22", "another denoiser")])
def test_what_has_no_straight_path_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        Leap().attach(tiny(name).pipe)


@pytest.mark.parametrize("setting", ["invert_sigmas", "stochastic_sampling"])
def test_settings_of_the_scheduler_that_it_cannot_serve_are_refused(setting):
    host = tiny("sd3")
    host.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**{setting: True})
    with pytest.raises(ValueError, match=setting):
        Leap().attach(host.pipe)


@pytest.mark.parametrize("wrong", [{"after": 1.5}, {"earliest": -1.0}, {"patience": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted"):
        Leap(**wrong)
