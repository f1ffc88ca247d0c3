"""Quantised layers: weights in 8 or 4 bits, activations in 8 bits or as they are.

``QuantLinear`` and ``QuantConv`` stand in a loaded model, or behind a method's layer on the model's
own module. Scales are kept as the bits of float32 (integer buffers), because loaders cast floats.
The timestep reaches a layer through ``Bins``: one tensor that the model writes once a call.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant._rounding import bits_of, floats_of, pack4, per_channel, unpack4
from quant.kernels import cpu, reference

Scheme = Literal["static", "token", "weight"]
Kernel = Literal["auto", "int8", "reference"]


class Bins(nn.Module):
    """Which group of timesteps is being computed: ``index``, one element, shared by all layers.

    times, groups: calibrated timesteps and the group of each; another timestep is in the group of
    the nearest one.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("times", torch.zeros(steps, dtype=torch.int32))  # bits of float32
        self.register_buffer("groups", torch.zeros(steps, dtype=torch.int64))
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64), persistent=False)

    def fill(self, times: Tensor, groups: Tensor) -> Bins:
        self.times.copy_(bits_of(times))  # type: ignore[operator]
        self.groups.copy_(groups)  # type: ignore[operator]
        return self

    def set(self, timestep: Any) -> None:
        """From a denoiser's argument: a number, one element, or one a row (the first is taken)."""
        index: Any = self.index
        time = torch.as_tensor(timestep, device=index.device).flatten()[:1].float()
        near = (floats_of(self.times) - time).abs().argmin().reshape(1)  # type: ignore[arg-type]
        index.copy_(self.groups[near])  # type: ignore[index]


