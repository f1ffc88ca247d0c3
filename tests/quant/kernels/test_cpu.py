"""The integer kernels against the reference, and the reference against loops."""

from __future__ import annotations

import pytest
import torch

from quant.kernels import cpu, reference

# Both sum integers exactly and then do the same three roundings of float32; 2 units in the last
# place of the largest term cover another order of them.
CLOSE = {"rtol": 2**-21, "atol": 2**-19}
GEOMETRIES = [
    ([1, 1], [1, 1], [1, 1], 1),
    ([2, 1], [0, 2], [1, 2], 1),
    ([1, 1], [1, 1], [1, 1], 4),
]


def _linear(m, k, n, bias=True):
    torch.manual_seed(m * k + n)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return torch.randn(m, k), weight, torch.rand(n) / 100, torch.randn(n) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), [(37, 64, 48), (1, 7, 5), (2, 1152, 33), (300, 3, 1)])
def test_linear_layers(m, k, n, bias):
    x, weight, scales, bias = _linear(m, k, n, bias)
    packed = cpu.pack_linear(weight)
    scale, zero = torch.tensor([0.021]), torch.tensor([117], dtype=torch.int32)
    static = cpu.linear_static(x, packed, scales, bias, scale, zero)
    wanted = reference.linear_static(x, weight, scales, bias, scale, zero)
    torch.testing.assert_close(static, wanted, **CLOSE)
    token = cpu.linear_token(x, packed, scales, bias)
    torch.testing.assert_close(token, reference.linear_token(x, weight, scales, bias), **CLOSE)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_pad_with_zero_not_with_the_zero_point(geometry):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 7)
    weight = torch.randint(-127, 128, (12, 8 // geometry[3], 3, 3), dtype=torch.int8)
    scales, bias = torch.rand(12) / 100, torch.randn(12)
    scale, zero = torch.tensor([0.03]), torch.tensor([90], dtype=torch.int32)
    packed = cpu.pack_conv(weight, scales, geometry)
    made = cpu.conv_static(x, packed, scales, bias, scale, zero, *geometry)
    wanted = reference.conv_static(x, weight, scales, bias, scale, zero, geometry)
    torch.testing.assert_close(made, wanted, **CLOSE)


def test_video_convolutions():
    torch.manual_seed(0)
    geometry = ([1, 1, 1], [1, 1, 1], [1, 1, 1], 1)
    x = torch.randn(1, 4, 3, 5, 6)
    weight = torch.randint(-127, 128, (6, 4, 3, 3, 3), dtype=torch.int8)
    scales = torch.rand(6) / 100
    scale, zero = torch.tensor([0.03]), torch.tensor([90], dtype=torch.int32)
    packed = cpu.pack_conv(weight, scales, geometry)
    made = cpu.conv_static(x, packed, scales, None, scale, zero, *geometry)
    wanted = reference.conv_static(x, weight, scales, None, scale, zero, geometry)
    torch.testing.assert_close(made, wanted, **CLOSE)


def test_one_packing_serves_all_scales():
    """So there may be a scale for each timestep."""
    x, weight, scales, bias = _linear(5, 16, 8)
    packed = cpu.pack_linear(weight)
    for s, z in ((0.01, 3), (0.05, 200)):
        scale, zero = torch.tensor([s]), torch.tensor([z], dtype=torch.int32)
        made = cpu.linear_static(x, packed, scales, bias, scale, zero)
        wanted = reference.linear_static(x, weight, scales, bias, scale, zero)
        torch.testing.assert_close(made, wanted, **CLOSE)


def test_the_reference_is_what_a_loop_says():
    x, weight, scales, bias = _linear(3, 5, 2)
    scale, zero = torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32)
    made = reference.linear_static(x, weight, scales, bias, scale, zero)
    for i in range(3):
        for j in range(2):
            total = 0
            for k in range(5):
                code = int(min(max((float(x[i, k]) / 0.02 + 100.5) // 1, 0), 255))
                total += (code - 100) * int(weight[j, k])
            assert float(made[i, j]) == pytest.approx(
                total * 0.02 * float(scales[j]) + float(bias[j]), rel=1e-5
            )


def test_a_row_of_zeros_gives_the_bias():
    x, weight, scales, bias = _linear(2, 8, 4)
    x[0] = 0
    out = cpu.linear_token(x, cpu.pack_linear(weight), scales, bias)
    assert torch.equal(out[0], bias)


def test_rows_do_not_depend_on_their_batch():
    x, weight, scales, bias = _linear(9, 32, 16)
    packed = cpu.pack_linear(weight)
    whole = cpu.linear_token(x, packed, scales, bias)
    for i in range(9):
        assert torch.equal(cpu.linear_token(x[i : i + 1], packed, scales, bias)[0], whole[i])


def test_one_graph_and_the_same_numbers():
    x, weight, scales, bias = _linear(4, 16, 8)
    packed = cpu.pack_linear(weight)

    def layer(x):
        return cpu.linear_token(x, packed, scales, bias) * 2

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
