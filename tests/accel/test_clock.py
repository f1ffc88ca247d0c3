"""The clock hears the right (run, step, stage, call, branch) on every kind of pipeline."""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LTXConditionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import accel
from accel.clock import _rows, clock_of, denoiser_modules, sampling_grid
from accel.method import Recipe
from accel.testing import (
    TINY_NAMES,
    TinyPipeline,
    assert_equal,
    assert_same_state,
    host_state,
    spy,
    tiny,
)
from caches.interval import IntervalCache
from caches.native import FirstBlockCache
from samplers.swap import SwapScheduler

BATCHED, SEQUENTIAL, NAMED = ["call0"], ["cond", "uncond"], ["cond_uncond"]
BRANCHES = {
    **dict.fromkeys(("ddpm", "ddim", "sd", "sd-img2img", "sdxl", "sd3", "dit", "pixart"), BATCHED),
    **dict.fromkeys(("wan", "wan22", "hunyuanvideo"), SEQUENTIAL),
    **dict.fromkeys(("cogvideox", "ltx"), NAMED),
    "flux": ["cond"],
}


class Listener:
    """Attaches to a pipeline and writes down ``now`` at every denoiser call."""

    def __init__(self, host):
        self.heard, self.events = [], []
        self.live = Recipe(()).attach(host.pipe)
        self.clock = self.live.clock
        self.clock.subscribe(self.events.append)
        for _, module in denoiser_modules(host.pipe):
            self.live.around_call(module, self.listen)

    def listen(self, call_next, *args, **kwargs):
        self.heard.append(self.live.now)
        return call_next(*args, **kwargs)

    def take(self):
        heard, self.heard = self.heard, []
        return heard


@pytest.mark.parametrize("name", TINY_NAMES)
def test_hears_every_pipeline(name):
    host = tiny(name)
    listener = Listener(host)
    branches = BRANCHES[name]
    for run in range(2):
        host.run()
        heard = listener.take()
        begin = heard[0].step
        grid = len(host.pipe.scheduler.timesteps)
        assert (begin > 0) == (name == "sd-img2img")
        assert [(h.run, h.step, h.stage, h.call, h.branch) for h in heard] == [
            (run, step, 0, call, branch)
            for step in range(begin, grid)
            for call, branch in enumerate(branches)
        ]
        assert [h.first for h in heard] == [h.step == begin for h in heard]
        sigmas = [h.sigma for h in heard]
        assert sigmas == sorted(sigmas, reverse=True)
        steps = [e.step for e in listener.events if e.kind == "step" and e.run == run]
        assert steps == list(range(begin, grid))
        assert [e.kind for e in listener.events if e.run == run][-1] == "end"
    denoisers = {"wan22": {"transformer", "transformer_2"}}.get(name, {heard[0].denoiser})
    assert {h.denoiser for h in heard} == denoisers


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # KDPM2
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_second_order_solvers_call_twice_a_step(scheduler, strength):
    host = tiny("sd" if strength is None else "sd-img2img")
    host.pipe.scheduler = scheduler.from_config(host.pipe.scheduler.config)
    listener = Listener(host)
    host.run(num_inference_steps=4, **({"strength": strength} if strength else {}))
    places = [(h.step, h.stage) for h in listener.take()]
    full = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert places == (full if strength is None else full[4:])
    assert listener.live.report()["runs"][0]["steps"] == (4 if strength is None else 2)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.6, 0.4])
def test_a_grid_that_has_a_time_twice(strength):
    """PNDM's second time; image to image may begin with either of the two."""
    host = tiny("sd-img2img")
    config = host.pipe.scheduler.config
    host.pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    listener = Listener(host)
    host.run(strength=strength, num_inference_steps=5)
    begin = round(5 * (1 - strength))
    assert [h.step for h in listener.take()] == list(range(begin, 6))
    (run,) = listener.live.report()["runs"]
    assert (run["finished"], run["syncs"]) == (True, 0)


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_a_run_of_no_steps_is_refused(name):
    """Of -4 steps DDIM lays an empty grid, and the pipeline decodes noise."""
    host = tiny(name)
    plain = host.run()
    with accel.attached(Recipe(()), host.pipe) as live:
        with pytest.raises(ValueError, match=r"no steps|negative"):  # some refuse by themselves
            host.run(num_inference_steps=-4)
        assert_equal(plain, host.run(), "the run after it")
    assert [run["steps"] for run in live.report()["runs"]] == [4]


