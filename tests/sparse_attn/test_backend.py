"""The kernel of dense attention: refused by name where absent, chosen, watched, given back."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from accel import compat
from accel.method import FallbackWarning, NoEffectWarning, Recipe, attached
from accel.testing import assert_equal, assert_same_state, checks, conform, host_state, tiny
from sparse_attn._dense import Names, fault
from sparse_attn.backend import AttentionBackend
from sparse_attn.subblock_lse import SubblockLSE

MATH = AttentionBackend(("native_math",))
WAN = (4, 2, 3)  # steps, branches, blocks of tiny Wan; a block attends to itself and to text
CALLS = WAN[0] * WAN[1] * WAN[2] * 2


@pytest.fixture(scope="module")
def wan():
    host = tiny("wan")
    return host, host.run()


@pytest.fixture
def sage(monkeypatch):
    """A stand-in for the package, on a device that it runs on; computes as torch does, then
    `spoil(output, number of the call)`. The first call is the trial."""
    from diffusers.models import attention_dispatch as host

    class Package:
        calls = 0

        @staticmethod
        def spoil(out, call):
            return out

        @staticmethod
        def refuses(q, k):
            return False

        def attend(self, q, k, v, tensor_layout, is_causal, sm_scale, return_lse):
            assert tensor_layout == "NHD"
            if self.refuses(q, k):
                raise ValueError("too  much")
            self.calls += 1
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=sm_scale)
            return self.spoil(out.transpose(1, 2), self.calls)

    package = Package()
    monkeypatch.setattr(host, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setattr(host, "sageattn", package.attend)
    constraints = host._AttentionBackendRegistry._constraints
    monkeypatch.setitem(constraints, host.AttentionBackendName.SAGE, [])
    return package


@pytest.mark.parametrize("check", checks())
def test_conformance(check):
    conform(check, MATH, "wan")


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("pipeline", ["wan22", "cogvideox", "flux", "sd", "dit"])
def test_conformance_matrix(check, pipeline):
    conform(check, MATH, pipeline)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("flash", "install `flash-attn>="),
        ("flash_3", "FA3"),
        ("sage", "install `sageattention>="),
        ("xformers", "install `xformers>="),
        ("flash_hub", "pip install kernels"),
        ("native_flash", "bfloat16 or float16"),
        ("best", "no backend 'best'; known: host"),
    ],
)
def test_what_does_not_work_here_is_refused_by_name(wan, name, remedy):
    host, _ = wan
    if name in ("flash", "sage", "xformers") and not _absent(name):
        pytest.skip(f"{name} is installed")
    state = host_state(host.pipe)
    with pytest.raises(ValueError, match=name) as refused:
        AttentionBackend((name,)).attach(host.pipe)
    assert remedy in str(refused.value)
    assert_same_state(state, host_state(host.pipe))


def _absent(name: str) -> bool:
    kernel = compat.attention_kernels()[name]
    try:
        compat.fetch_attention_kernel(kernel)
    except RuntimeError:
        return True
    return False


def test_the_first_that_works_is_taken_and_the_others_are_named(wan):
    host, plain = wan
    with attached(AttentionBackend(("flash_3", "native_math", "host")), host.pipe) as live:
        found = host.run()
        report = live.report()
    (run,) = report["runs"]
    assert run["detail"]["backend"] == "native_math"
    assert list(run["detail"]["refused"]) == ["flash_3"]
    assert run["detail"]["kernels"] == {"products and softmax": WAN[2] * 2}  # of one call
    assert run["computed"] == 0
    assert run["detail"]["attended"] == CALLS
    assert run["syncs"] == WAN[0] * WAN[1]
    assert report["effect"] == "some"
    # the same sums in another order: float32 through 4 steps, outputs in 0..1
    assert (found - plain).abs().max().item() < 1e-4


@pytest.mark.parametrize("names", [("native",), ("flash_3", "host")])
def test_what_the_pipeline_has_already_is_no_effect(wan, names):
    host, plain = wan
    with attached(AttentionBackend(names), host.pipe) as live:
        with pytest.warns(NoEffectWarning):
            assert_equal(plain, host.run(), "output by the host's own kernel")
        (run,) = live.report()["runs"]
    if names == ("native",):
        assert run["computed"] == CALLS
        assert all("scaled_dot_product" in name for name in run["detail"]["kernels"])


def test_a_package_that_is_there_computes_all_attention(wan, sage):
    host, plain = wan
    default = compat.lookup("attention kernels").get_active_backend()[0]
    processor = host.pipe.transformer.blocks[0].attn1.processor
    with attached(AttentionBackend(("sage",)), host.pipe) as live:
        assert processor._attention_backend is None  # until a run begins
        assert_equal(plain, host.run(), "output by a stand-in that computes the same")
        assert compat.lookup("attention kernels").get_active_backend()[0] is default
        assert processor._attention_backend is None
    assert sage.calls == 1 + CALLS
    assert live.report()["runs"][0]["detail"]["attended"] == CALLS


def test_a_kernel_that_overflows_loses_the_rest_of_the_run(wan, sage):
    host, plain = wan
    sage.spoil = lambda out, call: out * (float("inf") if call > 1 + CALLS // 2 else 1)
    with attached(AttentionBackend(("sage",)), host.pipe) as live:
        with pytest.warns(FallbackWarning, match="not finite"):
            assert_equal(plain, host.run(), "output of a run that was saved")
        sage.spoil = lambda out, call: out
        host.run()
        first, second = live.report()["runs"]
    ((reason, count),) = first["fallbacks"].items()
    assert count == 1
    assert "sage gave values that are not finite" in reason
    assert first["computed"] == CALLS // 2  # by the host's kernel, the broken call again
    assert second["fallbacks"] == {}
    assert second["computed"] == 0


def test_without_watching_nothing_is_read(wan, sage):
    host, _ = wan
    sage.spoil = lambda out, call: out * (float("inf") if call > 1 else 1)
    with attached(AttentionBackend(("sage",), watch=False), host.pipe) as live:
        found = host.run(output_type="latent")
        (run,) = live.report()["runs"]
    assert run["syncs"] == 0
    assert not found.isfinite().all()


def test_strict_turns_a_broken_call_into_an_error(wan, sage):
    host, _ = wan
    sage.spoil = lambda out, call: out * (float("nan") if call > 1 else 1)
    with (
        attached(AttentionBackend(("sage",)), host.pipe, strict=True),
        pytest.raises(RuntimeError, match="not finite"),
    ):
        host.run()


def test_what_a_kernel_refuses_in_a_run_is_left_to_the_host(wan, sage):
    host, plain = wan

    sage.refuses = lambda q, k: q.shape[1] != k.shape[1]  # attention to text
    with attached(AttentionBackend(("sage",)), host.pipe) as live:
        with pytest.warns(FallbackWarning, match="refuses an attention: too much"):
            assert_equal(plain, host.run(), "output with attentions that were refused")
        (run,) = live.report()["runs"]
    assert run["fallbacks"] == {"sage refuses an attention: too much": WAN[2]}  # once each
    assert run["computed"] == CALLS // 2


def test_a_kernel_that_is_wrong_is_refused_at_once(wan, sage):
    host, _ = wan
    sage.spoil = lambda out, call: torch.zeros_like(out)
    with pytest.raises(ValueError, match="wrong by 100%"):
        AttentionBackend(("sage",)).attach(host.pipe)


@pytest.mark.parametrize("pipeline", ["cogvideox", "dit"])
def test_processors_that_call_torchs_attention_are_served(pipeline, sage):
    host = tiny(pipeline)
    processor = host.pipe.transformer.transformer_blocks[0].attn1.processor
    assert compat.attention_kernel_of(processor) is None
    plain = host.run()
    with attached(AttentionBackend(("sage",)), host.pipe) as live:
        found = host.run()
        (run,) = live.report()["runs"]
    assert sage.calls > 1
    assert run["computed"] == 0
    assert run["detail"]["kernels"]
    assert (found - plain).abs().max().item() < 1e-5  # strides differ, sums may


def test_a_model_without_processors_is_refused():
    pipe = SimpleNamespace(unet=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no denoiser with attention processors"):
        MATH.claims(pipe)


@pytest.mark.parametrize("outer", [True, False])
def test_sparse_attention_and_a_kernel_for_what_is_dense(wan, outer):
    """The first half of the steps is dense, by the kernel; what is sparse is not counted as its."""
    host, plain = wan
    sparse = SubblockLSE(dense=(0.5, 0.0), blocks=(16, 16), guard=False, density=0.9999)
    methods = (sparse, MATH) if outer else (MATH, sparse)
    state = host_state(host.pipe)
    with attached(Recipe(methods), host.pipe) as live:
        found = host.run()
        reports = [member["runs"][0] for member in live.report()["members"]]
    mine, backend = reports if outer else reversed(reports)
    assert_same_state(state, host_state(host.pipe))
    assert (found - plain).abs().max().item() < 1e-4
    assert mine["computed"] == CALLS // 2 // 2  # self-attentions of the first half
    assert backend["computed"] == 0
    assert backend["detail"]["kernels"] == {"products and softmax": WAN[2] * 2}


def test_two_kernels_collide(wan):
    host, _ = wan
    with pytest.raises(ValueError, match=r"AttentionBackend.*attention\.kernel"):
        Recipe((MATH, AttentionBackend(("native",)))).attach(host.pipe)


def test_compiled_blocks_take_the_kernel_along():
    host = tiny("wan")
    plain = host.run()
    for block in host.pipe.transformer.blocks:
        block.compile(backend="eager")
    with attached(MATH, host.pipe) as live:
        found = host.run()
        (run,) = live.report()["runs"]
    assert run["detail"]["in compiled graphs"] == WAN[2] * 2
    assert run["fallbacks"] == {}
    assert live.report()["effect"] == "some"
    assert (found - plain).abs().max().item() < 1e-4


def test_what_a_kernel_refuses_inside_a_graph_is_left_to_the_host(sage):
    host = tiny("wan")
    plain = host.run()
    for block in host.pipe.transformer.blocks:
        block.compile(fullgraph=True, backend="eager")
    sage.refuses = lambda q, k: q.shape[1] != k.shape[1]  # attention to text
    with attached(AttentionBackend(("sage",)), host.pipe) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # it did not get far
        with pytest.warns(FallbackWarning, match="in a graph"):
            assert_equal(plain, host.run(), "output by the host's kernel")
        (run,) = live.report()["runs"]
    assert list(run["fallbacks"].values()) == [1]
    assert run["detail"]["attended"] == 0


@pytest.mark.parametrize(
    ("shape", "spoiled", "words"),
    [
        ((2, 3, 4, 5, 6), (), None),
        ((2, 3, 4, 5, 6), (1, 2, 3, 4, 5), "finite"),
        ((2, 3, 4, 5, 6), (1, slice(None), 2), "without any variation"),
        ((2, 3, 4, 5, 6), (1, 2), None),  # one channel in all frames
        ((2, 3, 5, 6), (1,), "without any variation"),
        ((1, 1), (), None),  # a single value varies in nothing
    ],
)
def test_what_is_broken(shape, spoiled, words):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if spoiled:
        x[spoiled] = float("nan") if words == "finite" else 0.0
    found = fault(x)
    assert found is None if words is None else words in str(found)


def test_frames_of_cogvideox_are_on_another_axis():
    x = torch.randn(1, 4, 3, 5, 6)  # (b, f, c, h, w)
    x[:, 2] = 0
    assert fault(x, 1) is not None
    assert fault(x, 2) is None


def test_kernels_are_named_by_their_operators():
    q = torch.randn(1, 2, 8, 16)
    with Names() as names:
        F.scaled_dot_product_attention(q, q, q)
    assert list(names.counted("?")) == ["aten._scaled_dot_product_flash_attention_for_cpu"]
    with Names() as names:
        q.clone()
    assert list(names.counted("?")) == ["?"]
