"""The GPU's integer kernels against the reference: in the interpreter, or on a GPU if there is one.

The interpreter multiplies bit patterns of bfloat16, so that type needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quant._layers import QuantLinear
from quant._rounding import bits_of, pack4
from quant.kernels import gpu, reference
from quant.kernels.gpu import Config

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # there in the interpreter
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
SHAPES = [(1, 7, 5), (37, 64, 48), (70, 160, 80), (33, 3, 1)]
SHAPES += [(1000, 1536, 1000), (17, 1152, 4608), (129, 1000, 72)] * ON_GPU
TILES = [None, Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 2, True)]
TILES += [Config(32, 32, 32, 4, 2, descriptors, 2) for descriptors in (False, True)]
TILES += [c for table in (gpu.CONFIGS[9, 0], gpu.CONFIGS[8, 6]) for c in table] * ON_GPU


def problem(m, k, n, dtype) -> Any:
    r = torch.Generator().manual_seed(m * k + n)
    x = (torch.randn(m, k, generator=r) * 3).to(dtype)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=r)
    return x, weight, torch.rand(n, generator=r) / 100, torch.randn(n, generator=r).to(dtype)


def static_grid() -> Any:
    return torch.tensor([0.021]), torch.tensor([117], dtype=torch.int32)


def there(*tensors) -> Any:
    return [x.to(DEVICE) for x in tensors]


def check(made, wanted, dtype):
    """Integers are exact; then four roundings of float32, and one of the output's type."""
    error = (made.cpu().double() - wanted.double()).abs()
    allowed = (
        torch.finfo(dtype).eps + 2**-21
    ) * wanted.double().abs() + 2**-21 * wanted.abs().max()
    assert made.dtype == dtype
    assert bool((error <= allowed).all()), float((error / allowed.clamp(min=1e-30)).max())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_reference_s(shape, dtype):
    x = problem(*shape, dtype)[0]
    x[0] = 0
    codes, rows = gpu.quantised_rows(*there(x))
    wanted, scales = reference.quantise_token(x.float())
    assert torch.equal(codes.cpu().int() + 128, wanted.int())
    assert torch.equal(rows.cpu(), scales[:, 0])
    scale, zero = there(*static_grid())
    codes, _ = gpu.quantised_rows(*there(x), scale=scale, zero=zero)
    assert torch.equal(
        codes.cpu().int() + 128, reference.quantise_static(x.float(), *static_grid()).int()
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_layers(shape, dtype):
    x, weight, scales, b = problem(*shape, dtype)
    b = b if shape[0] % 2 else None
    x_there, w, s = there(x, weight, scales)
    b_there = None if b is None else b.to(DEVICE)
    whole = None if b is None else b.float()
    made = gpu.linear_token(x_there, w, s, b_there)
    check(made, reference.linear_token(x.float(), weight, scales, whole), dtype)
    grid = there(*static_grid())
    made = gpu.linear_static(x_there, w, s, b_there, *grid, w.sum(1, dtype=torch.int32))
    check(made, reference.linear_static(x.float(), weight, scales, whole, *static_grid()), dtype)


@pytest.mark.parametrize("config", TILES, ids=str)
def test_tiles(config):
    if config and ON_GPU and config.descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are of sm90 on")
    x, weight, scales, bias = problem(70, 160, 80, torch.float16)
    wanted = reference.linear_static(x.float(), weight, scales, bias.float(), *static_grid())
    x, weight, scales, bias, scale, zero = there(x, weight, scales, bias, *static_grid())
    codes, _ = gpu.quantised_rows(x, scale=scale, zero=zero)
    sums = weight.sum(1, dtype=torch.int32)
    made = gpu.multiplied(
        codes, weight, scale, scales, bias, zero, sums, dtype=torch.float16, config=config
    )
    check(made, wanted, torch.float16)


def test_rows_of_others_and_gaps_between_rows_change_nothing():
    x, weight, scales, bias = there(*problem(9, 32, 16, torch.float16))
    whole = gpu.linear_token(x, weight, scales, bias)
    apart = torch.cat((x, x), 1)[:, :32]
    assert torch.equal(gpu.linear_token(apart, weight, scales, bias), whole)
    assert torch.equal(gpu.linear_token(x[4:5], weight, scales, bias), whole[4:5])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_what_is_not_a_number_stays_so():
    x, weight, scales, bias = there(*problem(3, 32, 16, torch.float32))
    x[1, 5] = float("nan")
    x[2, 5] = float("inf")
    out = gpu.linear_token(x, weight, scales, bias)
    assert out.isfinite().all(1).tolist() == [True, False, False]


def test_a_graph_does_the_same_and_is_one():
    x, weight, scales, bias = there(*problem(20, 32, 16, torch.float32))
    grid, sums = there(*static_grid()), weight.sum(1, dtype=torch.int32)

    def layers(x):
        token = gpu.linear_token(x, weight, scales, bias)
        return token * 2 + gpu.linear_static(x, weight, scales, bias, *grid, sums)

    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layers(x))