def test_exception_then_another_run():
    host = tiny("wan")
    listener = Listener(host)
    calls = 0

    def explode(call_next, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return call_next(*args, **kwargs)

    listener.live.around_call(host.pipe.transformer, explode)
    with pytest.raises(KeyboardInterrupt):
        host.run()
    listener.take()
    host.run()
    heard = listener.take()
    assert (heard[0].run, heard[0].step, heard[0].branch) == (1, 0, "cond")
    assert [r["finished"] for r in listener.live.report()["runs"]] == [False, True]


def test_all_hear_that_a_run_ended_though_one_raises():
    host = tiny("dit")
    idle = FirstBlockCache(1e-9)  # computes everything
    with accel.attached(idle, host.pipe, strict=True):
        listener = Listener(host)
        with pytest.raises(accel.NoEffectError):
            host.run()
        assert [e.kind for e in listener.events][-1] == "end"
        assert listener.live.report()["runs_ended"] == 1


def test_change_of_steps_and_batch_between_runs():
    host = tiny("dit")
    listener = Listener(host)
    for steps, labels in ((3, [1]), (5, [1, 2, 3]), (2, [4])):
        host.run(num_inference_steps=steps, class_labels=labels)
        assert [h.step for h in listener.take()] == list(range(steps))
        run = listener.live.report()["runs"][-1]
        assert run["nfe"] == steps * 2 * len(labels)  # guidance doubles the batch
    assert [r["steps"] for r in listener.live.report()["runs"]] == [3, 5, 2]


def sharing(scheduler=False):
    """Two pipelines with the same modules; the scheduler is the same, too, if asked for."""
    host = tiny("sd")
    parts = dict(host.pipe.components)
    if not scheduler:
        parts["scheduler"] = type(host.pipe.scheduler).from_config(host.pipe.scheduler.config)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": -host.inputs["prompt_embeds"]}
    return host, TinyPipeline("sd", pipe, {**host.inputs, **embeds})


@pytest.mark.parametrize("how", ["cut off", "interrupted"])
def test_a_call_that_did_not_finish_is_over(how):
    """Who shares the denoiser, under a scheduler of his own, is in no run of the other pipeline."""
    host, other = sharing()
    plain = other.run()
    listener = Listener(host)

    def stop(pipe, step, t, given):
        if how == "cut off":
            raise KeyboardInterrupt
        pipe._interrupt = True
        return given

    with contextlib.suppress(KeyboardInterrupt):
        host.run(callback_on_step_end=stop)
    assert len(listener.take()) == 1
    assert torch.equal(plain, other.run())
    assert listener.take() == []
    assert listener.clock.run is None
    host.run()
    assert len(listener.take()) == host.inputs["num_inference_steps"]


@pytest.mark.parametrize("where", ["in a thread", "nested", "in the midst"])
def test_who_shares_the_denoiser_is_in_no_run_of_the_other(where):
    host, other = sharing()
    plain, made = other.run(), []
    with accel.attached(IntervalCache(interval=2), host.pipe) as live:
        cached = host.run()

        def call_other():
            made.append(other.run())

        def in_thread(*args):
            thread = threading.Thread(target=call_other)
            thread.start()
            thread.join()

        def at_a_step(pipe, step, t, given):
            if step == 1:
                call_other() if where == "nested" else in_thread()
            return given

        def in_the_midst(call_next, *args, **kwargs):
            if not made and live.now is not None and live.now.step == 1:
                in_thread()
            return call_next(*args, **kwargs)

        if where == "in the midst":
            live.around_call(host.pipe.unet.mid_block, in_the_midst)
            assert_equal(cached, host.run(), "the pipeline that the cache is on")
        else:
            again = host.run(callback_on_step_end=at_a_step)
            assert_equal(cached, again, "the pipeline that the cache is on")
        first, second = live.report()["runs"]
    assert_equal(plain, made[0], "the pipeline that shares the denoiser")
    assert first == second


def test_pipelines_that_share_their_scheduler_run_under_their_own_methods():
    host, other = sharing(scheduler=True)
    cached = []
    for one in (host, other):
        with accel.attached(IntervalCache(interval=2), host.pipe):
            cached.append(one.run())
    with (
        accel.attached(IntervalCache(interval=2), host.pipe) as a,
        accel.attached(IntervalCache(interval=2), other.pipe) as b,
    ):
        assert_equal(cached[0], host.run(), "output of the first")
        assert_equal(cached[1], other.run(), "output of the second")
        runs = [live.report()["runs"] for live in (a, b)]
    assert [len(each) for each in runs] == [1, 1]
    assert runs[0] == runs[1]


def test_a_call_that_ends_before_its_grid_is_in_its_report():
    host = tiny("sdxl")
    with accel.attached(IntervalCache(interval=2), host.pipe) as live:
        seen = []

        def look(pipe, step, t, given):
            seen.append(live.report()["runs_ended"])
            return given

        host.run(denoising_end=0.5, callback_on_step_end=look)
        (run,) = live.report()["runs"]
        assert (run["steps"], run["finished"], live.clock.run) == (2, False, None)
    assert seen == [0, 0]  # not within the call


def test_a_grid_entered_in_the_middle_where_tokens_are_told_other_times():
    """LTX tells the tokens of a condition, the first ones, that they have no noise."""
    host = tiny("ltx")
    parts = {**host.pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe: Any = LTXConditionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    listener = Listener(TinyPipeline("ltx", pipe, host.inputs))
    size = (host.inputs["width"], host.inputs["height"])
    video = [Image.new("RGB", size, (20 * i, 40, 90)) for i in range(9)]
    generator = torch.Generator().manual_seed(0)
    call = {**host.inputs, "num_inference_steps": 8, "generator": generator}
    pipe(**call, video=video, denoise_strength=0.5)
    heard = listener.take()
    grid = pipe.scheduler.sigmas.tolist()
    assert [h.step for h in heard] == [4, 5, 6, 7]
    assert [h.sigma for h in heard] == pytest.approx(grid[4:8])
    assert listener.live.report()["runs"][0]["syncs"] == 0


@pytest.mark.parametrize(
    ("scales", "guided"),
    [
        ({"guidance_scale": 3.5}, False),  # the network is told it
        ({"guidance_scale": 1.0, "true_cfg_scale": 4.0}, True),
        ({"guidance_scale": 1.0, "true_cfg_scale": 4.0, "without": True}, False),
    ],
)
def test_guidance_that_a_network_is_told_is_no_second_branch(scales, guided):
    host = tiny("flux")
    scales = dict(scales)
    if not scales.pop("without", False):
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            host.inputs[f"negative_{name}"] = host.inputs[name]
    live = Recipe(()).attach(host.pipe)
    host.run(**scales)
    assert live.guided is guided


def test_a_unet_that_is_told_guidance_has_no_second_branch():
    host = tiny("sd")
    live = Recipe(()).attach(host.pipe)
    host.run(guidance_scale=5.0)
    assert live.guided
    host.pipe.unet = UNet2DConditionModel.from_config(host.pipe.unet.config, time_cond_proj_dim=8)
    host.run(guidance_scale=5.0)
    assert not live.guided


def test_two_pipelines_in_one_process_interleaved():
    one, two = tiny("dit"), tiny("wan")
    a, b = Listener(one), Listener(two)
    one.run(), two.run(), one.run()
    assert [h.run for h in a.take()] == [0] * 4 + [1] * 4
    assert {h.run for h in b.take()} == {0}
    assert clock_of(one.pipe) is not clock_of(two.pipe)


def test_follows_a_scheduler_assigned_by_the_user_while_attached():
    host = tiny("dit")
    listener = Listener(host)
    host.run()
    first = host.pipe.scheduler
    host.pipe.scheduler = type(first).from_config(first.config)
    listener.take()
    for _ in range(2):
        host.run()
        assert [h.step for h in listener.take()] == list(range(4))
    listener.live.detach()
    assert "step" not in vars(first)
    assert "step" not in vars(host.pipe.scheduler)


def test_scheduler_signatures_are_kept():
    """Pipelines inspect them to decide what to pass."""
    host = tiny("sd3")
    methods = ("set_timesteps", "step")
    before = [inspect.signature(getattr(host.pipe.scheduler, m)) for m in methods]
    with accel.attached(spy(), host.pipe):
        assert [inspect.signature(getattr(host.pipe.scheduler, m)) for m in methods] == before


def test_driven_by_hand():
    host = tiny("dit")
    model = host.pipe.transformer
    size = model.config.sample_size
    x = torch.zeros(2, model.config.in_channels, size, size)
    arguments = {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 1])}
    listener = Listener(host)
    model(x, **arguments)
    assert listener.take() == [], "a call outside a run is not a step"
    for step in range(2):
        with listener.clock.at(step, branch="cond", sigma=0.5):
            model(x, **arguments)
        with listener.clock.unheard():
            model(x, **arguments)  # a trainer asks its teacher
    heard = listener.take()
    assert [(h.step, h.branch, h.sigma) for h in heard] == [(0, "cond", 0.5), (1, "cond", 0.5)]
    assert int(listener.clock.step_tensor) == 1
    listener.clock.end()
    assert listener.live.report()["runs"][0]["calls"] == 2


