"""One more step before the first."""

import pytest
import torch
from diffusers import EDMEulerScheduler

import accel
from accel.artifact import Artifact, Fingerprint
from accel.denoiser import denoisers
from accel.testing import assert_equal, checks, conform, tiny
from samplers import one_more_step
from samplers.one_more_step import OneMoreStep, first_latents, guess
from samplers.swap import SwapScheduler

PROMPTS = 12


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """digits-sd, and artifacts by kind, fitted on dark and bright pictures."""
    folder = tmp_path_factory.mktemp("oms")
    pipe = accel.load("zoo:digits-sd")
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    inputs, pictures = [], []
    for _ in range(4):
        words = ["black", "white"] * (PROMPTS // 2)
        inputs.append(
            {
                "prompt": [f"a red three on a {word} background" for word in words],
                "num_inference_steps": 3,
            }
        )
        levels = torch.tensor([-0.9, 0.9] * (PROMPTS // 2))[:, None, None, None]
        pictures.append(levels + 0.05 * torch.randn(PROMPTS, 3, 32, 32, generator=g))
    made = {
        kind: OneMoreStep.calibrate(pipe, inputs, pictures, kind=kind, clusters=2)
        for kind in ("mean", "clusters", "network")
    }
    return pipe, {k: (a, a.save(folder / f"{k}.safetensors")) for k, a in made.items()}


def test_the_formula_is_forward_noising():
    noise, clean = torch.randn(2, 3, 4, 2, 2)
    x = first_latents(noise, clean, 0.04)
    torch.testing.assert_close(x, 0.2 * clean + 0.96**0.5 * noise)
    theirs = first_latents(noise, clean, 0.04, official=True)
    torch.testing.assert_close(theirs, 0.2 * clean + 0.96 * noise)
    assert torch.equal(first_latents(noise, clean, 0.0), noise)


def test_clusters_and_the_network_tell_dark_from_bright_and_the_mean_does_not(artifacts):
    pipe, made = artifacts
    for kind, (artifact, _) in made.items():
        texts = artifact.tensors["texts"][:2]  # black, white
        found = guess(artifact.tensors, texts)
        light = pipe.vae.decode(found / pipe.vae.config.scaling_factor).sample.mean((1, 2, 3))
        if kind == "mean":
            assert torch.equal(found[0], found[1])
        else:
            assert light[0] < -0.6, kind
            assert light[1] > 0.6, kind


def test_the_network_s_error_is_the_variance_that_text_does_not_tell(artifacts):
    pipe, made = artifacts
    pictures = 0.9 * torch.ones(64, 3, 32, 32)
    pictures[::2] *= -1
    pictures += 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    texts = made["network"][0].tensors["texts"][:2].repeat(32, 1)
    latents = one_more_step._encoded(pipe, pictures)
    error = (latents - guess(made["network"][0].tensors, texts)).square().mean()
    within = torch.stack([half - half.mean(0) for half in (latents[::2], latents[1::2])])
    assert error < 1.5 * within.square().mean()
    assert error < 0.1 * latents.var()


def run(pipe, word="black", **more):
    return pipe(
        prompt=[f"a red three on a {word} background"],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **more,
    )[0]


def first_input(pipe, word="black"):
    """What the denoiser is given first, and all that it is given under a scheduler's scale."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    run(pipe, word)
    hook.remove()
    return seen[0][:1]


def test_the_first_input_is_the_formula_s(artifacts):
    pipe, made = artifacts
    artifact, ref = made["clusters"]
    noise = first_input(pipe)
    with accel.attached(OneMoreStep(ref), pipe) as live:
        found = first_input(pipe)
        report = live.report()["runs"][0]
    abar = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
    clean = guess(artifact.tensors, artifact.tensors["texts"][:1])
    torch.testing.assert_close(found, first_latents(noise, clean, abar), atol=1e-4, rtol=1e-4)
    assert report["detail"]["signal"] == pytest.approx(abar**0.5)
    assert_equal(first_input(pipe), noise, "after it left")


def test_under_a_scheduler_of_another_scale_the_first_input_is_the_same(artifacts):
    pipe, made = artifacts
    method = OneMoreStep(made["clusters"][1])
    with accel.attached(method, pipe):
        plain = first_input(pipe)
    with accel.attached([SwapScheduler("EulerDiscreteScheduler"), method], pipe):
        scaled = first_input(pipe)
    torch.testing.assert_close(plain, scaled, atol=2e-2, rtol=2e-2)


def test_guidance_goes_beyond_the_prompt_s_mean(artifacts):
    pipe, made = artifacts
    ref = made["clusters"][1]
    shifts = {}
    tensors = made["clusters"][0].tensors
    own, empty = guess(tensors, tensors["texts"][:2]), guess(tensors, tensors["empty"])
    word = "black" if torch.equal(own[1:], empty) else "white"  # of the cluster that is not empty's
    noise = first_input(pipe, word)
    for scale in (1.0, 2.0):
        with accel.attached(OneMoreStep(ref, guidance=scale), pipe):
            shifts[scale] = first_input(pipe, word) - noise
    more = own[0 if word == "black" else 1] - empty[0]
    signal = (shifts[2.0] - shifts[1.0]).flatten() @ more.flatten() / more.square().sum()
    abar = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
    assert float(signal) == pytest.approx(abar**0.5, rel=1e-3)


def test_the_spread_follows_the_noise_and_costs_no_generator(artifacts):
    pipe, made = artifacts
    method = OneMoreStep(made["mean"][1], spread=1.0)
    with accel.attached(method, pipe):
        first, again = run(pipe), run(pipe)
        other = run(pipe, num_images_per_prompt=2)
    assert_equal(first, again, "the same seed")
    assert other.shape[0] == 2
    with accel.attached(OneMoreStep(made["mean"][1]), pipe):
        assert not torch.equal(run(pipe), first)


def test_calibration_repeats_and_few_prompts_are_enough(tmp_path):
    """Fewer prompts than the spread has neighbours; the global generator is not touched."""
    pipe = accel.load("zoo:digits-sd")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": ["a red three", "a blue two"] * 2, "num_inference_steps": 3}
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again = (OneMoreStep.calibrate(pipe, [call], [pictures], kind="mean") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.tensors.items():
        assert torch.equal(value, again.tensors[name]), name
    with accel.attached(OneMoreStep(first.save(tmp_path / "few"), spread=1.0), pipe):
        run(pipe)


def test_other_sizes_are_served(artifacts):
    pipe, made = artifacts
    with accel.attached(OneMoreStep(made["mean"][1], spread=0.5), pipe):
        assert run(pipe, height=64, width=48).shape[-2:] == (16, 12)


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_conformance(check, name, tmp_path):
    module = denoisers(tiny(name).pipe)[0].module
    width = module.config.cross_attention_dim
    tensors = {
        "means": 0.5 * torch.ones(1, 4, 8, 8),
        "texts": torch.zeros(40, width),
        "empty": torch.zeros(1, width),
        "directions": torch.ones(2, 4, 8, 8) / 16,
        "coefficients": torch.arange(80.0).view(40, 2) / 20,
    }
    artifact = Artifact(
        method=OneMoreStep.name(), fingerprint=Fingerprint.of(module), tensors=tensors
    )
    conform(check, OneMoreStep(artifact.save(tmp_path / "oms"), spread=1.0), name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wan", "flow model"),
        ("sd3", "flow model"),
        ("dit", "signal"),
        ("sd-img2img", "picture"),
    ],
)
def test_pipelines_that_need_none_are_refused_with_the_reason(name, why, artifacts):
    with pytest.raises(ValueError, match=why):
        OneMoreStep(artifacts[1]["mean"][1]).attach(tiny(name).pipe)


def test_zero_terminal_snr_is_refused(artifacts):
    pipe = accel.load("zoo:digits-sd")
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True
    )
    with pytest.raises(ValueError, match="pure noise"):
        OneMoreStep(artifacts[1]["mean"][1]).attach(pipe)


def test_a_scheduler_that_does_not_tell_its_signal_is_refused(artifacts):
    pipe = accel.load("zoo:digits-sd")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="how much signal"):
        OneMoreStep(artifacts[1]["mean"][1]).attach(pipe)


def test_wrong_settings_and_data_are_refused(artifacts):
    pipe, made = artifacts
    with pytest.raises(ValueError, match="spread"):
        OneMoreStep(made["mean"][1], spread=2.0)
    call = {"prompt": ["a red three"], "num_inference_steps": 3}
    guided = call | {"guidance_scale": 5.0}
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        OneMoreStep.calibrate(pipe, [guided], [torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="1 prompts, 2 pictures"):
        OneMoreStep.calibrate(pipe, [call], [torch.zeros(2, 3, 32, 32)])
    other = Artifact.load(made["mean"][1])
    other.method = "caches.native:MagCache"
    with pytest.raises(ValueError, match="is for"):
        OneMoreStep(other.save(made["mean"][1].path + ".other")).attach(pipe)
