"""Few-step schedulers: the stock ones are special cases."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)

from accel.testing import assert_equal, tiny
from samplers.few_step import FewStepFlowScheduler, FewStepScheduler, choose
from samplers.swap import SwapScheduler

SHAPE = (2, 4, 8, 8)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LCM_ANCHORS = list(range(999, 0, -20))
# Both compute the same in float32, in another order; at the first levels of the linear schedule
# x_0 is a difference divided by sqrt(4e-5) = 0.006.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def network(x: torch.Tensor, t) -> torch.Tensor:
    """Some smooth function, of the size of noise."""
    return torch.tanh(x.roll(1, -1) + float(t) / 1000)


def run(scheduler, *, seed=0, **grid) -> list[torch.Tensor]:
    """Samples of every step from the same first noise and generator."""
    scheduler.set_timesteps(**grid)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    generator, seen = torch.Generator().manual_seed(seed), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        seen.append(x)
    return seen


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [True, False])
def test_eta_1_is_ddim(prediction, spacing, clip):
    stock = DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip)
    ours = FewStepScheduler.from_config(stock.config)
    assert_same(run(ours, num_inference_steps=8), run(stock, num_inference_steps=8))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_eta_0_is_lcm(prediction, steps):
    """Without the boundary scalings, which differ from 0 and 1 by 6e-6 at its lowest time."""
    stock = LCMScheduler(prediction_type=prediction)
    stock.get_scalings_for_boundary_condition_discrete = lambda timestep: (0.0, 1.0)
    ours = FewStepScheduler.from_config(stock.config, eta=0.0, anchors=LCM_ANCHORS)
    theirs = run(stock, num_inference_steps=steps)
    assert_same(run(ours, num_inference_steps=steps), theirs)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_gamma_is_that_of_tcd(prediction, gamma, steps):
    stock = TCDScheduler(prediction_type=prediction, set_alpha_to_one=False)
    ours = FewStepScheduler.from_config(stock.config, gamma=gamma, anchors=LCM_ANCHORS)
    step = stock.step
    stock.step = lambda *args, **kwargs: step(*args, eta=gamma, **kwargs)
    theirs = run(stock, num_inference_steps=steps)
    assert_same(run(ours, num_inference_steps=steps), theirs)


@pytest.mark.parametrize(
    ("eta", "stock"), [(1.0, FlowMatchEulerDiscreteScheduler), (0.0, FlowMatchLCMScheduler)]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_flow_with_eta_1_is_euler_and_with_eta_0_is_lcm(eta, stock, steps):
    theirs = stock(shift=3.0)
    ours = FewStepFlowScheduler.from_config(theirs.config, eta=eta)
    sigmas = [1 - i / steps for i in range(steps)]
    assert_same(run(ours, sigmas=sigmas), run(theirs, sigmas=sigmas))
    assert torch.equal(ours.sigmas, theirs.sigmas)


def test_flow_gamma_keeps_the_noise_of_a_cleaner_level():
    """TCD for flows: to (1 - gamma) sigma by Euler, then noised again up to sigma."""
    ours = FewStepFlowScheduler(gamma=0.3)
    ours.set_timesteps(sigmas=[1.0, 0.5])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    v = network(x, 1000)
    got = ours.step(v, 1000.0, x, generator=torch.Generator().manual_seed(7)).prev_sample
    clean = x + (0.35 - 1.0) * v
    fresh = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    r = 0.5 / 0.65
    noise = (0.5**2 - (r * 0.35) ** 2) ** 0.5
    torch.testing.assert_close(got, r * clean + noise * fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_every_eta_keeps_the_noise_level(eta):
    """With the exact prediction, the sample after a step has the variance of its level."""
    ours = FewStepScheduler(eta=eta, clip_sample=False)
    ours.set_timesteps(timesteps=[900, 500])
    g = torch.Generator().manual_seed(3)
    x0, e = torch.full((1, 200_000), 0.5), torch.randn(1, 200_000, generator=g)
    a = ours.alphas_cumprod[900]
    x = a.sqrt() * x0 + (1 - a).sqrt() * e
    got = ours.step(e, 900, x, generator=g).prev_sample
    a = ours.alphas_cumprod[500]
    # five standard deviations of a mean and of a variance of 200,000
    assert got.mean().item() == pytest.approx(0.5 * a.sqrt().item(), abs=5 / 200_000**0.5)
    assert got.var().item() == pytest.approx(1 - a.item(), rel=5 * (2 / 200_000) ** 0.5)


def test_one_step_is_the_predicted_clean_sample():
    for ours in (FewStepScheduler(eta=0.0, clip_sample=False), FewStepFlowScheduler(eta=0.0)):
        ours.set_timesteps(1)
        x = torch.randn(SHAPE)
        out = ours.step(network(x, 999), ours.timesteps[0], x)
        assert_equal(out.prev_sample, out.pred_original_sample, "the result of one step")


def test_anchors_are_chosen_evenly_from_the_first():
    assert choose([999, 749, 499, 249], 4) == [999, 749, 499, 249]
    assert choose([999, 749, 499, 249], 2) == [999, 499]
    assert choose([999, 749, 499, 249], 1) == [999]
    ours = FewStepFlowScheduler(anchors=[1000.0, 800.0, 400.0])
    ours.set_timesteps(3, device="cpu")
    assert ours.timesteps.tolist() == [1000, 800, 400]
    assert torch.allclose(ours.sigmas, torch.tensor([1, 0.8, 0.4, 0]))
    with pytest.raises(ValueError, match="4 steps of a model with 3 anchors"):
        ours.set_timesteps(4)


def test_eta_1_draws_no_noise_and_a_generator_for_each_sample_is_served():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def first(rows, seeds, eta=0.5):
        ours = FewStepScheduler(eta=eta)
        ours.set_timesteps(4)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        t = ours.timesteps[0]
        return ours.step(network(x, t)[rows], t, x[rows], generator=generators).prev_sample

    both = first([0, 1], [5, 6])
    assert_equal(both.flip(0), first([1, 0], [6, 5]), "in the other order")
    assert_equal(both[:1], first([0], [5]), "alone")
    ours = FewStepScheduler()
    state = torch.get_rng_state()
    run(ours, num_inference_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first([0], [5]), first([0], [6]))
    assert torch.equal(first([0], [5], eta=1.0), first([0], [6], eta=1.0))


def test_a_first_level_without_signal_has_a_finite_sigma():
    """Zero terminal SNR: an infinite one makes forecasts of caches NaN."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    ours, stock = (
        cls(prediction_type="v_prediction", **zero) for cls in (FewStepScheduler, DDIMScheduler)
    )
    assert_same(run(ours, num_inference_steps=4), run(stock, num_inference_steps=4))
    assert ours.sigmas.isfinite().all()
    assert ours.sigmas[0] > 1e5


