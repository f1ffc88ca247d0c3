"""What stands between a policy and a pipeline: compiled graphs, image-to-video, two denoisers."""

from __future__ import annotations

import warnings

import pytest
import torch

from accel.method import FallbackWarning, NoEffectWarning, Recipe, attached
from accel.testing import assert_equal, tiny
from accel.tiny import TinyPipeline, _redraw
from sparse_attn._live import _read
from sparse_attn.subblock_lse import SubblockLSE


def sparse(density=0.3, **settings):
    """On tiny pipelines of a few dozen tokens; the first half of the steps is dense."""
    defaults = {"dense": (0.5, 0.0), "blocks": (16, 16), "guard": False}
    return SubblockLSE(**{**defaults, "density": density, **settings})


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend of `torch.compile` that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compile_blocks(host, graphs):
    module = host.pipe.transformer
    for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(module, name, ()):
            block.compile(fullgraph=True, backend=graphs)


@pytest.mark.parametrize(
    "pipeline",
    ["wan", "cogvideox", *(pytest.param(p, marks=pytest.mark.slow) for p in ("ltx", "flux"))],
)
def test_compiled_blocks_attend_sparsely(dynamo, pipeline):
    """As without graphs, bit for bit; blocks share a graph; attached before and after."""
    host, graphs = tiny(pipeline), Graphs()
    plain = host.run()
    with attached(sparse(), host.pipe) as live:
        expected = host.run()
        compile_blocks(host, graphs)
        assert_equal(expected, host.run(), "compiled after attaching")
        eager, compiled = live.report()["runs"]
    assert not torch.equal(expected, plain)
    assert compiled == eager
    assert compiled["fallbacks"] == {}
    of_sparse = graphs.count
    assert_equal(plain, host.run(), "compiled, detached")
    assert of_sparse <= graphs.count - of_sparse + 1, "a graph for every block"
    with attached(sparse(0.8), host.pipe) as live:
        host.run()
        (run,) = live.report()["runs"]
    assert run["detail"]["density"] > eager["detail"]["density"]
    assert graphs.count <= 2 * of_sparse + 1, "graphs were made again"


@pytest.mark.parametrize("pipeline", ["wan", pytest.param("cogvideox", marks=pytest.mark.slow)])
def test_a_denoiser_that_is_one_graph_attends_sparsely(dynamo, pipeline):
    """Nothing can be put in order around it, so every attention does that itself."""
    host = tiny(pipeline)
    with attached(sparse(), host.pipe) as live:
        expected = host.run()
        compiled = torch.compile(host.pipe.transformer, fullgraph=True, backend="eager")
        host.pipe.transformer = compiled
        found = host.run()
        eager, whole = live.report()["runs"]
    assert (found - expected).abs().max().item() < 1e-4  # as in other tests of everything kept
    assert whole["detail"]["density_by_step"] == eager["detail"]["density_by_step"]
    assert whole["fallbacks"] == {}


