"""Any stock scheduler through a recipe."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

import accel
from accel.method import Recipe
from accel.settings import Settings
from accel.testing import assert_equal, checks, conform, tiny
from caches.native import FirstBlockCache
from samplers.few_step import few_step_scheduler
from samplers.host import noise_scale, sample_seed, scales_initial_noise, step_keywords
from samplers.swap import SwapScheduler

DPM = SwapScheduler("DPMSolverMultistepScheduler", Settings(use_karras_sigmas=True))
SWAPS = [
    (DPM, ("sd", "sdxl", "dit", "pixart")),
    (SwapScheduler("DDPMScheduler"), ("sd", "dit", "pixart")),
    (SwapScheduler("HeunDiscreteScheduler"), ("sd", "sdxl", "pixart")),
    (SwapScheduler("EulerAncestralDiscreteScheduler"), ("sd", "pixart")),
    (SwapScheduler("FlowMatchHeunDiscreteScheduler"), ("sd3",)),
    (SwapScheduler("FlowMatchLCMScheduler"), ("sd3", "flux", "ltx")),
    (SwapScheduler("FewStepScheduler", Settings(gamma=0.3)), ("sd", "dit", "pixart")),
    (SwapScheduler("FewStepFlowScheduler", Settings(eta=0.9)), ("sd3", "flux", "wan", "ltx")),
]


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("method", [DPM, SWAPS[1][0], SWAPS[-2][0]], ids=lambda m: m.scheduler)
def test_conformance(check, method):
    conform(check, method, "dit")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(("method", "pipeline"), [(m, p) for m, ps in SWAPS for p in ps])
def test_conformance_matrix(check, method, pipeline):
    conform(check, method, pipeline)


def test_equals_assigning_the_scheduler_by_hand():
    host = tiny("dit")
    with accel.attached(DPM, host.pipe) as live:
        swapped = host.run()
        assert live.report()["runs"][0]["detail"]["scheduler"] == DPM.scheduler
    config = {k: v for k, v in host.pipe.scheduler.config.items() if k[0] != "_"}
    config["use_karras_sigmas"] = True
    host.pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    assert_equal(swapped, host.run(), "the same scheduler by hand")


def test_the_shift_of_a_flow_carries_over_under_either_name():
    host = tiny("wan")
    shift = host.pipe.scheduler.config.flow_shift
    assert shift != 1, "the tiny pipeline would show nothing"
    for name in ("FlowMatchEulerDiscreteScheduler", "FewStepFlowScheduler"):
        with accel.attached(SwapScheduler(name), host.pipe):
            assert host.pipe.scheduler.config.shift == shift
            back = SwapScheduler(
                "UniPCMultistepScheduler",
                Settings(use_flow_sigmas=True, prediction_type="flow_prediction"),
            )
            assert back._made_for(host.pipe).config.flow_shift == shift


def test_stochastic_schedulers_get_a_generator_per_sample():
    """DiTPipeline passes none: the result must not depend on the global RNG or on batch mates."""
    host = tiny("dit")
    latents = {"output_type": "pt"}
    with accel.attached(SwapScheduler("DDPMScheduler"), host.pipe):
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(host.run(class_labels=[1], **latents))
        assert_equal(outputs[0], outputs[1], "under another global seed")
        seeds = [torch.Generator().manual_seed(s) for s in (5, 6)]
        pair = host.run(class_labels=[1, 2], generator=list(seeds), **latents)
        seeds = [torch.Generator().manual_seed(s) for s in (6, 5)]
        swapped = host.run(class_labels=[2, 1], generator=list(seeds), **latents)
    # same samples in the other order; batched arithmetic may differ in the last bits
    torch.testing.assert_close(pair, swapped.flip(0), rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    host.pipe.scheduler = DDPMScheduler.from_config(host.pipe.scheduler.config)
    by_hand = host.run(class_labels=[1], **latents)
    torch.manual_seed(2)
    assert not torch.equal(by_hand, host.run(class_labels=[1], **latents)), "host defect is gone"


def test_sample_seed_tells_samples_apart():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert sample_seed(x[0]) == sample_seed(x[0].clone())
    assert sample_seed(x[0]) != sample_seed(x[1])
    assert 0 <= sample_seed(x[0]) < 2**63


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SwapScheduler("DPMSolverMultistep"), "near: .*DPMSolverMultistepScheduler"),
        (lambda: SwapScheduler("DPMSolver++"), "near: .*DPMSolverMultistepScheduler"),
        (lambda: SwapScheduler("os.system"), "no scheduler 'os.system'; give the class name"),
        (lambda: SwapScheduler("DiTPipeline"), "no scheduler"),
        (
            lambda: SwapScheduler("DDIMScheduler", Settings(beta_stat=1)),
            "mean 'beta_start'",
        ),
        (lambda: SwapScheduler(3), "scheduler"),
        (lambda: SwapScheduler("DDIMScheduler", steps=0), "steps"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("scheduler", "pipeline", "words"),
    [
        ("EulerDiscreteScheduler", "flux", "flow-matching model"),
        ("FlowMatchEulerDiscreteScheduler", "dit", "diffusion model"),
        ("DPMSolverMultistepScheduler", "ddim", "with eta="),
        ("EulerDiscreteScheduler", "dit", "unit noise"),
        ("HeunDiscreteScheduler", "dit", "unit noise"),
    ],
)
def test_wrong_kind_is_refused_before_the_run(scheduler, pipeline, words):
    host = tiny(pipeline)
    with pytest.raises(ValueError, match=words):
        SwapScheduler(scheduler).attach(host.pipe)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "PNDM", "EulerDiscrete", "FewStep"])
def test_the_levels_of_the_model_are_kept_by_classes_that_would_lay_others(name, zero):
    """CogVideoX shifts its signal-to-noise ratio, and PNDM cannot reach zero by itself."""
    pipe = tiny("cogvideox").pipe
    stock = {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
    pipe.scheduler = type(pipe.scheduler)(**stock | {"rescale_betas_zero_snr": zero})
    own = pipe.scheduler.alphas_cumprod.double()
    made = SwapScheduler(f"{name}Scheduler")._made_for(pipe)
    # float32 products of a thousand factors, each off by 2**-24
    torch.testing.assert_close(made.alphas_cumprod.double(), own, rtol=1000 * 2**-24, atol=2**-23)
    made.set_timesteps(4)
    assert not hasattr(made, "sigmas") or made.sigmas.isfinite().all()
    few = few_step_scheduler(pipe, (999, 499)).alphas_cumprod.double()
    torch.testing.assert_close(few, own, rtol=1000 * 2**-24, atol=2**-23)


@pytest.mark.parametrize("name", ["DDIMScheduler", "FewStepScheduler"])
def test_ddim_on_cogvideox_is_its_own(name):
    host = tiny("cogvideox")
    own = host.run(output_type="latent")
    with accel.attached(SwapScheduler(name), host.pipe):
        torch.testing.assert_close(host.run(output_type="latent"), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("EDMEulerScheduler", "other noise levels"),
        ("IPNDMScheduler", "other noise levels"),
        ("CogVideoXDDIMScheduler", "other noise levels"),
        ("KarrasVeScheduler", "knows no v_prediction"),
        ("RePaintScheduler", "knows no v_prediction"),
    ],
)
def test_what_cannot_serve_the_model_is_refused(scheduler, words):
    pipe = tiny("sd").pipe
    if "v_" in words:
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, prediction_type="v_prediction"
        )
    with pytest.raises(ValueError, match=words):
        SwapScheduler(scheduler).attach(pipe)


def test_levels_that_are_asked_for_are_laid():
    asked = SwapScheduler("DDIMScheduler", Settings(beta_schedule="squaredcos_cap_v2"))
    made = asked._made_for(tiny("sd").pipe)
    assert torch.equal(
        made.alphas_cumprod, DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    )


def test_nothing_is_clipped_where_the_pipeline_does_not_clip():
    host = tiny("pixart")
    assert "clip_sample" not in host.pipe.scheduler.config
    for name in ("DDIMScheduler", "DDPMScheduler", "FewStepScheduler"):
        assert not SwapScheduler(name)._made_for(host.pipe).config.clip_sample
    assert SwapScheduler("DDIMScheduler")._made_for(tiny("ddpm").pipe).config.clip_sample


def test_host_defect_dit_ignores_the_noise_scale():
    """Why sigma-space schedulers are refused there: the first latents are never scaled."""
    host = tiny("dit")
    host.pipe.scheduler = EulerDiscreteScheduler.from_config(host.pipe.scheduler.config)
    first = []
    with accel.attached(Recipe(()), host.pipe) as live:

        def layer(call_next, sample, *args, **kwargs):
            first.append(float(sample.std()))
            return call_next(sample, *args, **kwargs)

        live.around_denoiser("transformer", layer)
        host.run()
    scale = float(host.pipe.scheduler.init_noise_sigma)
    assert scale > 10
    assert first[0] < 2 / scale, "diffusers scales it now: allow these schedulers"
    assert scales_initial_noise(type(tiny("sd").pipe))
    assert noise_scale(tiny("sd3").pipe.scheduler) == 1


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("FewStepScheduler", Settings(anchors=[999, 749, 499, 249])),
        ("LCMScheduler", Settings(original_inference_steps=4)),
    ],
)
def test_schedulers_of_few_steps_go_on_pipelines_that_scale_no_noise(scheduler, config):
    host = tiny("dit")
    with accel.attached(SwapScheduler(scheduler, config, steps=4), host.pipe) as live:
        host.run()
        assert live.report()["runs"][0]["steps"] == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in KDPM2
def test_every_scheduler_tells_its_noise_before_its_grid():
    """Read at attach, when the number of steps is not known."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    made = 0
    for name in names:
        cls = getattr(diffusers, name)
        try:
            scheduler = cls()
        except (ImportError, TypeError, ValueError, NotImplementedError):
            continue  # wants packages or settings
        made += 1
        assert noise_scale(scheduler) > 0, name
    assert made > 40


