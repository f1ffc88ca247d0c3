"""Guidance by a tuned model against its definition, with adapters, artifacts and caches inside."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch

from accel.artifact import Artifact, ArtifactRef, Fingerprint
from accel.clock import clock_of
from accel.denoiser import denoisers
from accel.method import Recipe, attached
from accel.testing import assert_equal, assert_same_state, checks, conform, host_state, tiny
from caches.interval import IntervalCache
from caches.native import TaylorSeer
from samplers.distillation import HIGH, Weights, merge
from samplers.rlg import RLG, extrapolated
from samplers.swap import SwapScheduler


def tuning(name, folder, size=0.05, method="samplers.rlg:RLG"):
    """An artifact with low-rank changes of this size to a tiny pipeline's denoiser."""
    module = denoisers(tiny(name).pipe)[0].module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tensors = {
            k: size * torch.randn_like(v) if k.endswith(HIGH) else v.detach()
            for k, v in Weights(module, rank=2).tensors().items()
        }
    return Artifact(method, Fingerprint.of(module), tensors).save(folder / f"{name}-{size}.st")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rlg")


def tuned_host(name, ref):
    """The pipeline with the changes written into its weights."""
    host = tiny(name)
    own = dict(denoisers(host.pipe)[0].module.named_parameters())
    with torch.no_grad():
        for parameter, value in merge(own, Artifact.load(ref).tensors):
            own[parameter].copy_(value)
    return host


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["sd", "wan"])
def test_conformance(check, name, folder):
    conform(check, RLG(tuning(name, folder)), name)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "pixart"])
def test_conformance_matrix(check, name, folder):
    conform(check, RLG(tuning(name, folder)), name)


@pytest.mark.parametrize("name", ["sd", "dit", "wan"])
def test_weight_zero_is_the_base_and_one_the_tuned_model(name, folder):
    ref, host = tuning(name, folder), tiny(name)
    base, tuned = host.run(), tuned_host(name, ref).run()
    assert not torch.equal(base, tuned)
    for weight, expected in ((0.0, base), (1.0, tuned)):
        with attached(RLG(ref, weight=weight), host.pipe):
            assert_equal(host.run(), expected, f"weight {weight}")
    assert_equal(host.run(), base, "afterwards")


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.6, 3.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_equals_mixing_behind_guidance(weight, scale, folder):
    """The published order: each network guided by itself, then mixed, then one step of Euler's."""
    ref = tuning("sd", folder)
    euler, call = SwapScheduler("EulerDiscreteScheduler"), {"guidance_scale": scale}
    host, other = tiny("sd"), tuned_host("sd", ref)
    call |= {"num_inference_steps": 1}  # from the same noise
    with attached(Recipe((euler, RLG(ref, weight=weight))), host.pipe):
        mixed = latents(host, call)
    with attached(euler, host.pipe), attached(euler, other.pipe):
        base, tuned = latents(host, call), latents(other, call)
    assert torch.allclose(mixed, base + weight * (tuned - base), atol=2e-5 * float(base.std()))


def latents(host, call):
    return host.run(**call, output_type="latent")


def test_two_gaussians_give_the_extrapolated_one():
    """Base N(0, 1), tuned N(m, 1): at every noise level the mixed noise is that of N(w m, 1)."""
    x, m, alpha = torch.randn(64, 3, 2, 2), 1.3, 0.6
    s = (1 - alpha**2) ** 0.5

    def noise(mean):
        return s * (x - alpha * mean)  # -s times the score of N(alpha mean, 1)

    for weight in (0.0, 1.0, 1.6, 3.0):
        found = extrapolated(noise(0.0), noise(m), weight, 3)
        assert torch.allclose(found, noise(weight * m), atol=1e-5)


def test_a_learned_variance_is_the_tuned_models():
    base, tuned = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    found = extrapolated(base, tuned, 2.0, 3)
    assert torch.allclose(found[:, :3], 2 * tuned[:, :3] - base[:, :3], atol=1e-5)
    assert torch.equal(found[:, 3:], tuned[:, 3:])


