"""Quantised layers: weights in 8 or 4 bits, activations in 8 bits or as they are.

``QuantLinear``, ``QuantConv`` and ``SplitConv`` stand in a loaded model, or behind a method's layer
on the model's own module. Scales are kept as the bits of float32 (integer buffers), because loaders
cast floats. The timestep reaches a layer through ``Bins``: one tensor, written once a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant._rounding import bits_of, floats4, floats_of, per_channel, share_outside, unpack4
from quant.kernels import cpu, reference

Scheme = Literal["static", "token", "weight"]
Kernel = Literal["auto", "int8", "reference"]


@torch.compiler.assume_constant_result
def multiplies_integers(device: torch.device) -> bool:
    """Whether linear layers have an integer kernel on this GPU."""
    if find_spec("triton") is None:
        return False
    from quant.kernels import gpu

    return gpu.runs_on(device)


ROUNDED = 1e-4  # of the largest timestep: what hosts round by on the way to the denoiser, at least


class Bins(nn.Module):
    """Which group of timesteps is being computed: ``index``, one element, shared by all layers.

    times, groups: calibrated timesteps and the group of each; another timestep is in the group of
    the nearest one. off: how far the farthest of late was from that, over what rounding explains as
    a share (``ROUNDED``, or the precision of the type it came in).
    """

    times: Tensor
    groups: Tensor
    index: Tensor
    off: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("times", torch.zeros(steps, dtype=torch.int32))  # bits of float32
        self.register_buffer("groups", torch.zeros(steps, dtype=torch.int64))
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("off", torch.zeros(1), persistent=False)

    def fill(self, times: Tensor, groups: Tensor) -> Bins:
        self.times.copy_(bits_of(times))
        self.groups.copy_(groups)
        return self

    def set(self, timestep: Any) -> None:
        """From a denoiser's argument, a number or tensor. Of several the largest counts: tokens of
        a frame that is given have time 0."""
        given = torch.as_tensor(timestep, device=self.index.device).amax().reshape(1)
        off, near = (floats_of(self.times) - given.float()).abs().min(0, keepdim=True)
        self.index.copy_(self.groups[near])
        eps = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        self.off.copy_(torch.maximum(self.off, off / max(ROUNDED, eps)))

    def is_off_grid(self) -> bool:
        """Whether a timestep since ``off`` was 0 was none of those calibrated; waits for it."""
        return bool(self.off > floats_of(self.times).max())


class _NoGradient(torch.autograd.Function):
    """What was computed in integers, and an error where a gradient would get lost in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "layers with quantised activations have no gradients; train on the model's own weights"
        )


