"""8-bit linear layers and convolutions on CPUs, through the oneDNN operators that torch ships.

u8 x s8 with static scales (a tensor, so that each timestep may have its own) and, for linear
layers, a scale for each row. Written for AVX512-VNNI and tested there; right on any
CPU, but without VNNI neither fast nor, on old oneDNN paths, safe from 16-bit saturation: ``fast``
tells. Weights are packed once; the packing does not depend on the activations' scale. Each is one
custom operator, so that a compiled graph holds it as a whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "accel_quant"
GEOMETRY = tuple[list[int], list[int], list[int], int]


@torch.compiler.assume_constant_result
def fast() -> bool:
    """Whether this CPU has the instructions that the kernels are written for."""
    return _has_vnni()


@functools.cache
def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()


def pack_linear(weight: Tensor) -> Tensor:
    """s8 (n, k) in oneDNN's own layout."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def pack_conv(weight: Tensor, scales: Tensor, geometry: GEOMETRY) -> Tensor:
    """s8 (o, c / groups, ...) in oneDNN's own layout."""
    return torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry, None)


def _linear_static(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor, zero: Tensor
) -> Tensor:
    """x (m, k) float, packed weight, scales (n), scale (1) float32, zero (1) int32 -> (m, n)."""
    return _linear(_quantised(x, scale, zero), packed, scales, bias, scale, zero)


def _linear_static_form(x, packed, scales, bias, scale, zero):
    return x.new_empty((x.shape[0], scales.shape[0]), dtype=torch.float32)


def _linear_token(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (m, k) float, packed weight, scales (n) -> (m, n)."""
    rows = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
    out = _linear(_bytes((x / rows).add_(128.5)), packed, scales, None, _ONE, _MIDDLE)
    return out.mul_(rows) if bias is None else torch.addcmul(bias, out, rows)


def _linear_token_form(x, packed, scales, bias):
    return x.new_empty((x.shape[0], scales.shape[0]), dtype=torch.float32)


_ONE, _MIDDLE = torch.ones(1), torch.full((1,), 128, dtype=torch.int32)


def _quantised(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``reference.quantise_static`` in as few passes as eager operations allow."""
    shifted = torch.add(torch.tensor(float(zero) + 0.5), x, alpha=float(1 / scale))
    return _bytes(shifted.clamp_(0, 255))


def _bytes(x: Tensor) -> Tensor:
    """float -> u8 by way of int32: both conversions are vectorised, the direct one is not.

    The integers take the place of ``x``, value by value: fresh memory costs more than the work.
    """
    whole = x.view(torch.int32)
    return whole.copy_(x).to(torch.uint8)


def _linear(
    q: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor, zero: Tensor
) -> Tensor:
    zeros = torch.zeros(scales.shape[0], dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise.tensor(
        q, scale, zero, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )


def _conv_static(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """x (b, c, h, w) float -> (b, o, h', w'), channels last in memory."""
    q = _quantised(x, scale, zero)
    zeros = torch.zeros(scales.shape[0], dtype=torch.int64)
    return torch.ops.onednn.qconv_pointwise.tensor(
        q, scale, zero, packed, scales, zeros, bias, stride, padding, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def _conv_static_form(x, packed, scales, bias, scale, zero, stride, padding, dilation, groups):
    kernel = packed.shape[2:]  # logical sizes survive packing
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    out = x.new_empty((x.shape[0], scales.shape[0], *sides), dtype=torch.float32)
    return out.to(memory_format=torch.channels_last) if x.ndim == 4 else out


# Each as one operator for compiled graphs; called directly elsewhere, which saves the dispatch.


def _operator(name: str, compute: Callable[..., Tensor], form: Callable[..., Tensor]) -> Any:
    operator: Any = torch.library.custom_op(f"{NAMESPACE}::{name}", compute, mutates_args=())
    operator.register_fake(form)

    @functools.wraps(compute)
    def call(*args: Any) -> Tensor:
        return (operator if torch.compiler.is_compiling() else compute)(*args)

    return call


linear_static = _operator("linear_static", _linear_static, _linear_static_form)
linear_token = _operator("linear_token", _linear_token, _linear_token_form)
conv_static = _operator("conv_static", _conv_static, _conv_static_form)


# Work, as for the layers that these stand for.


@register_flop_formula(torch.ops.onednn.qlinear_pointwise)
def _(x_shape, x_scale, x_zero, packed_shape, scales_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * scales_shape[0]


@register_flop_formula(torch.ops.onednn.qconv_pointwise)
def _(x_shape, x_scale, x_zero, packed_shape, *args, out_shape: Any, **kwargs) -> int:
    inside = packed_shape[1]  # channels of one group
    return 2 * math.prod(out_shape) * inside * math.prod(packed_shape[2:])
