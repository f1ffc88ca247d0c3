"""A student in place of the pipeline's denoiser."""

import pytest
import torch
from diffusers import FluxImg2ImgPipeline

import accel
from accel.artifact import Artifact, Fingerprint
from accel.denoiser import denoisers
from accel.measure import compare
from accel.testing import assert_equal, checks, conform, tiny
from caches.native import FirstBlockCache
from samplers.distillation import HIGH, LOW
from samplers.distilled import Distilled
from samplers.few_step import FewStepScheduler
from samplers.rlg import RLG


def student(folder, name="dit", *, low_rank=False, method=None, eta=1.0, **settings):
    """A method with an artifact as a training writes it: weights a little off the teacher's."""
    module = denoisers(tiny(name).pipe)[0].module
    own = dict(module.named_parameters())
    g = torch.Generator().manual_seed(5)
    if low_rank:
        linear = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
        tensors = {}
        for n in linear:
            rows, columns = own[f"{n}.weight"].shape
            tensors[f"{n}.weight{LOW}"] = 0.1 * torch.randn(2, columns, generator=g)
            tensors[f"{n}.weight{HIGH}"] = 0.1 * torch.randn(rows, 2, generator=g)
    else:
        tensors = {n: (1.05 * p.detach()).half() for n, p in own.items()}
    artifact = Artifact(
        method=method or Distilled.name(),
        fingerprint=Fingerprint.of(module),
        tensors=tensors,
        grid=(899.0, 599.0, 299.0),
        settings={"eta": eta, "guidance": 4.0, "call": {"guidance_scale": 1.0}},
    )
    return Distilled(artifact.save(folder / f"{name}.safetensors"), **settings)


@pytest.mark.parametrize("check", checks())
def test_conformance(check, tmp_path):
    conform(check, student(tmp_path, "flux"), "flux")


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("name", ["dit", "sd", "wan"])
def test_weights_and_steps_are_the_student_s_and_go_away(name, low_rank, tmp_path):
    host = tiny(name)
    module = denoisers(host.pipe)[0].module
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    plain = host.run(guidance_scale=1.0)
    with accel.attached(student(tmp_path, name, low_rank=low_rank), host.pipe) as live:
        own = dict(module.named_parameters())
        assert any(not torch.equal(own[n], v) for n, v in before.items())
        few = host.run(guidance_scale=1.0)
        assert live.report()["runs"][0]["steps"] == 3
    assert not torch.equal(plain, few)
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n]), n
    assert_equal(plain, host.run(guidance_scale=1.0), "after the student left")


def test_equals_the_weights_and_the_scheduler_put_there_by_hand(tmp_path):
    host, method = tiny("dit"), student(tmp_path)
    with accel.attached(method, host.pipe):
        few = host.run(guidance_scale=1.0)
    artifact = Artifact.load(method.artifact)
    host.pipe.transformer.load_state_dict(artifact.tensors, strict=False)
    host.pipe.scheduler = FewStepScheduler.from_config(
        host.pipe.scheduler.config, anchors=[899, 599, 299], clip_sample=False
    )
    assert_equal(few, host.run(guidance_scale=1.0, num_inference_steps=3), "by hand")


def test_one_step_of_a_student_of_three(tmp_path):
    host = tiny("dit")
    with accel.attached(student(tmp_path, steps=1), host.pipe) as live:
        host.run(guidance_scale=1.0)
        assert live.report()["runs"][0]["steps"] == 1
    with pytest.raises(ValueError, match="trained for 3"):
        student(tmp_path, steps=4).attach(host.pipe)
    with pytest.raises(ValueError, match="at least 1"):
        student(tmp_path, steps=0)


@pytest.mark.parametrize("name", ["dit", "sd", "wan"])  # guidance by doubled batches, by calls
def test_guidance_is_refused(name, tmp_path):
    host = tiny(name)
    with (
        accel.attached(student(tmp_path, name), host.pipe),
        pytest.raises(ValueError, match="guidance_scale=1"),
    ):
        host.run()
    host.run()  # and nothing of it is left


def test_timesteps_of_the_call_s_own_are_refused(tmp_path):
    host = tiny("sd")
    with (
        accel.attached(student(tmp_path, "sd"), host.pipe),
        pytest.raises(ValueError, match="timesteps"),
    ):
        host.run(guidance_scale=1.0, timesteps=[800, 200])


