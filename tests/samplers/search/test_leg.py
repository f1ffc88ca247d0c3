"""Runs in legs equal runs in one, bit for bit, on every pipeline and with every kind of solver."""

from __future__ import annotations

import diffusers
import pytest
import torch

from accel.clock import clock_of
from accel.testing import TINY_NAMES, assert_same_state, host_state, tiny
from samplers.search.leg import Leg, State, capture, packed

WITH_NOISE = [n for n in TINY_NAMES if n not in ("ddpm", "ddim", "dit", "sd-img2img")]
SOLVERS = [
    "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler",
    "DPMSolverMultistepScheduler", "HeunDiscreteScheduler",
]  # fmt: skip
FLOW_SOLVERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]


def in_legs(host, stops, **call):
    """The output of a run that is cut off and taken up again at every step of `stops`."""
    state = State(0, capture(host.pipe, host.inputs | call | {"generator": generator()}).first)
    for stop in stops:
        leg = Leg(state, stop)
        with leg.on(host.pipe):
            host.run(**call)
        state = leg.end
    with Leg(state).on(host.pipe):
        return host.run(**call)


def generator():
    return torch.Generator("cpu").manual_seed(0)


@pytest.mark.parametrize("name", WITH_NOISE)
def test_a_run_in_legs_equals_one_in_one(name):
    host = tiny(name)
    whole = host.run()
    before = host_state(host.pipe)
    assert torch.equal(in_legs(host, (1, 3)), whole)
    assert_same_state(before, host_state(host.pipe))
    assert torch.equal(host.run(), whole)  # nothing stays behind


@pytest.mark.parametrize("cls", SOLVERS)
@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_solver_state_is_carried(cls, stops):
    host = tiny("sd")
    kept = {k: v for k, v in host.pipe.scheduler.config.items() if not k.startswith("_")}
    host.pipe.scheduler = getattr(diffusers, cls).from_config(kept)
    whole = host.run(num_inference_steps=7)
    assert torch.equal(in_legs(host, stops, num_inference_steps=7), whole)


@pytest.mark.parametrize("cls", [*FLOW_SOLVERS, "UniPCMultistepScheduler"])
def test_solver_state_is_carried_on_flows(cls):
    host = tiny("sd3")
    more = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in cls else {}
    host.pipe.scheduler = getattr(diffusers, cls)(**more)
    whole = host.run(num_inference_steps=7)
    assert torch.equal(in_legs(host, (2, 4), num_inference_steps=7), whole)


def test_a_multistep_solver_without_its_state_gives_another_result():
    """The control: what is carried matters."""
    host = tiny("pixart")
    whole = host.run(num_inference_steps=7)
    leg = Leg(State(0, capture(host.pipe, host.inputs | {"generator": generator()}).first), 4)
    with leg.on(host.pipe):
        host.run(num_inference_steps=7)
    with Leg(State(4, leg.end.sample)).on(host.pipe):
        other = host.run(num_inference_steps=7)
    assert not torch.equal(other, whole)


def test_capturing_the_first_noise_computes_nothing():
    host = tiny("flux")
    calls = []
    handle = host.pipe.transformer.register_forward_pre_hook(lambda *a: calls.append(1))
    leg = capture(host.pipe, host.inputs | {"generator": generator()})
    handle.remove()
    assert not calls
    assert leg.first.shape[0] == 1
    assert leg.steps == leg.levels.steps == host.inputs["num_inference_steps"]


@pytest.mark.parametrize("name", WITH_NOISE)
def test_a_call_without_a_step_decodes(name):
    """Final latents put behind the last step come out as the pipeline decodes them."""
    host = tiny(name)
    whole = host.run()
    leg = Leg(stop=host.inputs["num_inference_steps"])
    with leg.on(host.pipe):
        host.run()
    with Leg(leg.end).on(host.pipe):
        assert torch.equal(host.run(), whole)


def test_steps_of_a_window_have_their_true_numbers():
    """What methods see through the clock inside a window."""
    host = tiny("sd3")
    state = State(0, capture(host.pipe, host.inputs | {"generator": generator()}).first)
    clock, seen = clock_of(host.pipe), []

    class User:
        patch = type("P", (), {"ensure": lambda self: None})()

        def run_began(self, run): ...

        def run_ended(self, run): ...

        def denoiser_layers(self, slot):
            seen.append(clock.now.step)
            return []

    user = User()
    clock.acquire(user)
    leg = Leg(state, 2)
    with leg.on(host.pipe):
        host.run()
    first, seen[:] = list(dict.fromkeys(seen)), []
    with Leg(leg.end).on(host.pipe):
        host.run()
    clock.release(user)
    assert first == [0, 1]
    assert list(dict.fromkeys(seen)) == list(range(2, host.inputs["num_inference_steps"]))


def test_a_pipeline_that_takes_no_noise_is_refused_with_the_remedy():
    host = tiny("dit")
    with (
        pytest.raises(ValueError, match="Random, DraftCommit"),
        Leg(State(0, torch.zeros(1, 4, 8, 8))).on(host.pipe),
    ):
        host.run()


def test_states_of_another_shape_are_refused():
    host = tiny("sd")
    with (
        pytest.raises(ValueError, match="latents"),
        Leg(State(0, torch.zeros(1, 4, 3, 3))).on(host.pipe),
    ):
        host.run()


def test_rows_and_packed_are_inverse():
    solver = {"model_outputs": [None, torch.randn(2, 3)], "lower_order_nums": 2}
    state = State(3, torch.randn(2, 3), torch.randn(2, 3), solver)
    again = packed(state.rows())
    assert again.step == 3
    assert torch.equal(again.sample, state.sample)
    assert torch.equal(again.clean, state.clean)
    assert torch.equal(again.solver["model_outputs"][1], solver["model_outputs"][1])
    assert again.solver["lower_order_nums"] == 2
