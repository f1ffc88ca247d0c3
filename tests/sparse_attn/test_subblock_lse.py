"""The default policy, and through it what all policies share: host, order, counts, guard."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch

from accel.denoiser import denoisers
from accel.method import FallbackWarning, Recipe, attached
from accel.testing import assert_equal, assert_same_state, checks, conform, host_state, tiny
from accel.tiny import TinyPipeline
from sparse_attn import token_order
from sparse_attn._live import first_of
from sparse_attn.block_map import BlockMap, block_sizes
from sparse_attn.estimators import exact_mass, subblock_mass
from sparse_attn.kernels import reference
from sparse_attn.subblock_lse import SubblockLSE, complement

FAMILIES = ["wan", "wan22", "cogvideox", "hunyuanvideo", "ltx", "flux"]


def sparse(density=0.4, **settings):
    """On tiny pipelines of a few dozen tokens, from the first step on."""
    defaults = {"dense": (0.0, 0.0), "blocks": (16, 16), "guard": False}
    return SubblockLSE(**{**defaults, "density": density, **settings})


@pytest.mark.parametrize("check", checks())
def test_conformance(check):
    conform(check, sparse(), "wan")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", FAMILIES[1:])
def test_conformance_matrix(check, pipeline):
    conform(check, sparse(), pipeline)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.1}, "density"),
        ({"blocks": (100, 64)}, "powers of two"),
        ({"dense": (0.2, 1.5)}, "shares"),
        ({"canary": -1}, "canary"),
        ({"allocate": "block"}, "allocate"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        SubblockLSE(**settings)


def test_the_estimate_is_exact_where_sub_blocks_are_uniform():
    """Tokens of a sub-block alike: their mean is each of them, and mass is mass."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 8, generator=g).repeat_interleave(4, dim=2) for n in (12, 20))
    mass = subblock_mass(q, k, (16, 16), parts=4)
    rows = torch.arange(48)
    exact = exact_mass(q, k, rows, 16).unflatten(2, (3, 16)).mean(3)
    assert torch.allclose(mass, exact, atol=1e-6)
    assert torch.allclose(mass.sum(-1), torch.ones(1, 2, 3))


@pytest.mark.parametrize(("n", "m"), [(50, 70), (33, 65), (16, 17)])
def test_the_estimate_weighs_ragged_ends_by_their_tokens(n, m):
    q, k = torch.zeros(1, 1, n, 4), torch.zeros(1, 1, m, 4)
    mass = subblock_mass(q, k, (16, 16))
    expected = block_sizes(m, 16) / m  # all logits equal
    assert torch.allclose(mass, expected.expand_as(mass), atol=1e-6)


