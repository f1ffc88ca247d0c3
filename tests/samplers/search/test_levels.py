"""The stochastic step: the host's where it adds nothing, true to the marginals where it does."""

from __future__ import annotations

import diffusers
import pytest
import torch

from samplers.search.levels import Levels
from samplers.search.noise import gaussian, key

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def laid(scheduler, steps=8):
    scheduler.set_timesteps(steps)
    return scheduler, Levels.of(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "tolerance"),
    [
        (FLOW(shift=3.0), 1e-6),
        (diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), 1e-5),
        (diffusers.DDIMScheduler(), 1e-5),
        (diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), 1e-5),
        (diffusers.EulerDiscreteScheduler(), 1e-5),
        (diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), 1e-5),
        (diffusers.DPMSolverMultistepScheduler(solver_order=1), 1e-5),
    ],
    ids=["flow", "ddim", "ddim clipped", "ddim v", "euler", "euler v", "dpm first order"],
)
def test_without_noise_it_is_the_hosts_first_order_step(scheduler, tolerance):
    """Tolerance: float32 rounding of other orders of the same operations, relative to x."""
    scheduler, levels = laid(scheduler)
    x = gaussian(1, (2, 3, 4)) * getattr(scheduler, "init_noise_sigma", 1.0)
    for step, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
        out = gaussian(step + 2, (2, 3, 4))
        own = levels.follow(x, levels.clean(out, x, step), step, eta=0.0, fresh=None)
        more = {"use_clipped_model_output": True} if levels.clip else {}
        theirs = scheduler.step(out, t, x, return_dict=False, **more)[0]
        assert (own - theirs).abs().max() <= tolerance * max(1.0, float(x.abs().max())), step
        x = theirs


def test_schedulers_that_search_cannot_read_are_refused():
    with pytest.raises(ValueError, match="stages"):
        Levels.of(diffusers.HeunDiscreteScheduler())
    with pytest.raises(ValueError, match="EDM"):
        Levels.of(diffusers.EDMEulerScheduler())
    for name in ("IPNDMScheduler", "DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler"):
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="no noise levels that search can read"):
            Levels.of(scheduler)
    with pytest.raises(ValueError, match="takes model_output, old_pred_original_sample"):
        Levels.of(diffusers.CogVideoXDPMScheduler())


MEANS, SPREAD, WEIGHT = torch.tensor([-1.0, 2.0]), 0.3, torch.tensor([0.3, 0.7])


def mixture_clean(x, alpha, s):
    """E[x_0 | x] of a two-mode mixture, exactly."""
    x = x.double()[:, None]
    variance = alpha**2 * SPREAD**2 + s**2
    logits = WEIGHT.log() - (x - alpha * MEANS) ** 2 / (2 * variance)
    posterior = MEANS + alpha * SPREAD**2 / variance * (x - alpha * MEANS)
    return (logits.softmax(1) * posterior).sum(1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_are_kept_for_any_eta(eta):
    """Mean, spread and mode weights of a mixture with an exact denoiser, 200 flow steps.

    4e4 samples: standard errors 0.007, 0.004, 0.0023; five of each, and 0.01 for the grid.
    """
    _, levels = laid(FLOW(), 200)
    n = 40_000
    x = gaussian(1, (n,)).double()
    for step in range(levels.steps):
        clean = mixture_clean(x, *levels.table[step])
        x = levels.follow(x, clean, step, eta=eta, fresh=gaussian(key(2, step), (n,)).double())
    assert abs(float(x.mean()) - 1.1) < 0.045
    assert abs(float((x < 0.5).double().mean()) - 0.3) < 0.022
    low = x[x < 0.5]
    assert abs(float(low.std()) - SPREAD) < 0.03


def test_the_hosts_own_stochastic_flow_step_does_not_keep_them():
    """Why there is a step of our own: the control fails the test above by far."""
    scheduler, levels = laid(FLOW(stochastic_sampling=True), 200)
    n = 40_000
    x = gaussian(1, (n,)).double()
    torch.manual_seed(0)
    for step, t in enumerate(scheduler.timesteps):
        alpha, s = levels.table[step]
        velocity = (x - mixture_clean(x, alpha, s)) / s
        x = scheduler.step(velocity, t, x, return_dict=False)[0].double()
    assert abs(float((x < 0.5).double().mean()) - 0.3) > 0.06
