"""Fitted orders of convergence, on an equation with a closed form.

Data is normal with deviation C. The best prediction is linear in x, and the probability flow only
scales: x(t) is in proportion to the deviation of the noised data, sqrt(alpha^2 C^2 + s^2). The
error at the end is that of the sampler alone, and falls as steps^-order.
"""

import numpy as np
import pytest
import torch

from samplers.few_step import FewStepFlowScheduler, FewStepScheduler
from samplers.shifted_sigmas import (
    TimeShiftDPMSolverMultistepScheduler,
    TimeShiftEulerDiscreteScheduler,
    TimeShiftFlowMatchEulerDiscreteScheduler,
)
from samplers.shifted_time import TimeShiftDDIMScheduler, TimeShiftPNDMScheduler

C = 0.5
STEPS = (25, 50, 100)
END = 300
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def predicted_noise(x, alpha, s):
    """Of x = alpha x_0 + s e: the mean of e for x."""
    return s * x / (alpha**2 * C**2 + s**2)


def diffusion_error(scheduler, steps, *, sigma_space=False):
    """Relative error at the first time after `END`.

    There everything is smooth; the steps to time zero are another thing in every scheduler.
    """
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    abar = scheduler.alphas_cumprod.double().numpy()
    grid = np.arange(len(abar))

    def level(t):
        a = np.interp(t, grid, abar)
        return np.sqrt(a), np.sqrt(1 - a)

    def deviation(t):
        alpha, s = level(t)
        spread = np.sqrt(alpha**2 * C**2 + s**2)
        return spread / alpha if sigma_space else spread

    x = torch.full((1, 1, 2, 2), float(deviation(times[0])), dtype=torch.float64)
    for t in scheduler.timesteps:
        if float(t) < END:
            return abs(float(x.mean()) / deviation(float(t)) - 1)
        alpha, s = level(float(t))
        scaled = scheduler.scale_model_input(x, t)
        out = predicted_noise(scaled, alpha, s)
        x = scheduler.step(out, t, x).prev_sample
    raise AssertionError(f"no time below {END}")


def flow_error(scheduler, steps):
    scheduler.set_timesteps(steps)
    sigmas = [float(s) for s in scheduler.sigmas]
    x = torch.full((1, 1, 2, 2), 1.0, dtype=torch.float64)  # deviation 1 at sigma 1
    for t, s in zip(scheduler.timesteps[:-1], sigmas, strict=False):
        alpha = 1 - s
        clean = alpha * C**2 * x / (alpha**2 * C**2 + s**2)
        velocity = predicted_noise(x, alpha, s) - clean
        x = scheduler.step(velocity, t, x).prev_sample
    s = sigmas[-2]
    return abs(float(x.mean()) / np.sqrt((1 - s) ** 2 * C**2 + s**2) - 1)


def order(error):
    """Slope of log error over log steps."""
    errors = [error(steps) for steps in STEPS]
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


def shiftless(cls, **settings):
    return cls(**BETAS, window=0, **settings)


@pytest.mark.parametrize(
    ("made", "expected", "sigma_space"),
    [
        (lambda: FewStepScheduler(**BETAS, clip_sample=False), 1, False),
        (lambda: shiftless(TimeShiftDDIMScheduler, clip_sample=False), 1, False),
        (lambda: shiftless(TimeShiftPNDMScheduler, skip_prk_steps=True, history=2), 2, False),
        (lambda: shiftless(TimeShiftDPMSolverMultistepScheduler, solver_order=2), 2, False),
        (lambda: shiftless(TimeShiftEulerDiscreteScheduler), 1, True),
    ],
    ids=["few-step", "DDIM", "S-PNDM", "DPM-Solver++ 2M", "Euler"],
)
def test_diffusion(made, expected, sigma_space):
    found = order(lambda steps: diffusion_error(made(), steps, sigma_space=sigma_space))
    assert found == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(
    "made",
    [FewStepFlowScheduler, lambda: TimeShiftFlowMatchEulerDiscreteScheduler(window=0)],
    ids=["few-step", "Euler"],
)
def test_flow(made):
    assert order(lambda steps: flow_error(made(), steps)) == pytest.approx(1, abs=0.25)