def test_what_means_miss_is_the_covariance_of_logits_and_values():
    """A block in which one channel of the keys moves the values: the first-order loss, exactly."""
    from sparse_attn.estimators import loss_by_means

    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 16, 4)
    q[..., 0] = 0.2  # small logits: first order holds
    k, v = torch.zeros(1, 1, 48, 4), torch.zeros(1, 1, 48, 4)
    k[:, :, 16:32, 0] = torch.randn(16, generator=g)
    v[:, :, 16:32, 1] = 2 * k[:, :, 16:32, 0]  # values that follow the logits
    k[:, :, 32:, 0] = torch.randn(16, generator=g)  # logits that move nothing
    loss = loss_by_means(q, k, v, (16, 16))[0, 0, 0]
    assert loss[0] == loss[2] == 0
    scale = 1 / math.sqrt(4)
    keep = torch.tensor([[[[True, False, True]]]])
    kept = reference.attend(q, k, v, BlockMap(keep, 16, 16, 16, 48), complement(k, v, keep, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    missed = (dense - kept.out).norm(dim=-1).mean()
    mass = subblock_mass(q, k, (16, 16))[0, 0, 0, 1]
    assert missed.item() == pytest.approx((mass * loss[1]).item(), rel=0.2)
    assert loss[1].item() == pytest.approx(
        0.2 * scale * 2 * k[0, 0, 16:32, 0].var(correction=0).item(), rel=1e-4
    )


def test_the_complement_is_exact_where_dropped_blocks_are_uniform():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 32, 8, generator=g)
    k, v = (torch.randn(1, 1, 5, 8, generator=g).repeat_interleave(16, dim=2) for _ in "kv")
    keep = torch.tensor([[[[True, False, False, True, False], [False] * 5]]])
    blocks = BlockMap(keep, 16, 16, 32, 80)
    found = reference.attend(q, k, v, blocks, complement(k, v, keep, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(found.out, dense, atol=1e-6)


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_everything_kept_is_the_host_to_rounding(pipeline):
    """Order, rotary tables, text and masks are right: only the order of sums differs."""
    host = tiny(pipeline)
    plain = host.run()
    with attached(sparse(0.9999), host.pipe) as live:  # rounds to all blocks; 1.0 replaces nothing
        kept = host.run()
        run = live.report()["runs"][0]
    assert run["detail"]["density"] == 1
    assert run["fallbacks"] == {}
    # float32 through 4 steps of an untrained network, outputs in 0..1, by a lot of experience
    assert (kept - plain).abs().max().item() < 1e-4


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_less_is_kept_and_counted(pipeline):
    host = tiny(pipeline)
    with attached(sparse(0.3, pooled=False, canary=1), host.pipe) as live:
        host.run()
        run = live.report()["runs"][0]
    detail = run["detail"]
    attentions = sum(1 for d in denoisers(host.pipe) for b in d.blocks if b.self_attn)
    layers = attentions // len(denoisers(host.pipe))
    assert run["computed"] + run["skipped"] == 0
    assert 0 < detail["density"] < 1
    assert [layer for layer, _ in detail["density_by_layer"]] == list(range(layers))
    assert detail["density"] == pytest.approx(
        sum(share for _, share in detail["density_by_step"]) / len(detail["density_by_step"]),
        abs=1e-4,
    )
    assert 0 < detail["least_retained_mass"]["mean"] <= detail["retained_mass"]["mean"] < 1
    assert detail["output_error"]["mean"] > 0


def test_retained_mass_is_exact():
    """exp(lse sparse - lse dense) is the softmax mass of what was kept."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=g) for _ in "qkv")
    keep = torch.rand(1, 2, 4, 4, generator=g) < 0.5
    keep[..., 0] = True
    blocks = BlockMap(keep, 16, 16, 64, 64)
    from sparse_attn._live import compared_with_dense

    out, lse = reference.attend(q, k, v, blocks)
    _, mass, least = compared_with_dense(q, k, v, out, lse)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    kept = (weights * blocks.tokens()).sum(-1)
    assert mass.item() == pytest.approx(kept.mean().item(), abs=1e-6)
    assert least.item() == pytest.approx(kept.min().item(), abs=1e-6)


def test_first_steps_and_layers_attend_densely():
    host = tiny("wan")
    with attached(sparse(dense=(0.5, 0.3)), host.pipe) as live:
        host.run()  # 4 steps, 3 layers, 2 branches
        run = live.report()["runs"][0]
    assert run["detail"]["dense"]["first layers"] == 2 * 2
    assert [step for step, _ in run["detail"]["density_by_step"]] == [2, 3]
    assert [layer for layer, _ in run["detail"]["density_by_layer"]] == [1, 2]
    assert run["computed"] == 2 * 2 * 3 + 2 * 2


def test_a_share_of_steps_is_not_one_more_for_what_floats_do():
    assert 0.07 * 100 > 7
    assert first_of(0.07, 100) == 7
    assert first_of(0.071, 100) == 8
    assert first_of(0.2, 20) == 4


def test_an_offloaded_pipeline_is_where_it_computes():
    """Sequential offloading leaves weights on no device; what counts is where they will be."""
    from accelerate import cpu_offload

    host = tiny("wan")
    plain = host.run()
    for part in host.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=torch.device("cpu"))
    assert host.pipe.device.type == "meta"
    with attached(sparse(0.9999), host.pipe) as live:
        assert (host.run() - plain).abs().max().item() < 1e-4
        assert live.report()["runs"][0]["detail"]["density"] == 1
        assert live.values is None  # nothing of an attention is held after it


def test_the_guard_keeps_short_sequences_dense():
    host = tiny("wan")
    plain = host.run()
    with attached(sparse(guard=True), host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(plain, host.run(), "output where sparse would be slower")
        run = live.report()["runs"][0]
    assert list(run["detail"]["dense"]) == ["guard: dense attention is faster here"]
    assert "density" not in run["detail"]


def test_the_pipeline_of_newer_ltx_models():
    """It gives the model coordinates, and its timesteps by token."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline

    host = tiny("ltx")
    parts = {**host.pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = LTXConditionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    host = TinyPipeline("ltx", pipe, host.inputs)
    plain = host.run()
    with attached(sparse(0.9999), pipe) as live:
        assert (host.run() - plain).abs().max().item() < 1e-4
        run = live.report()["runs"][0]
    assert (run["detail"]["density"], run["fallbacks"]) == (1, {})


def test_a_dropped_reordering_of_the_rotary_table_shows():
    """The test above would see it: without its rotary table in order the output differs."""
    host = tiny("wan")
    plain = host.run()
    with attached(sparse(0.9999), host.pipe) as live:
        live._reorder_rotary = lambda call_next, *a, **k: call_next(*a, **k)
        live.patch.undo()
        live.adopt(denoisers(host.pipe)[0])
        wrong = host.run()
    assert (wrong - plain).abs().max().item() > 1e-3


def test_a_timestep_for_each_token():
    """Wan 2.2 with a given first frame: the timesteps are put in order, too."""
    host = tiny("wan")
    transformer = host.pipe.transformer
    x, text = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 7, 24)
    timestep = torch.rand(1, 3 * 2 * 4) * 1000
    with torch.no_grad():
        plain = transformer(x, timestep, text).sample
        with attached(sparse(0.9999), host.pipe) as live:
            host.pipe.scheduler.set_timesteps(2)
            with live.clock.at(0):
                kept = transformer(x, timestep, text).sample
            live.clock.end()
    assert (kept - plain).abs().max().item() < 1e-4


def test_autocast_casts_what_attends_as_the_host_does():
    """HunyuanVideo's queries come out of their norms in float32, its values do not."""
    host = tiny("hunyuanvideo")
    exact = host.run()
    with torch.autocast("cpu", torch.bfloat16):
        plain = host.run()
        with attached(sparse(0.9999), host.pipe):
            kept = host.run()
    # no further from the host's than that is from the truth, as everywhere in low precision
    assert (kept - plain).abs().max() <= 2 * (plain - exact).abs().max()


def test_a_run_in_inference_mode_leaves_nothing_that_has_no_gradients():
    token_order.gilbert.cache_clear()
    host = tiny("wan")
    transformer = host.pipe.transformer
    x, text = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 7, 24)
    with torch.inference_mode():
        live = sparse().attach(host.pipe)  # its clock is of this mode
        host.run()
    host.pipe.scheduler.set_timesteps(2)
    with live.clock.at(0):
        transformer(x, torch.ones(1), text).sample.square().mean().backward()
    live.detach()
    assert transformer.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_attends_densely():
    """What a call computes again in its backward pass must be what it computed."""
    host = tiny("wan")
    transformer = host.pipe.transformer
    transformer.enable_gradient_checkpointing()
    x, text = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 7, 24)

    def gradient():
        transformer.zero_grad()
        transformer(x, torch.ones(1), text).sample.square().mean().backward()
        return transformer.blocks[0].attn1.to_q.weight.grad.clone()

    plain = gradient()
    with attached(sparse(), host.pipe) as live:
        host.pipe.scheduler.set_timesteps(2)
        with live.clock.at(0), pytest.warns(FallbackWarning, match="gradient checkpointing"):
            found = gradient()
        live.clock.end()
    assert torch.equal(found, plain)


def test_a_copy_of_the_model_is_the_hosts_own():
    host = tiny("wan")
    mine = host.pipe.transformer
    with attached(sparse(), host.pipe):
        host.run()
        for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            found = other.blocks[0].attn1.processor
            assert type(found).__name__ == "WanAttnProcessor"
            assert found is not mine.blocks[0].attn1.processor.stock


def test_another_processor_is_refused_by_name():
    class Mine:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    host = tiny("ltx")
    host.pipe.transformer.transformer_blocks[1].attn1.processor = Mine()
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn1.* Mine"):
        sparse().attach(host.pipe)
    assert_same_state(state, host_state(host.pipe))


def test_an_unsupported_model_is_refused_by_name():
    with pytest.raises(ValueError, match="DiTTransformer2DModel"):
        sparse().attach(tiny("dit").pipe)


def test_fused_projections_and_a_chosen_backend_go_on_working():
    host = tiny("wan")
    host.pipe.transformer.fuse_qkv_projections()
    plain = host.run()
    with attached(sparse(0.9999), host.pipe):
        assert (host.run() - plain).abs().max().item() < 1e-4
        host.pipe.transformer.set_attention_backend("native")
        assert (host.run() - plain).abs().max().item() < 1e-4
    processor = host.pipe.transformer.blocks[0].attn1.processor
    assert type(processor).__name__ == "WanAttnProcessor"
    assert processor._attention_backend == "native"  # what the user chose stays


def test_lora_goes_on_working():
    peft = pytest.importorskip("peft")
    host = tiny("wan")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    host.pipe.transformer.add_adapter(config)
    plain = host.run()
    with attached(sparse(0.9999), host.pipe):
        assert (host.run() - plain).abs().max().item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool])