def with_adapters(host, *names):
    from peft import LoraConfig

    kind = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft wonders about a second one
        for name in names:
            host.pipe.unet.add_adapter(kind, name)
    host.pipe.unet.set_adapter(list(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for path, p in host.pipe.unet.named_parameters():
            if "lora_" in path:
                p.data = 0.3 * torch.randn_like(p)
    return host


def test_an_adapter_is_toggled_and_given_back():
    host = with_adapters(tiny("sd"), "reward")
    tuned, base = host.run(), tiny("sd").run()
    state = host_state(host.pipe)
    for weight, expected in ((0.0, base), (1.0, tuned)):
        with attached(RLG(adapter="reward", weight=weight), host.pipe):
            assert_equal(host.run(), expected, f"weight {weight}")
    with attached(RLG(adapter="reward", weight=2.0), host.pipe) as live:
        assert not torch.equal(host.run(), tuned)
    assert live.report()["effect"] == "some"
    assert_same_state(state, host_state(host.pipe))


def test_other_adapters_stay_on_in_the_base():
    host = with_adapters(tiny("sd"), "style", "reward")
    both = copy.deepcopy(host)
    both.pipe.unet.set_adapter("style")
    style = both.run()
    with attached(RLG(adapter="reward", weight=0.0), host.pipe):
        assert_equal(host.run(), style, "the base keeps its style")


def test_an_adapter_equals_the_same_changes_in_an_artifact(folder):
    host = with_adapters(tiny("sd"), "reward")
    parts = dict(host.pipe.unet.named_parameters())
    tensors = {}
    for path, p in parts.items():
        if ".lora_A." in path:
            layer = path.split(".lora_A.")[0]
            scale = host.pipe.unet.get_submodule(layer).scaling["reward"]
            tensors[f"{layer}.weight.lora_A"] = p.detach()
            tensors[f"{layer}.weight.lora_B"] = scale * parts[path.replace("_A", "_B")].detach()
    plain = tiny("sd")
    made = Artifact(RLG.name(), Fingerprint.of(plain.pipe.unet), tensors)
    ref = made.save(folder / "adapter.st")
    with attached(RLG(adapter="reward", weight=1.6), host.pipe):
        one = host.run()
    with attached(RLG(ref, weight=1.6), plain.pipe):
        other = plain.run()
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_both_networks_are_counted_as_branches_of_their_own(name, folder):
    host, seen = tiny(name), []
    with attached(RLG(tuning(name, folder)), host.pipe) as live:
        inner = next(denoisers(host.pipe)[0].module.children())
        handle = inner.register_forward_pre_hook(lambda *_: seen.append(live.clock.now))
        host.run()
        handle.remove()
    (run,) = live.report()["runs"]
    own = [b for b in run["branches"] if not b.endswith(".base")]
    assert set(run["branches"]) == set(own) | {f"{b}.base" for b in own}
    assert run["calls"] == 2 * len(own) * run["steps"]
    numbers = {b: {n.call for n in seen if n.branch == b} for b in run["branches"]}
    assert all(len(n) == 1 for n in numbers.values())
    assert run["bytes_host"] > 0


@pytest.mark.parametrize("cache", [IntervalCache(2, 1, 0, "output", 1), TaylorSeer(3)])
def test_caches_inside_keep_the_two_networks_apart(cache, folder):
    """With a tuning of nothing, any weight gives the base: unless a cache mixes up the two."""
    host = tiny("wan")
    call = {"num_inference_steps": 8}
    with attached(Recipe((cache,)), host.pipe):
        alone = host.run(**call)
    assert not torch.equal(alone, host.run(**call)), "the cache does nothing here"
    with attached(Recipe((cache, RLG(tuning("wan", folder, 0.0), weight=3.0))), host.pipe):
        assert_equal(host.run(**call), alone, "with a cache inside")


def test_a_cache_of_the_models_own_is_kept_apart(folder):
    from diffusers import TaylorSeerCacheConfig

    host, call = tiny("wan"), {"num_inference_steps": 8}
    host.pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1)
    )
    alone = host.run(**call)
    again = tiny("wan")
    again.pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1)
    )
    with attached(RLG(tuning("wan", folder, 0.0), weight=3.0), again.pipe):
        assert_equal(again.run(**call), alone, "with a cache of its own")


def test_outside_the_interval_the_tuned_model_runs_alone(folder):
    ref = tuning("sd", folder)
    host = tiny("sd")
    with attached(RLG(ref, weight=3.0, start=0.5, stop=0.75), host.pipe) as live:
        host.run(num_inference_steps=8)
    (run,) = live.report()["runs"]
    assert run["calls"] == 8 + 2


def test_the_interval_is_of_the_steps_that_are_made(folder):
    """Image to image makes three of five here: with two fifths of five none would be guided."""
    host = tiny("sd-img2img")
    with attached(RLG(tuning("sd-img2img", folder), stop=0.4), host.pipe) as live:
        host.run()
    (run,) = live.report()["runs"]
    assert (run["steps"], run["calls"]) == (3, 3 + 1)


def test_clock_and_weights_survive_an_exception(folder):
    host = tiny("sd")
    before = host.run()
    with attached(RLG(tuning("sd", folder)), host.pipe):
        seen = []

        def stop(*_):
            seen.append(1)
            if len(seen) == 2:  # in the base
                raise RuntimeError("stop")

        handle = host.pipe.unet.conv_in.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            host.run()
        handle.remove()
    assert clock_of(host.pipe).now is None
    assert_equal(host.run(), before, "after an exception")


def test_what_cannot_work_is_refused(folder):
    host, ref = tiny("sd"), tuning("sd", folder)
    with pytest.raises(ValueError, match="one of artifact, adapter"):
        RLG()
    with pytest.raises(ValueError, match="one of artifact, adapter"):
        RLG(ref, "reward")
    with pytest.raises(ValueError, match="start < stop"):
        RLG(ref, start=0.5, stop=0.5)
    with pytest.raises(ValueError, match="no adapter 'reward' is on"):
        RLG(adapter="reward").attach(host.pipe)
    other = tuning("sd", folder, 0.1, "samplers.distilled:Distilled")
    with pytest.raises(ValueError, match=r"is for samplers\.distilled"):
        RLG(other).attach(host.pipe)
    with pytest.raises(ValueError, match="does not fit"):
        RLG(tuning("dit", folder)).attach(host.pipe)
    fused = with_adapters(tiny("sd"), "reward")
    for layer in fused.pipe.unet.modules():
        if "reward" in getattr(layer, "scaling", {}):
            layer.merge(adapter_names=["reward"])
    with pytest.raises(ValueError, match="fused"):
        RLG(adapter="reward").attach(fused.pipe)


def test_neutral_settings(folder):
    ref = ArtifactRef("x", "0" * 64)
    assert RLG(ref, weight=2.0, start=0.2).neutral() == RLG(ref, weight=0.0)
    assert RLG(adapter="a").neutral() == dataclasses.replace(RLG(adapter="a"), weight=1.0)