def test_grid_noise_levels():
    """sqrt((1 - a) / a) from alphas_cumprod; the scheduler's own where it has sigmas."""
    ddim = tiny("dit").pipe.scheduler
    ddim.set_timesteps(4)
    timesteps, sigmas = sampling_grid(ddim)
    alphas = [float(ddim.alphas_cumprod[int(t)]) for t in timesteps]
    assert sigmas == pytest.approx([math.sqrt((1 - a) / a) for a in alphas], rel=1e-6)
    flow = tiny("sd3").pipe.scheduler
    flow.set_timesteps(4)
    assert sampling_grid(flow)[1] == pytest.approx(flow.sigmas[:4].tolist())


def test_no_trace_and_no_leak_after_the_last_user():
    host = tiny("wan")
    host.run()
    state = host_state(host.pipe)
    first, second = Recipe(()).attach(host.pipe), Recipe(()).attach(host.pipe)
    host.run()
    first.detach()
    host.run()
    second.detach()
    assert_same_state(state, host_state(host.pipe))
    clock = weakref.ref(first.clock)
    pipe = weakref.ref(host.pipe)
    # attached and never detached: must still not outlive the pipe
    Recipe((SwapScheduler("UniPCMultistepScheduler"),)).attach(host.pipe)
    del host, first, second, state
    gc.collect()
    assert pipe() is None
    assert clock() is None


def test_samples_in_a_list_are_rows():
    """Z-Image gives its transformer one tensor a sample."""
    assert _rows(([torch.zeros(4, 1, 8, 8)] * 3, 0.5), {}) == 3
    assert _rows((), {"hidden_states": torch.zeros(2, 4)}) == 2


def test_a_user_whose_end_of_a_run_raises_is_released_all_the_same():
    """Detaching in mid-run, with an error to report."""
    host = tiny("ddim")
    state = host_state(host.pipe)

    def end(run):
        raise RuntimeError("no end")

    live = Recipe(()).attach(host.pipe)
    host.pipe.scheduler.set_timesteps(2)
    live.on_run_end = end
    with pytest.raises(RuntimeError, match="no end"):
        live.detach()
    assert not accel.live_on(host.pipe)
    assert_same_state(state, host_state(host.pipe))