def test_padding_is_counted_exactly(dtype):
    """A sum of 289 ones is 288 in bfloat16, and one more word would be hidden."""
    host = tiny("hunyuanvideo")
    (denoiser,) = denoisers(host.pipe)
    mask = (torch.arange(600) < 289).to(dtype)[None]
    with attached(sparse(), host.pipe) as live:
        assert live._hidden_text(denoiser, (None, None, None, mask, None), {}) == 600 - 289


def test_texts_of_different_lengths_in_one_batch_attend_densely():
    host = tiny("hunyuanvideo")
    mask = torch.ones(2, 7).index_fill(1, torch.tensor([5, 6]), 0.0)
    mask[0] = 1
    transformer = host.pipe.transformer
    x, text = torch.randn(2, 4, 3, 4, 8), torch.randn(2, 7, 24)
    more = {
        "encoder_attention_mask": mask, "pooled_projections": torch.randn(2, 24),
        "guidance": torch.ones(2),
    }  # fmt: skip
    with torch.no_grad(), attached(sparse(), host.pipe) as live:
        host.pipe.scheduler.set_timesteps(2)
        with live.clock.at(0), pytest.warns(FallbackWarning, match="different lengths"):
            found = transformer(x, torch.ones(2), text, **more).sample
        live.clock.end()
        right = transformer(x, torch.ones(2), text, **more).sample
    assert torch.equal(found, right)


def test_with_a_cache_and_a_solver_in_one_recipe():
    from caches.interval import IntervalCache

    host = tiny("wan")
    with attached(Recipe((sparse(), IntervalCache(2, parts="blocks"))), host.pipe) as live:
        host.run()
        mine, cache = (member["runs"][0] for member in live.report()["members"])
    assert cache["reused"] > 0
    assert 0 < mine["detail"]["density"] < 1
    assert [step for step, _ in mine["detail"]["density_by_step"]] == [0, 2]
