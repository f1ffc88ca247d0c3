"""Time-shift on grids of sigmas: the same moves as DDIM makes, and the form for flows."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from samplers.shifted_sigmas import (
    TimeShiftDPMSolverMultistepScheduler,
    TimeShiftEulerDiscreteScheduler,
    TimeShiftFlowMatchEulerDiscreteScheduler,
)
from samplers.shifted_time import TimeShiftDDIMScheduler

STOCK = {
    TimeShiftEulerDiscreteScheduler: EulerDiscreteScheduler,
    TimeShiftDPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
    TimeShiftFlowMatchEulerDiscreteScheduler: FlowMatchEulerDiscreteScheduler,
}
SHAPE = (3, 1, 8, 8)
FLOW = {"variance_model": "signal", "v0": 0.25}


def extra(cls) -> dict:
    return FLOW if "Flow" in cls.__name__ else {}


def network(x: torch.Tensor, t) -> torch.Tensor:
    """Some smooth function, of the size of noise, that is not exact at any level."""
    return 0.9 * torch.tanh(2 * x) + 0.1 * x.roll(1, -1) + float(t) / 1e4


def run(scheduler, *, steps=10, seed=1) -> tuple[torch.Tensor, list[float]]:
    """The result from unit noise, and the times the network was told."""
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    if isinstance(scheduler, EulerDiscreteScheduler):
        x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    told = []
    for t in scheduler.timesteps:
        told.append(float(t))
        out = (
            network(scheduler.scale_model_input(x, t), t)
            if hasattr(scheduler, "scale_model_input")
            else network(x, t)
        )
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x, told


@pytest.mark.parametrize("variant", ["paper", "constant"])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (TimeShiftEulerDiscreteScheduler, {}),
        (TimeShiftDPMSolverMultistepScheduler, {"solver_order": 1}),
    ],
)
def test_first_order_solvers_move_as_ddim_does(cls, settings, variant):
    """Three forms of one solver: told the same times, they give the same result."""
    shared = {"timestep_spacing": "trailing", "window": 60, "cutoff": 150, "variant": variant}
    expected, times = run(TimeShiftDDIMScheduler(clip_sample=False, **shared))
    result, told = run(cls(**settings, **shared))
    assert told == times
    assert told != [999 - 100 * i for i in range(10)]
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("off", [{}, {"window": 40, "cutoff": 1000}])
def test_off_equals_stock_bit_for_bit(cls, off):
    ours, times = run(cls(**off, **(extra(cls) if off else {})))
    theirs, expected = run(STOCK[cls]())
    assert torch.equal(ours, theirs)
    assert times == expected


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("variant", ["paper", "dpm", "constant"])
def test_on_moves_the_grid_and_the_next_run_is_fresh(cls, variant):
    if variant not in cls.variants:
        with pytest.raises(ValueError, match="one of paper, constant"):
            cls(variant=variant)
        return
    scheduler = cls(window=40, variant=variant, cutoff=0, **extra(cls))
    first, told = run(scheduler)
    _, stock = run(STOCK[cls]())
    assert told != stock
    assert max(abs(a - b) for a, b in zip(told, stock, strict=True)) <= 20.5  # half a window
    again, told_again = run(scheduler)
    assert torch.equal(first, again)
    assert told == told_again
    assert scheduler.shifts > 0


def test_dpm_moves_the_end_of_a_step_by_the_variance_of_the_output():
    scheduler = TimeShiftDPMSolverMultistepScheduler(
        window=100, cutoff=0, variant="dpm", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler.timesteps[1] == 899  # the first step never moves
    wanted = 1 - scheduler.alphas_cumprod[780]
    flat = x.flatten(1)
    unit = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view(SHAPE)
    scheduler.step(unit * wanted.sqrt(), scheduler.timesteps[1], x)
    assert scheduler.timesteps[2] == 780  # 799 on the grid
    a = scheduler.alphas_cumprod[780]
    assert torch.isclose(scheduler.sigmas[2], ((1 - a) / a).sqrt())


def test_a_flow_moves_to_the_sigma_of_its_variance():
    """The variance formula inverted, on the rising side; below its least there is no shift."""
    v0 = 0.25
    scheduler = TimeShiftFlowMatchEulerDiscreteScheduler(window=200, cutoff=0, **FLOW)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.15, 0.1])
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).flatten(1)
    unit = ((unit - unit.mean(1, keepdim=True)) / unit.std(1, keepdim=True)).view(SHAPE)
    for sigma in (0.65, 0.7, 0.78):
        variance = (1 - sigma) ** 2 * v0 + sigma**2
        time = scheduler._nearest(unit * variance**0.5, 700.0)
        assert float(time) == pytest.approx(1000 * sigma, abs=0.01)
    assert float(scheduler._nearest(unit * 2, 700.0)) == 800  # the window's end
    assert float(scheduler._nearest(unit, 150.0)) == 150  # 0.2 is the least
    with pytest.raises(ValueError, match="told by v0"):
        TimeShiftFlowMatchEulerDiscreteScheduler(window=40)


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("variant", ["paper", "dpm", "constant"])
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_windows_wider_than_two_strides_leave_the_grid_falling(cls, variant, size):
    """Else solvers divide by nothing: samples that look like ones of an end of the window."""
    if variant not in cls.variants:
        return
    scheduler = cls(window=400, cutoff=0, variant=variant, **extra(cls))
    scheduler.set_timesteps(10)
    x = size * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for at, t in enumerate(scheduler.timesteps):
        y = x * scheduler._scale(scheduler.sigmas[at])
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(y, t)
        assert scheduler.step(x.roll(1, -1), t, y, return_dict=False)[0].isfinite().all()
        assert scheduler.sigmas[at] >= scheduler.sigmas[at + 1]
    assert int(scheduler.shifts) > 0


def test_a_flow_below_the_sigma_of_least_variance_is_not_shifted():
    scheduler = TimeShiftFlowMatchEulerDiscreteScheduler(
        window=100, variance_model="signal", v0=50.0
    )
    _, told = run(scheduler)
    _, stock = run(FlowMatchEulerDiscreteScheduler())
    assert told == stock
    assert int(scheduler.shifts) == 0


@pytest.mark.parametrize("cls", STOCK)
def test_signatures_settings_and_tensors_are_stock(cls, tmp_path):
    for name in ("step", "set_timesteps"):
        assert inspect.signature(getattr(cls, name)) == inspect.signature(getattr(STOCK[cls], name))
    stock = STOCK[cls](**({"shift": 4.0} if "Flow" in cls.__name__ else {"beta_start": 0.001}))
    made = cls.from_config(stock.config, window=30, cutoff=250, **extra(cls))
    made.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for scheduler in (made, loaded):
        assert (scheduler.config.window, scheduler.config.cutoff) == (30, 250)
        for name in ("alphas_cumprod", "sigmas"):
            if hasattr(stock, name):
                assert torch.equal(getattr(scheduler, name), getattr(stock, name))


def test_models_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="use_flow_sigmas = True"):
        TimeShiftDPMSolverMultistepScheduler(use_flow_sigmas=True)
    for cls in (TimeShiftDPMSolverMultistepScheduler, TimeShiftEulerDiscreteScheduler):
        cls(variant="dpm", prediction_type="v_prediction")  # off
        with pytest.raises(ValueError, match="prediction_type = 'v_prediction'"):
            cls(variant="dpm", prediction_type="v_prediction", window=40)
    with pytest.raises(ValueError, match="timestep_type = 'continuous'"):
        TimeShiftEulerDiscreteScheduler(timestep_type="continuous", window=40)
    with pytest.raises(ValueError, match="invert_sigmas = True"):
        TimeShiftFlowMatchEulerDiscreteScheduler(invert_sigmas=True)