@pytest.mark.parametrize(
    ("cls", "stock"),
    [
        (FewStepScheduler, DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085)),
        (FewStepFlowScheduler, FlowMatchEulerDiscreteScheduler(shift=5.0)),
    ],
)
def test_settings_and_tensors_survive_saving(cls, stock, tmp_path):
    made = cls.from_config(stock.config, gamma=0.2, anchors=[999, 499])
    made.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for scheduler in (made, loaded):
        assert (scheduler.config.gamma, scheduler.config.anchors) == (0.2, [999, 499])
        for name in ("alphas_cumprod", "sigmas"):
            if hasattr(stock, name):
                assert torch.equal(getattr(scheduler, name), getattr(stock, name))


def test_the_shift_of_a_multistep_solver_carries_over():
    host = tiny("wan").pipe.scheduler
    made = FewStepFlowScheduler.from_config(host.config)
    assert made.config.shift == host.config.flow_shift != 1
    other = FewStepFlowScheduler.from_config(made.config, shift=5.0)
    assert FewStepFlowScheduler.from_config(other.config).config.shift == 5


@pytest.mark.parametrize("cls", [FewStepScheduler, FewStepFlowScheduler])
def test_times_of_the_call_s_own_come_before_anchors(cls):
    ours = cls(anchors=[900, 600, 300])
    ours.set_timesteps(timesteps=[800, 400])
    assert ours.timesteps.tolist() == [800, 400]


@pytest.mark.parametrize("cls", [FewStepScheduler, FewStepFlowScheduler])
def test_a_step_that_cannot_be_made_says_why(cls):
    x, ours = torch.zeros(SHAPE), cls()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        ours.step(x, 999, x)
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match=r"998 is no time of the grid \["):
        ours.step(x, 998, x)
    for t in ours.timesteps:
        ours.step(x, t, x)
    with pytest.raises(ValueError, match="grid's end"):
        ours.step(x, ours.timesteps[0], x)


def test_times_that_are_none_are_refused():
    for times in ([500, -1], [1000, 500]):
        with pytest.raises(ValueError, match="0 to 999"):
            FewStepScheduler().set_timesteps(timesteps=times)


def test_image_to_image_starts_inside_the_grid():
    ours = FewStepScheduler(eta=1.0)
    ours.set_timesteps(4)
    assert ours.timesteps.tolist() == [750, 500, 250, 0]
    x = torch.randn(SHAPE)
    ours.step(network(x, 250), ours.timesteps[2], x)
    assert ours.step_index == 3
    ours.set_timesteps(4)
    ours.set_begin_index(1)
    ours.step(network(x, 500), ours.timesteps[1], x)
    assert ours.step_index == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eta": 1.5}, "eta = 1.5"),
        ({"gamma": -0.1}, "gamma = -0.1"),
        ({"anchors": [1, 2]}, "falling"),
        ({"anchors": []}, "falling"),
        ({"anchors": [900, -5]}, "times"),
        ({"anchors": [5000, 10]}, "times"),
    ],
)
def test_bad_settings(settings, words):
    for cls in (FewStepScheduler, FewStepFlowScheduler):
        with pytest.raises(ValueError, match=words):
            cls(**settings)


def test_a_grid_is_wanted():
    with pytest.raises(ValueError, match="give num_inference_steps or timesteps"):
        FewStepScheduler().set_timesteps()


def test_models_of_another_kind_are_refused():
    """Before the run, by a swap, too: a velocity of a flow is no v of a diffusion."""
    with pytest.raises(ValueError, match="prediction_type = 'flow_prediction'"):
        SwapScheduler("FewStepScheduler").attach(tiny("wan").pipe)
    with pytest.raises(ValueError, match="eta = 0"):
        FewStepFlowScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="invert_sigmas = True"):
        FewStepFlowScheduler(invert_sigmas=True)