def test_no_rows_and_weights_at_odd_addresses(monkeypatch):
    """Tiles through descriptors, which want neither."""
    monkeypatch.setattr(gpu, "config_for", lambda *_: Config(32, 32, 32, 4, 2, True))
    x, weight, scales, bias = problem(9, 32, 16, torch.float16)
    wanted = reference.linear_token(x.float(), weight, scales, bias.float())
    x, weight, scales, bias = there(x, weight, scales, bias)
    odd = torch.cat((weight.flatten()[:1], weight.flatten()))[1:].view_as(weight)
    assert odd.data_ptr() % 16
    check(gpu.linear_token(x, odd, scales, bias), wanted, torch.float16)
    assert gpu.linear_token(x[:0], weight, scales, bias).shape == (0, 16)


def test_every_launch_is_made_where_its_tensors_are(made_current, monkeypatch):
    current, launched = made_current(gpu), []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*tensors, **options):
                assert current == [torch.device("cpu")]
                launched.append(options["enable_fp_fusion"])

            return launch

    for name in ("quantise_rows", "multiply"):
        monkeypatch.setattr(gpu, name, Kernel())
    x, weight, scales, bias = problem(9, 32, 16, torch.float16)
    gpu.linear_token(x, weight, scales, bias)
    assert launched == [False, True]  # codes are the reference's to the bit


@pytest.mark.slow
@pytest.mark.parametrize("part", [80, 86, 89, 90, 100, 120])
def test_compiles_without_spills_for_every_part(part):
    """In a fresh process without the interpreter."""
    code = (
        "import sys; from quant.kernels.compile_only import gpu, multiplied, quantised\n"
        "part = int(sys.argv[1]); key = divmod(part, 10); key = gpu.SAME_AS.get(key, key)\n"
        "found = [multiplied(part, config) for config in gpu.CONFIGS[key]]\n"
        "found += [quantised(part, 1536, False), quantised(part, 12288, True)]\n"
        "print([c[:5] for c in found if c.problems()])"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code, str(part)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scheme", ["token", "static"])
def test_a_layer_computes_in_integers_in_its_model_s_type(bits, scheme):
    layer = QuantLinear(72, 160, bits=bits, scheme=scheme, groups=1, bias=True)
    top, r = 2 ** (bits - 1) - 1, torch.Generator().manual_seed(0)
    codes = torch.randint(-top, top + 1, (72, 160), dtype=torch.int8, generator=r)
    layer.qweight.copy_(pack4(codes) if bits == 4 else codes)
    layer.wscale.copy_(bits_of(torch.rand(72, generator=r) / 100))
    if scheme == "static":
        layer.ascale.copy_(bits_of(static_grid()[0]))
        layer.azero.copy_(static_grid()[1])
    layer = layer.to(DEVICE).to(torch.bfloat16)
    x = torch.randn(2, 45, 160, generator=r).to(torch.bfloat16).to(DEVICE)
    assert layer.computed_by() == "int8"
    out = layer(x)
    assert out.shape == (2, 45, 72)
    layer.cpu()
    layer.kernel = "reference"
    wanted = layer(x.cpu().float()).flatten(0, 1)
    check(out.flatten(0, 1), wanted, torch.bfloat16)
    moved = layer.to(DEVICE)
    moved.kernel = "auto"
    moved.pack()
    whole = torch.compile(moved, fullgraph=True)(x)
    apart = (whole.float() - out.float()).pow(2).mean().sqrt()
    assert float(apart) < 1e-2 * float(out.float().pow(2).mean().sqrt())  # codes at ties differ


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_rows_of_e4m3():
    if not gpu.has_e4m3(torch.device("cuda", 0)):
        pytest.skip("e4m3 products are of sm89 on")
    r = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 512, generator=r).to(DEVICE, torch.bfloat16) for n in (70, 256))
    codes, scales = gpu.e4m3_weight(w)
    made = gpu.linear_e4m3(x, codes, scales, None).double()
    wanted = x.double() @ w.double().t()
    # steps of e4m3 are 1/16 to 1/8 of a value: about 0.026 of it are lost on each side
    off = ((made - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt()
    assert 0.02 < float(off) < 0.045
