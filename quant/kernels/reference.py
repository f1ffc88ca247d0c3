"""Integer layers in plain operations: the specification that the kernels are tested against.

Activations are unsigned 8-bit, with one scale and zero point (static) or with a scale for each row
around 128 (token); weights are signed 8-bit with a scale for each output channel. Products are
summed in int32, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantise_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x -> u8: clamp(floor(x / scale + zero + 1/2), 0, 255). scale, zero: one element."""
    return (x * (1 / scale) + (zero + 0.5)).clamp_(0, 255).to(torch.uint8)


def quantise_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (m, k) -> u8 around 128, with a scale (m, 1) for each row: its largest is 127 away."""
    scale = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
    return (x / scale + 128.5).to(torch.uint8), scale


def linear_static(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor, zero: Tensor
) -> Tensor:
    """x (m, k), weight s8 (n, k), scales (n) -> (m, n) in float32."""
    q = quantise_static(x, scale, zero).to(torch.int32) - zero.to(torch.int32)
    total = q.double() @ weight.double().t()  # exact: below 2^53
    return _scaled(total, scale.double() * scales.double(), bias)


def linear_token(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (m, k), weight s8 (n, k), scales (n) -> (m, n) in float32."""
    q, rows = quantise_token(x)
    return _scaled((q.double() - 128) @ weight.double().t(), rows.double() * scales.double(), bias)


def conv_static(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    geometry: tuple[list[int], list[int], list[int], int],
) -> Tensor:
    """x (b, c, ...), weight s8 (o, c / groups, ...); stride, padding, dilation, groups."""
    q = quantise_static(x, scale, zero).double() - zero.double()
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    stride, padding, dilation, groups = geometry
    total = convolve(q, weight.double(), None, stride, padding, dilation, groups)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    out = total * (scale.double() * scales.double()).view(shape)
    return (out if bias is None else out + bias.double().view(shape)).float()


def _scaled(total: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    out = total * factor
    return (out if bias is None else out + bias.double()).float()