def test_a_setting_of_the_wrong_type_is_named():
    with pytest.raises(ValueError, match=r"DDPMScheduler cannot be made with .*beta_start"):
        SwapScheduler("DDPMScheduler", Settings(beta_start="low")).attach(tiny("dit").pipe)


def test_step_keywords_are_read_from_the_pipeline():
    pipeline = type(tiny("ddim").pipe)

    class Wrapped(pipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Own(pipeline):
        def __call__(self, x):
            return self.scheduler.step(x, 0, x, generator=None)

    for cls in (pipeline, Wrapped):
        assert "eta" in step_keywords(cls)
    assert step_keywords(Own) == {"generator"}


def test_sigma_space_goes_where_the_scheduler_noises_the_first_latents():
    host = tiny("sd-img2img")

    class Community(type(tiny("sd").pipe)):
        """Outside of diffusers."""

    class Scales(type(tiny("dit").pipe)):
        def first(self, x):
            return x * self.scheduler.init_noise_sigma

    assert scales_initial_noise(Community)
    assert scales_initial_noise(Scales)
    assert not scales_initial_noise(type(tiny("dit").pipe))
    by_hand = tiny("sd-img2img")
    with accel.attached(SwapScheduler("EulerDiscreteScheduler"), host.pipe):
        swapped = host.run()
    config = {k: v for k, v in by_hand.pipe.scheduler.config.items() if k[0] != "_"}
    by_hand.pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    assert_equal(swapped, by_hand.run(), "the scheduler by hand")


def test_a_pipeline_without_source_is_served():
    host = tiny("dit")
    scope = {"Base": type(host.pipe)}
    call = "def __call__(self, *args, **kwargs): return super().__call__(*args, **kwargs)"
    exec(f"class Typed(Base):\n    {call}", scope)
    host.pipe.__class__ = scope["Typed"]
    with accel.attached(DPM, host.pipe, strict=True):
        host.run()


def test_a_step_with_other_arguments_gets_generators():
    """CogVideoX's own solver takes the last prediction and two times before the sample."""
    host = tiny("cogvideox")
    results = []
    with accel.attached(SwapScheduler("CogVideoXDPMScheduler"), host.pipe):
        for _ in range(2):
            latents = torch.ones(1, 3, 4, 4, 8)
            results.append(host.run(generator=None, latents=latents, output_type="latent"))
    assert_equal(*results, "the noise follows from the latents")


def test_same_scheduler_has_no_effect():
    host = tiny("dit")
    same = SwapScheduler(type(host.pipe.scheduler).__name__)
    with (
        accel.attached(same, host.pipe),
        pytest.warns(accel.NoEffectWarning, match="SwapScheduler"),
    ):
        host.run()


def test_steps_override_the_calls():
    host = tiny("dit")
    expected = host.run(num_inference_steps=2)
    same = type(host.pipe.scheduler).__name__
    with accel.attached(SwapScheduler(same, steps=2), host.pipe, strict=True) as live:
        assert_equal(expected, host.run(num_inference_steps=9), "two steps instead of nine")
        run = live.report()["runs"][0]
    assert (run["steps"], run["detail"]["steps_asked"]) == (2, 9)
    assert live.report()["effect"] == "some"


def test_steps_cannot_override_a_grid_of_the_pipelines_own():
    host = tiny("flux")
    method = SwapScheduler("FlowMatchLCMScheduler", steps=2)
    with accel.attached(method, host.pipe), pytest.raises(ValueError, match="lays its own grid"):
        host.run()


def test_composes_with_a_cache():
    host = tiny("dit")
    with accel.attached(Recipe((DPM, FirstBlockCache(10.0))), host.pipe, strict=True) as live:
        host.run()
        report = live.report()
    assert [m["effect"] for m in report["members"]] == ["some", "some"]


def test_steps_of_its_own_where_the_pipeline_reckons_with_those_asked():
    """50 asked at strength 0.6 skip 20: of ten steps, all."""
    host = tiny("sd-img2img")
    with accel.attached(SwapScheduler("DPMSolverMultistepScheduler", steps=10), host.pipe) as live:
        with pytest.raises(ValueError, match="num_inference_steps=10"):
            host.run(num_inference_steps=50, strength=0.6)
        host.run(num_inference_steps=10, strength=0.6)
        assert live.report()["runs"][-1]["steps"] == 6