class _Quantised(nn.Module):
    """What both kinds of layer share. ``groups``: of timesteps, for static scales."""

    qweight: Tensor  # s8 (o, ...), or u8 (o, ceil(k / 2)) with two 4-bit codes a byte
    wscale: Tensor  # (o), bits of float32
    ascale: Tensor  # (groups), bits of float32; static schemes only
    azero: Tensor  # (groups) int32

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
        # a parameter, because models look at a part's parameters for its type
        self.bias = nn.Parameter(torch.zeros(shape[0]), requires_grad=False) if bias else None
        self.kernel: Kernel = "auto"
        self.bins: list[Bins] = []  # in a list, so that it is no submodule of every layer
        self._ready: dict[str, Tensor] = {}

    def pieces(self) -> list[_Quantised]:
        """Parts with grids of their own, by channels of the input."""
        return [self]

    @property
    def by_time(self) -> bool:
        """Whether activations have several scales, by groups of timesteps."""
        return self.scheme == "static" and len(self.ascale) > 1

    def clipped(self, x: Tensor) -> list[float]:
        """Share of x outside the static grid of the present group; empty without such grids."""
        return [share_outside(x, *self._activation())] if self.scheme == "static" else []

    def codes(self) -> Tensor:
        """s8 (o, ...)."""
        return unpack4(self.qweight, self.shape) if self.bits == 4 else self.qweight

    @property
    def weight(self) -> Tensor:
        """The weight that this layer stands for, float32; for whoever looks at type or device."""
        packed = self.bits == 4
        codes = floats4(self.qweight, self.shape) if packed else self.qweight.float()
        return codes.mul_(per_channel(floats_of(self.wscale), len(self.shape)))

    def _activation(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the present group, one element each."""
        scales, zeros = floats_of(self.ascale), self.azero
        if scales.shape[0] == 1:
            return scales, zeros
        index = self.bins[0].index
        return scales.index_select(0, index), zeros.index_select(0, index)

    def pack(self) -> None:
        """Lay the weights out as the integer kernel reads them, if it is to run where they are.

        On a GPU these are the codes, which are unpacked where they are 4-bit.

        Done at the first call; before it for compiled graphs, which can not do it themselves.
        """
        if "packed" in self._ready or not self._runs_integers(self.wscale):
            return
        if not self.wscale.is_cuda:
            self._ready["packed"] = self._packed()
            return
        self._ready["packed"] = codes = self.codes()
        if self.scheme == "static":
            self._ready["sums"] = codes.sum(1, dtype=torch.int32)  # what a zero point adds

    def _packed(self) -> Tensor:
        raise NotImplementedError

    def _quantised(self, x: Tensor) -> Tensor:
        """The output, with quantised activations."""
        raise NotImplementedError

    def _opaque(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
            return self._quantised(x)
        with torch.no_grad():
            out = self._quantised(x)
        return _NoGradient.apply(x, out)

    def computed_by(self) -> str:
        """ "int8" kernels or their "reference"; "float" where activations are whole."""
        if self.scheme == "weight":
            return "float"
        return "int8" if self._runs_integers(self.wscale) else "reference"

    def _runs_integers(self, x: Tensor) -> bool:
        if self.scheme == "weight" or self.kernel == "reference":
            return False
        if x.device.type == "cpu":
            return self.kernel == "int8" or cpu.fast()
        return isinstance(self, QuantLinear) and x.is_cuda and multiplies_integers(x.device)

    def _float_weight(self, like: Tensor) -> Tensor:
        """Made at every call, not kept: who leaves activations whole wants the memory."""
        return self.weight.to(like.device, like.dtype)

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def memory(self) -> int:
        """Bytes of weights that this layer holds at run time, in the form that its kernel reads."""
        more = (t for t in self._ready.values() if t is not self.qweight)
        return sum(t.nbytes for t in [*self.parameters(), *self.buffers(), *more])

    def __getstate__(self) -> dict[str, Any]:
        """To copy or pickle: packed weights can not be, and are packed again."""
        return {**self.__dict__, "_ready": {}}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_packed, self._ready = "packed" in self._ready, {}
        super()._load_from_state_dict(*args, **kwargs)
        if was_packed:
            self.pack()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_packed, self._ready = "packed" in self._ready, {}
        moved = super()._apply(fn, recurse)
        if was_packed:
            self.pack()
        return moved


class QuantLinear(_Quantised):
    """A linear layer, (..., k) -> (..., n)."""

    def __init__(self, n: int, k: int, **how: Any) -> None:
        super().__init__((n, k), **how)
        self.out_features, self.in_features = n, k

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "weight":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self._float_weight(x), bias)
        return self._opaque(x)

    def _quantised(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if not self._runs_integers(x):
            out = self._reference(rows.float())
        elif x.is_cuda:
            out = self._integers_on_gpu(rows)
        else:
            out = self._integers(rows.float())
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _packed(self) -> Tensor:
        return cpu.pack_linear(self.codes())

    def _integers(self, rows: Tensor) -> Tensor:
        scales = floats_of(self.wscale)
        self.pack()
        packed = self._ready["packed"]
        if self.scheme == "token":
            return cpu.linear_token(rows, packed, scales, self._bias())
        return cpu.linear_static(rows, packed, scales, self._bias(), *self._activation())

    def _integers_on_gpu(self, rows: Tensor) -> Tensor:
        from quant.kernels import gpu  # where there is triton

        self.pack()
        packed, scales = self._ready["packed"], floats_of(self.wscale)
        if self.scheme == "token":
            return gpu.linear_token(rows, packed, scales, self.bias)
        grid = self._activation()
        return gpu.linear_static(rows, packed, scales, self.bias, *grid, self._ready["sums"])

    def _reference(self, rows: Tensor) -> Tensor:
        scales = floats_of(self.wscale)
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

    def _packed(self) -> Tensor:
        scales = floats_of(self.wscale)
        return cpu.pack_conv(self.codes(), scales, self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "weight":
            convolve = F.conv2d if x.ndim == 4 else F.conv3d
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return convolve(x, self._float_weight(x), bias, *self.geometry)
        return self._opaque(x)

    def _quantised(self, x: Tensor) -> Tensor:
        scales = floats_of(self.wscale)
        scale, zero = self._activation()
        if self._runs_integers(x):
            self.pack()
            packed, bias = self._ready["packed"], self._bias()
            out = cpu.conv_static(x.float(), packed, scales, bias, scale, zero, *self.geometry)
        else:
            out = reference.conv_static(
                x.float(), self.codes(), scales, self._bias(), scale, zero, self.geometry
            )
        return out.to(x.dtype)  # channels last, which the next layer takes as it is


class SplitConv(nn.Module):
    """A convolution over the concatenation of a UNet's hidden states and a skip connection.

    Both have ranges of their own, so each has its own grids, of weights and of activations: the sum
    of two convolutions. Q-Diffusion (arXiv 2302.04304) splits in the same way.
    """

    def __init__(self, hidden: QuantConv, skip: QuantConv) -> None:
        super().__init__()
        self.hidden, self.skip = hidden, skip
        self.out_channels = hidden.out_channels
        self.in_channels = hidden.in_channels + skip.in_channels

    def pieces(self) -> list[_Quantised]:
        return [self.hidden, self.skip]

    @property
    def bits(self) -> int:
        return self.hidden.bits

    @property
    def scheme(self) -> Scheme:
        scheme: Any = self.hidden.scheme
        return scheme

    @property
    def bias(self) -> Tensor | None:
        return self.hidden.bias

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.hidden.weight, self.skip.weight), 1)

    def _halves(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split((self.hidden.in_channels, self.skip.in_channels), 1)

    def clipped(self, x: Tensor) -> list[float]:
        halves = zip(self.pieces(), self._halves(x), strict=True)
        return [share for piece, part in halves for share in piece.clipped(part)]

    def forward(self, x: Tensor) -> Tensor:
        hidden, skip = self._halves(x)
        return self.hidden(hidden) + self.skip(skip)

    def memory(self) -> int:
        return self.hidden.memory() + self.skip.memory()


Layer = QuantLinear | QuantConv | SplitConv


def layer_for(
    module: nn.Module, *, bits: int, scheme: Scheme, groups: int | Sequence[int], split: int = 0
) -> Layer:
    """An empty quantised layer in the form of a stock one.

    groups: of timesteps, or for each of two pieces. split: channels of the input's first piece.

    Raises:
        ValueError: there is no such layer.
    """
    how: dict[str, Any] = {
        "bits": bits,
        "scheme": scheme,
        "bias": getattr(module, "bias", None) is not None,
    }
    if isinstance(module, nn.Linear):
        return QuantLinear(module.out_features, module.in_features, groups=groups, **how)
    geometry = conv_geometry(module)
    if geometry is None or scheme == "token" or (split and not splittable(module)):
        raise ValueError(f"quantised layers ({scheme}) stand for no {module}")
    weight: Any = module.weight
    shape = tuple(weight.shape)
    if not split:
        return QuantConv(shape, geometry, groups=groups, **how)
    of_each = (groups, groups) if isinstance(groups, int) else groups
    first, second = ((shape[0], n, *shape[2:]) for n in (split, shape[1] - split))
    return SplitConv(
        QuantConv(first, geometry, groups=of_each[0], **how),
        QuantConv(second, geometry, groups=of_each[1], **how | {"bias": False}),
    )


def splittable(module: Any) -> bool:
    """Whether a convolution may be taken apart by channels of its input."""
    return conv_geometry(module) is not None and module.groups == 1


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