def test_an_artifact_of_another_kind_or_model_is_refused(tmp_path):
    host = tiny("dit")
    with pytest.raises(ValueError, match="is for"):
        student(tmp_path, method="caches.native:MagCache").attach(host.pipe)
    with pytest.raises(ValueError, match="does not fit"):
        student(tmp_path, "pixart").attach(host.pipe)


def test_weights_that_are_elsewhere_are_refused(tmp_path):
    host = tiny("dit")
    host.pipe.transformer.to("meta")  # where sequential offload leaves them
    with pytest.raises(ValueError, match="sequential offload"):
        student(tmp_path).attach(host.pipe)


def test_a_pair_of_denoisers_is_refused(tmp_path):
    """A student of the first alone would be followed by a teacher that wants many steps."""
    with pytest.raises(ValueError, match="2 denoisers"):
        student(tmp_path).attach(tiny("wan22").pipe)


def test_two_students_collide(tmp_path):
    host, method = tiny("dit"), student(tmp_path)
    with accel.attached(method, host.pipe), pytest.raises(ValueError, match="both claim"):
        method.attach(host.pipe)


def test_composes_with_a_cache(tmp_path):
    host, method = tiny("dit"), student(tmp_path)
    with accel.attached([FirstBlockCache(1e9), method], host.pipe) as live:
        host.run(guidance_scale=1.0)
        assert live.report()["members"][1]["runs"][0]["steps"] == 3


def test_a_second_call_of_another_method_is_no_guidance(tmp_path):
    peft = pytest.importorskip("peft")
    host, method = tiny("dit"), student(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, host.pipe.transformer, "mine")
    for order in ((method, RLG(adapter="mine")), (RLG(adapter="mine"), method)):
        with accel.attached(order, host.pipe) as live:
            host.run(guidance_scale=1.0)
            assert live.report()["members"][0]["runs"][0]["calls"] == 3 * 2
            with pytest.raises(ValueError, match="guidance_scale=1"):
                host.run()


def test_half_precision_takes_the_weights_it_can_hold(tmp_path):
    host = tiny("dit")
    host.pipe.to(dtype=torch.bfloat16)
    method = student(tmp_path)
    with accel.attached(method, host.pipe):
        name, value = next(iter(Artifact.load(method.artifact).tensors.items()))
        held = dict(host.pipe.transformer.named_parameters())[name]
        assert torch.equal(held, value.to(torch.bfloat16))
        assert held.dtype == torch.bfloat16


def test_measured_against_the_guided_teacher(tmp_path):
    inputs = [{"class_labels": [1, 2], "num_inference_steps": 5, "guidance_scale": 4.0}]
    result = compare(tiny("dit").pipe, student(tmp_path), inputs, rounds=1)
    assert result.nfe == (5 * 2 * 2, 3 * 2)
    assert result.flops[1] < result.flops[0]


def test_fresh_noise_follows_from_the_seed_alone(tmp_path):
    """DiT gives its scheduler no generator."""
    host, method = tiny("dit"), student(tmp_path, eta=0.3)
    with accel.attached(method, host.pipe):
        state = torch.get_rng_state()
        first = host.run(guidance_scale=1.0)
        again = host.run(guidance_scale=1.0)
        assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert_equal(first, again, "the same seed")
    with accel.attached(student(tmp_path), host.pipe):
        assert not torch.equal(first, host.run(guidance_scale=1.0)), "eta does nothing"


def test_image_to_image_takes_the_last_of_the_student_s_steps(tmp_path):
    host = tiny("sd-img2img")
    method = student(tmp_path, "sd-img2img")
    with accel.attached(method, host.pipe) as live:
        host.run(strength=0.7, **method.call_changes())
        assert live.report()["runs"][0]["steps"] == 2
        with pytest.raises(ValueError, match="num_inference_steps=3"):
            host.run(strength=0.7, guidance_scale=1.0, num_inference_steps=50)


def test_image_to_image_that_asks_by_sigmas_is_served(tmp_path):
    """Flux gives its scheduler sigmas and no number."""
    host, method = tiny("flux"), student(tmp_path, "flux")
    host.pipe = FluxImg2ImgPipeline(**host.pipe.components)
    host.pipe.set_progress_bar_config(disable=True)
    host.inputs |= {"image": torch.rand(1, 3, 16, 24), "strength": 0.6}
    with accel.attached(method, host.pipe) as live:
        host.run(**method.call_changes())
        run = live.report()["runs"][0]
        assert (run["steps"], run["detail"]["steps_asked"]) == (2, 3)
        with pytest.raises(ValueError, match="num_inference_steps=3"):
            host.run(num_inference_steps=9)