def test_masked_attention_in_graphs_is_dense_and_says_so(dynamo):
    host = tiny("hunyuanvideo")
    plain = host.run()
    compile_blocks(host, "eager")
    with attached(sparse(), host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        with pytest.warns(FallbackWarning, match="blocks are compiled, and their attention has"):
            assert_equal(plain, host.run(), "dense, compiled")
        (run,) = live.report()["runs"]
    assert list(run["detail"]["dense"]) == list(run["fallbacks"])
    assert "density" not in run["detail"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks at
def test_graphs_with_gradients_are_dense_and_it_is_said(dynamo):
    host = tiny("wan")
    transformer = host.pipe.transformer
    x, text = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 7, 24)
    compile_blocks(host, "eager")
    right = transformer(x, torch.ones(1), text).sample
    with attached(sparse(dense=(0.0, 0.0)), host.pipe) as live:
        host.pipe.scheduler.set_timesteps(2)
        with live.clock.at(0), pytest.warns(FallbackWarning, match="no gradients"):
            found = transformer(x, torch.ones(1), text).sample
        found.sum().backward()
        live.clock.end()
    assert torch.equal(found, right)
    assert transformer.blocks[0].attn1.to_q.weight.grad is not None


def test_split_tokens_are_dense_and_it_is_said(monkeypatch):
    from diffusers.models.transformers import transformer_wan

    host = tiny("wan")
    plain = host.run()
    dispatch = transformer_wan.dispatch_attention_fn
    monkeypatch.setattr(  # nobody is there to split with
        transformer_wan,
        "dispatch_attention_fn",
        lambda *args, **kwargs: dispatch(*args, **{**kwargs, "parallel_config": None}),
    )
    with attached(sparse(), host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        for block in host.pipe.transformer.blocks:
            block.attn1.processor._parallel_config = object()
        with pytest.warns(FallbackWarning, match="context parallelism"):
            assert_equal(plain, host.run(), "dense, of split tokens")
        (run,) = live.report()["runs"]
    assert "density" not in run["detail"]


def image_to_video(kind):
    """Wan 2.1 (an image embedding, 36 channels of which here 12), 2.2 with two denoisers, and 2.2
    with a timestep for each token."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    host = tiny("wan22" if kind == "2.2" else "wan")
    parts = {"tokenizer": None, "text_encoder": None, "image_processor": None}
    more = {"2.1": {"image_dim": 8, "added_kv_proj_dim": 32}}.get(kind, {})
    channels = 4 if kind == "2.2 5B" else 12
    g = torch.Generator().manual_seed(1)
    inputs = {**host.inputs, "image": torch.rand(1, 3, 16, 32, generator=g)}
    for slot in ("transformer", "transformer_2"):
        model = getattr(host.pipe, slot)
        if model is not None:
            config = {**model.config, "in_channels": channels, **more}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                parts[slot] = WanTransformer3DModel.from_config(config).eval()
                _redraw(parts[slot])
    if kind == "2.1":
        for name in ("prompt_embeds", "negative_prompt_embeds"):  # the model counts on 512
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 0, 0, 512 - 7))
    pipe = WanImageToVideoPipeline(
        vae=host.pipe.vae, scheduler=host.pipe.scheduler, **parts,
        boundary_ratio=host.pipe.config.boundary_ratio, expand_timesteps=kind == "2.2 5B",
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    seen = torch.randn(1, 5, 8, generator=g)  # what an image encoder would say
    pipe.encode_image = lambda image, device: seen
    return TinyPipeline(f"wan-i2v {kind}", pipe, inputs)


@pytest.mark.parametrize("kind", ["2.1", "2.2", "2.2 5B"])
def test_image_to_video(kind):
    """Everything kept is the host to rounding; with less, every step of both denoisers is sparse
    and the image counts."""
    host = image_to_video(kind)
    plain = host.run()
    with attached(sparse(0.9999, dense=(0.0, 0.0)), host.pipe) as live:
        kept = host.run()
        (run,) = live.report()["runs"]
    assert (kept - plain).abs().max().item() < 1e-4
    assert run["detail"]["density"] == 1
    assert run["fallbacks"] == {}
    with attached(sparse(dense=(0.0, 0.0)), host.pipe) as live:
        less = host.run()
        (run,) = live.report()["runs"]
    assert [step for step, _ in run["detail"]["density_by_step"]] == [0, 1, 2, 3]
    assert run["computed"] == 0
    assert not torch.equal(less, plain)
    host.inputs["image"] = 1 - host.inputs["image"]
    assert not torch.equal(host.run(), plain)


def test_both_denoisers_of_wan_22_take_turns():
    """Each is sparse at its own steps, in all of its own layers."""
    host = tiny("wan22")
    by_slot = {"transformer": set(), "transformer_2": set()}

    class Noted(SubblockLSE):
        def keep(self, q, k, place, live):
            by_slot[place.denoiser].add((place.step, place.layer))
            return super().keep(q, k, place, live)

    host.run()
    with attached(Noted((0.0, 0.0), (16, 16), guard=False), host.pipe) as live:
        host.run()
        (run,) = live.report()["runs"]
    steps = {slot: sorted({step for step, _ in found}) for slot, found in by_slot.items()}
    assert steps["transformer"]
    assert steps["transformer_2"]
    assert steps["transformer"] + steps["transformer_2"] == [0, 1, 2, 3]
    for found in by_slot.values():
        assert {layer for _, layer in found} == {0, 1, 2}
    assert run["computed"] == 0


def test_what_a_run_kept_is_read_at_once(reads):
    kept = {(4, 0): [torch.tensor(0.25), torch.tensor(0.75)], (4, 1): [torch.tensor(1.0)]}
    with reads() as seen:
        assert _read(kept) == {(4, 0): 0.5, (4, 1): 1.0}
    assert len(seen) == 1


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("cache", ["interval", "first block", "taylor"])
def test_what_a_cache_holds_from_a_dense_step_is_of_the_same_tokens(cache, share):
    """All blocks kept, the video is the cache's own: no step lays tokens otherwise than others."""
    from caches.interval import IntervalCache
    from caches.native import FirstBlockCache, TaylorSeer

    caches = {
        "interval": IntervalCache(4, parts="blocks"),
        "first block": FirstBlockCache(0.9),
        "taylor": TaylorSeer(interval=3, warmup=2),
    }
    host = tiny("wan")
    host.inputs["num_inference_steps"] = 6
    with attached(caches[cache], host.pipe):
        expected = host.run()
    both = Recipe((caches[cache], sparse(0.9999, dense=(share, 0.0))))
    with attached(both, host.pipe) as live:
        found = host.run()
        _, run = (member["runs"][0] for member in live.report()["members"])
    assert run["detail"]["density"] == 1
    assert run["detail"]["dense"]["first steps"] > 0
    # rounding, as where everything is kept without a cache
    assert (found - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("dense", [(1.0, 0.0), (0.0, 1.0)])
def test_a_policy_that_never_attends_sparsely_leaves_tokens_where_they_lie(dense):
    host = tiny("wan")
    plain = host.run()
    with attached(sparse(dense=dense), host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        assert_equal(plain, host.run(), "dense in all steps or layers")
        assert "density" not in live.report()["runs"][0]["detail"]
