"""Grids, AdaRound, GPTQ and packing against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant._rounding import (
    beta_at,
    bits_of,
    first_rounding,
    floats4,
    floats_of,
    gptq,
    largest_scale,
    nearest,
    pack4,
    per_channel,
    rounding_loss,
    searched_scale,
    share_outside,
    soft_codes,
    soft_rounding,
    soft_weight,
    static_grid,
    through_static,
    through_token,
    top,
    unpack4,
)


def _weight(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_is_the_best_of_its_eighty_candidates(bits):
    weight = _weight(6, 40)
    found = searched_scale(weight, bits)
    for channel in range(6):
        errors = {}
        for i in range(80):
            scale = weight[channel].abs().max() / top(bits) * (1 - 0.01 * i)
            codes = (weight[channel] / scale).round().clamp(-top(bits), top(bits))
            errors[float(scale)] = float((codes * scale - weight[channel]).abs().pow(2.4).mean())
        assert float(found[channel]) == pytest.approx(
            min(errors, key=lambda s: errors[s]), rel=1e-6
        )


def test_soft_rounding_begins_at_the_weight_and_hardens_to_the_nearest():
    weight = _weight(5, 7, 3, 3)
    scale = largest_scale(weight, 4)
    v = first_rounding(weight, scale)
    torch.testing.assert_close(soft_weight(weight, scale, v, 4), weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(soft_codes(weight, scale, v, 4, hard=True), nearest(weight, scale, 4))


def test_the_schedule_of_the_original():
    """20 for a fifth of the way, then a line to 2."""
    seen = [round(beta_at(step, 20_000), 6) for step in (1, 4000, 8000, 12_000, 20_000)]
    assert seen == [20, 20, 15.5, 11, 2]


def test_the_rounding_loss_is_zero_for_decisions_and_largest_in_between():
    assert float(rounding_loss(torch.tensor([100.0, -100.0]), 20)) == 0
    assert float(soft_rounding(torch.zeros(1))) == pytest.approx(0.5)
    assert float(rounding_loss(torch.zeros(3), 2)) == pytest.approx(3)


@pytest.mark.parametrize("columns", [12, 200])
def test_gptq_beats_rounding_on_the_inputs_it_saw(columns):
    weight = _weight(8, columns)
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(500, columns) @ mixing
    scale = searched_scale(weight, 4)
    codes = gptq(weight, scale, 4, inputs.t() @ inputs)
    assert codes.abs().max() <= top(4)
    assert torch.equal(codes, codes.round())
    wanted = inputs @ weight.t()

    def error(q):
        return float((inputs @ (q * scale[:, None]).t() - wanted).pow(2).mean())

    assert error(codes) < 0.8 * error(nearest(weight, scale, 4))


def test_gptq_of_independent_inputs_is_rounding():
    weight = _weight(4, 10)
    scale = searched_scale(weight, 4)
    assert torch.equal(gptq(weight, scale, 4, torch.eye(10)), nearest(weight, scale, 4))


def test_gptq_leaves_inputs_that_are_never_there():
    weight, hessian = _weight(4, 10), torch.eye(10)
    hessian[3, 3] = 0
    assert gptq(weight, searched_scale(weight, 4), 4, hessian).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**31)
)
def test_four_bits_come_back(rows, rest, seed):
    shape = (rows, *rest)
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack4(codes)
    assert packed.shape == (rows, (codes[0].numel() + 1) // 2)
    assert torch.equal(unpack4(packed, shape), codes.to(torch.int8))
    assert torch.equal(floats4(packed, shape), codes.float())


def test_scales_survive_a_loader_that_casts_floats():
    scale = _weight(9).abs()
    assert bits_of(scale).dtype == torch.int32
    assert torch.equal(floats_of(bits_of(scale)), scale)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)])
def test_static_grids_hold_zero_and_the_range(low, high):
    scale, zero = static_grid(torch.tensor([low]), torch.tensor([high]))
    x = torch.linspace(low, high, 50)
    error = (through_static(x, scale, zero) - x).abs().max()
    assert float(error) <= 0.51 * float(scale) + 1e-7 + 0.5 * float(scale)  # zero point, rounding
    assert float(through_static(torch.zeros(1), scale, zero)) == 0


def test_what_a_static_grid_clips_is_known_after_one_wait(reads):
    scale, zero = torch.tensor([0.5]), torch.tensor([100], dtype=torch.int32)
    inside = torch.tensor([-50.0, 0.0, 77.5])  # codes 0, 100 and 255
    with reads() as seen:
        assert share_outside(inside, scale, zero) == 0
    assert len(seen) == 1
    assert share_outside(torch.cat([inside, torch.tensor([78.0])]), scale, zero) == 0.25
    assert share_outside(torch.tensor([0.0, float("nan")]), scale, zero) == 1


def test_rows_of_their_own_scale():
    x = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 1.0, -3.0]])
    error = (through_token(x) - x).abs()
    assert (error <= x.abs().amax(1, keepdim=True) / 127 / 2 + 1e-6).all()


def test_scales_are_by_output_channel():
    assert per_channel(torch.ones(3), 4).shape == (3, 1, 1, 1)
