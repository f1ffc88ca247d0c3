"""Predicted noise divided by a number."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

import accel
from accel.testing import assert_equal, checks, conform, tiny
from samplers.epsilon_scaling import EpsilonScaling

SCALED = EpsilonScaling(1.1, slope=0.05)


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["ddpm", "dit", "sd"])
def test_conformance(check, pipeline):
    conform(check, SCALED, pipeline)


def outputs(pipe, method=None):
    """(x, what the scheduler was given, t) of every step."""
    seen = []
    step = pipe.scheduler.step

    def listen(predicted, t, x, *args, **kwargs):
        seen.append((x.clone(), predicted.clone(), int(t)))
        return step(predicted, t, x, *args, **kwargs)

    pipe.scheduler.step = listen
    return seen


def test_noise_is_divided_and_nothing_else():
    host, plain = tiny("ddim"), tiny("ddim")
    seen, before = outputs(host.pipe), outputs(plain.pipe)
    plain.run()
    with accel.attached(SCALED, host.pipe):
        host.run()
    x, predicted, t = seen[0]
    assert torch.equal(x, before[0][0])
    torch.testing.assert_close(predicted, before[0][1] / (1.1 + 0.05 * t / 1000))
    assert not torch.equal(seen[1][0], before[1][0])


def test_velocity_is_that_of_the_scaled_noise():
    host, plain = tiny("ddim"), tiny("ddim")
    for each in (host, plain):
        scheduler = each.pipe.scheduler
        each.pipe.scheduler = scheduler.from_config(
            scheduler.config, prediction_type="v_prediction"
        )
    seen, before = outputs(host.pipe), outputs(plain.pipe)
    plain.run()
    with accel.attached(EpsilonScaling(1.1), host.pipe):
        host.run()
    (x, v, t), (_, v_before, _) = seen[0], before[0]
    a = host.pipe.scheduler.alphas_cumprod[t].sqrt()
    s = (1 - a**2).sqrt()
    eps = (a * v_before + s * x) / 1.1
    x0 = (x - s * eps) / a
    torch.testing.assert_close(v, a * eps - s * x0, rtol=1e-4, atol=1e-5)


def test_predicted_variance_is_left_alone():
    host = tiny("dit")
    model = host.pipe.transformer
    channels = model.config.in_channels
    x = torch.randn(1, channels, model.config.sample_size, model.config.sample_size)

    def call(*args, **kwargs):
        return (torch.ones(1, 2 * channels, *x.shape[2:]),)

    live = SCALED.attach(host.pipe)
    try:
        host.pipe.scheduler.set_timesteps(4)
        with live.clock.at(0):
            (denoiser,) = accel.denoiser.denoisers(host.pipe)
            (out,) = live.scaled(denoiser)(call, x, torch.tensor([750]), torch.tensor([1]))
    finally:
        live.clock.end()
        live.detach()
    assert_equal(out[:, channels:], torch.ones_like(x), "the variance")
    assert (out[:, :channels] < 1).all()


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"slope": -2.0}, {"scale": float("nan")}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="EpsilonScaling"):
        EpsilonScaling(**settings)


def test_noise_that_is_known_is_not_scaled():
    """At zero terminal SNR the first sample is the noise; x_0 would be off by sigma times 0.1."""
    host = tiny("sd")
    host.pipe.scheduler = DDIMScheduler.from_config(
        host.pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    plain, size = host.run(output_type="latent"), host.pipe.scheduler.alphas_cumprod[-1]
    assert size == 0
    with accel.attached(EpsilonScaling(1.1), host.pipe):
        scaled = host.run(output_type="latent")
    assert 0 < (scaled - plain).abs().max() < plain.abs().max()


def test_a_mask_beside_the_sample_is_left_alone():
    """Inpainting gives the network more channels than it returns."""
    host = tiny("sd")
    host.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    live = EpsilonScaling(1.1).attach(host.pipe)
    try:
        host.pipe.scheduler.set_timesteps(4)
        x, v = torch.randn(1, 9, 4, 4), torch.randn(1, 4, 4, 4)
        with live.clock.at(0, sigma=2.0):
            found = live.rescaled(v, x, 0.9)
            assert torch.equal(found, live.rescaled(v, x[:, :4], 0.9))
    finally:
        live.clock.end()
        live.detach()


def test_networks_whose_output_is_no_noise_are_refused():
    host = tiny("sd")
    host.pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="alphas_cumprod"):
        EpsilonScaling().attach(host.pipe)


def test_flow_models_are_refused():
    with pytest.raises(ValueError, match="epsilon and v_prediction"):
        EpsilonScaling().attach(tiny("flux").pipe)