class _Quantised(nn.Module):
    """What both kinds of layer share. ``groups``: of timesteps, for static scales."""

    def __init__(
        self, shape: tuple[int, ...], *, bits: int, scheme: Scheme, groups: int, bias: bool
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.scheme = shape, bits, scheme
        packed = (shape[0], (math.prod(shape[1:]) + 1) // 2)
        self.register_buffer(
            "qweight",
            torch.zeros(packed, dtype=torch.uint8)
            if bits == 4
            else torch.zeros(shape, dtype=torch.int8),
        )
        self.register_buffer("wscale", torch.zeros(shape[0], dtype=torch.int32))
        if scheme == "static":
            self.register_buffer("ascale", torch.zeros(groups, dtype=torch.int32))
            self.register_buffer("azero", torch.zeros(groups, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.kernel: Kernel = "auto"
        self.bins: list[Bins] = []  # in a list, so that it is no submodule of every layer
        self._ready: dict[str, Tensor] = {}

    def fill(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: tuple[Tensor, Tensor] | None = None,
    ) -> _Quantised:
        """Take over codes (o, ...), weight scales (o) and static grids (scale, zero), (g) each."""
        buffers: dict[str, Any] = dict(self.named_buffers())
        codes = codes.to(torch.int8)
        buffers["qweight"].copy_(pack4(codes) if self.bits == 4 else codes)
        buffers["wscale"].copy_(bits_of(scale))
        if activation is not None:
            buffers["ascale"].copy_(bits_of(activation[0]))
            buffers["azero"].copy_(activation[1])
        if bias is not None:
            buffers["bias"].copy_(bias)
        self._ready = {}
        return self

    def codes(self) -> Tensor:
        """s8 (o, ...)."""
        q: Any = self.qweight
        return unpack4(q, self.shape) if self.bits == 4 else q

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for, float32; for whoever looks at type or device."""
        scale = per_channel(floats_of(self.wscale), len(self.shape))  # type: ignore[arg-type]
        return self.codes().float() * scale

    def _activation(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the present group, one element each."""
        scales, zeros = floats_of(self.ascale), self.azero  # type: ignore[arg-type]
        if scales.shape[0] == 1:
            return scales, zeros  # type: ignore[return-value]
        index = self.bins[0].index
        return scales.index_select(0, index), zeros.index_select(0, index)  # type: ignore

    def _once(self, name: str, make: Any) -> Tensor:
        if name not in self._ready:
            self._ready[name] = make()
        return self._ready[name]

    def _runs_integers(self, x: Tensor) -> bool:
        if self.scheme == "weight" or self.kernel == "reference":
            return False
        return x.device.type == "cpu" and (self.kernel == "int8" or cpu.fast())

    def _float_weight(self, like: Tensor) -> Tensor:
        return self._once("float", lambda: self.weight.to(like.device, like.dtype))

    def _bias(self) -> Tensor | None:
        bias: Any = self.bias
        return bias if bias is None or bias.dtype == torch.float32 else bias.float()

    def memory(self) -> int:
        """Bytes of weights that this layer holds at run time, in the form that its kernel reads."""
        held = [*self.buffers(), *self._ready.values()]
        return sum(t.nbytes for t in held)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ready = {}
        return super()._apply(fn, recurse)


class QuantLinear(_Quantised):
    """A linear layer, (..., k) -> (..., n)."""

    def __init__(self, n: int, k: int, **how: Any) -> None:
        super().__init__((n, k), **how)
        self.out_features, self.in_features = n, k

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "weight":
            bias: Any = self.bias
            return F.linear(x, self._float_weight(x), None if bias is None else bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features).float()
        out = self._integers(rows) if self._runs_integers(x) else self._reference(rows)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _integers(self, rows: Tensor) -> Tensor:
        scales: Tensor = floats_of(self.wscale)  # type: ignore[arg-type]
        packed = self._once("packed", lambda: cpu.pack_linear(self.codes()))
        if self.scheme == "token":
            return cpu.linear_token(rows, packed, scales, self._bias())
        return cpu.linear_static(rows, packed, scales, self._bias(), *self._activation())

    def _reference(self, rows: Tensor) -> Tensor:
        scales: Tensor = floats_of(self.wscale)  # type: ignore[arg-type]
        if self.scheme == "token":
            return reference.linear_token(rows, self.codes(), scales, self._bias())
        bias = self._bias()
        return reference.linear_static(rows, self.codes(), scales, bias, *self._activation())


class QuantConv(_Quantised):
    """A convolution over two or three axes. geometry: stride, padding, dilation, groups."""

    def __init__(self, shape: tuple[int, ...], geometry: cpu.GEOMETRY, **how: Any) -> None:
        super().__init__(shape, **how)
        self.geometry = geometry
        self.out_channels, self.in_channels = shape[0], shape[1] * geometry[3]

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "weight":
            bias: Any = self.bias
            convolve = F.conv2d if x.ndim == 4 else F.conv3d
            bias = None if bias is None else bias.to(x.dtype)
            return convolve(x, self._float_weight(x), bias, *self.geometry)
        scales: Tensor = floats_of(self.wscale)  # type: ignore[arg-type]
        scale, zero = self._activation()
        if self._runs_integers(x):
            packed = self._once(
                "packed", lambda: cpu.pack_conv(self.codes(), scales, self.geometry)
            )
            bias = self._bias()
            out = cpu.conv_static(x.float(), packed, scales, bias, scale, zero, *self.geometry)
        else:
            out = reference.conv_static(
                x.float(), self.codes(), scales, self._bias(), scale, zero, self.geometry
            )
        return out.contiguous().to(x.dtype)


def layer_for(module: nn.Module, *, bits: int, scheme: Scheme, groups: int) -> _Quantised:
    """An empty quantised layer in the form of a stock one. Raises ``ValueError`` for others."""
    how: dict[str, Any] = {"bits": bits, "scheme": scheme, "groups": groups}
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        return QuantLinear(module.out_features, module.in_features, bias=bias, **how)
    geometry = conv_geometry(module)
    if geometry is None or scheme == "token":
        raise ValueError(f"quantised layers ({scheme}) stand for no {module}")
    shape = tuple(module.weight.shape)  # type: ignore[union-attr]
    return QuantConv(shape, geometry, bias=module.bias is not None, **how)


def conv_geometry(module: Any) -> cpu.GEOMETRY | None:
    """Stride, padding, dilation and groups of a plain convolution; ``None`` for anything else."""
    plain = isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.padding_mode == "zeros"
    if not plain or isinstance(module.padding, str):
        return None
    lists = (list(module.stride), list(module.padding), list(module.dilation))
    return *lists, module.groups


def quantisable(module: nn.Module) -> bool:
    """Whether a module is a stock linear layer or plain convolution."""
    convolves = type(module) in (nn.Conv2d, nn.Conv3d) and conv_geometry(module) is not None
    return type(module) is nn.Linear or convolves
