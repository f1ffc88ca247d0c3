"""8-bit linear layers on a GPU: Triton kernels that quantise rows and multiply s8 by s8.

Origin: written from the formulas of ``reference``; codes there are unsigned around 128 (token) or
around a zero point (static), here the same less 128, which leaves products as they were. Weights
are s8 (n, k) as they are stored; 4-bit ones are unpacked to that once. The product is summed in
int32 and leaves the kernel scaled (row x channel), corrected for the zero point by the weight's
row sums, with its bias, in the model's type. In compiled graphs rows are quantised in plain
operations instead, which the compiler fuses into what made them; its division may move a value at
the middle of two codes. e4m3 rows go through ``torch._scaled_mm``.
Layout: x (m, k) by rows, last stride 1. Tensor memory descriptors where k and n allow (sm90 on).
Hardware: compiled for sm80, 86, 89, 90, 100 and 120 and run in the interpreter; not yet on a GPU.
Limits: k up to 65,536 in one row; float16, bfloat16, float32; convolutions are not here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from accel.device import on_device

NAMESPACE = "accel_quant"
LARGEST_E4M3 = 448.0
GROUP = 8  # tiles of rows that share the weight's tiles in the cache


class Config(NamedTuple):
    """A tile of the product and what runs it.

    descriptors: whether through tensor memory. programs: of a processor, each for many tiles; 0: a
    program for each tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    programs: int = 0


# By compute capability: for many tiles, for few, and for a few rows. (0, 0): any other part.
CONFIGS: dict[tuple[int, int], tuple[Config, Config, Config]] = {
    (8, 0): (Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4), Config(16, 64, 256, 4, 4)),
    (8, 6): (Config(128, 128, 64, 8, 3), Config(64, 64, 128, 4, 3), Config(16, 64, 256, 4, 3)),
    (9, 0): (
        Config(128, 128, 128, 4, 3, True),
        Config(64, 64, 128, 4, 4),
        Config(16, 64, 256, 4, 4),
    ),
    (10, 0): (Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4), Config(16, 64, 256, 4, 4)),
    (12, 0): (Config(128, 128, 64, 4, 3), Config(64, 64, 128, 4, 3), Config(16, 64, 256, 4, 3)),
    (0, 0): (Config(64, 64, 64, 4, 2), Config(64, 64, 64, 4, 2), Config(16, 64, 128, 4, 2)),
}
SAME_AS = {(8, 7): (8, 0), (8, 9): (8, 6), (12, 1): (12, 0), (10, 3): (10, 0)}


@triton.jit
def quantise_rows(
    X, Codes, Rows, Scale, Zero, k, x_m,
    STATIC: tl.constexpr, FLOATS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: x (m, k) -> codes (m, k); a scale for each row unless STATIC.

    FLOATS: codes are e4m3, else s8. Division and the order of roundings are the reference's.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * x_m + at, mask=at < k, other=0.0).to(tl.float32)
    if STATIC:
        inverse = tl.div_rn(1.0, tl.load(Scale))
        moved = x * inverse + (tl.load(Zero).to(tl.float32) + 0.5)
        codes = tl.minimum(tl.maximum(moved, 0.0), 255.0).to(tl.int32) - 128
    else:
        bad = tl.max((x != x).to(tl.int32), 0)
        most = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
        scale = tl.div_rn(tl.where(bad != 0, float("nan"), most), LARGEST)
        tl.store(Rows + row, scale)
        if FLOATS:
            codes = tl.div_rn(x, scale)
        else:
            codes = (tl.div_rn(x, scale) + 128.5).to(tl.int32) - 128
    tl.store(Codes + row * k + at, codes.to(Codes.dtype.element_ty), mask=at < k)


@triton.jit
def _one_tile(
    tile, A, W, Out, Rows, Scales, Bias, Zero, Sums, m, n, k, a_m, w_n, o_m,
    STATIC: tl.constexpr, BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the product, in an order that keeps GROUP tiles of rows in the cache."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    at_m = (first + tile % (GROUP * tiles_n) % high) * BLOCK_M
    at_n = tile % (GROUP * tiles_n) // high * BLOCK_N
    rows = at_m + tl.arange(0, BLOCK_M)
    columns = at_n + tl.arange(0, BLOCK_N)
    inside = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if DESCRIPTORS:
        for start in range(0, k, BLOCK_K):
            a = A.load([at_m, start])
            w = W.load([at_n, start])
            acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
    else:
        a_at = A + (rows % m).to(tl.int64)[:, None] * a_m + inside[None, :]
        w_at = W + (columns % n).to(tl.int64)[None, :] * w_n + inside[:, None]
        for start in range(0, k, BLOCK_K):
            if WHOLE_K:
                a = tl.load(a_at)
                w = tl.load(w_at)
            else:
                a = tl.load(a_at, mask=inside[None, :] < k - start, other=0)
                w = tl.load(w_at, mask=inside[:, None] < k - start, other=0)
            acc = tl.dot(a, w, acc, out_dtype=tl.int32)
            a_at += BLOCK_K
            w_at += BLOCK_K
    real = columns < n
    scales = tl.load(Scales + columns, mask=real, other=0.0)
    if STATIC:
        zero = tl.load(Zero) - 128
        acc -= zero * tl.load(Sums + columns, mask=real, other=0)[None, :]
        out = acc.to(tl.float32) * (tl.load(Rows) * scales)[None, :]
    else:
        own = tl.load(Rows + rows, mask=rows < m, other=0.0)
        out = acc.to(tl.float32) * (own[:, None] * scales[None, :])
    if BIAS:
        out += tl.load(Bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        Out.store([at_m, at_n], out.to(Out.dtype))
    else:
        there = Out + rows.to(tl.int64)[:, None] * o_m + columns[None, :]
        tl.store(there, out.to(Out.dtype.element_ty), mask=(rows < m)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["m"])  # one binary for any number of tokens
def multiply(
    A, W, Out, Rows, Scales, Bias, Zero, Sums, m, n, k, a_m, w_n, o_m,
    STATIC: tl.constexpr, BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Codes A (m, k) by codes W (n, k) -> (m, n); Rows: (m) scales, or one element if STATIC.

    A, W and Out are descriptors where DESCRIPTORS. WHOLE_K: k is a multiple of BLOCK_K.
    PERSISTENT: a program takes several tiles, and fetches the next one while it writes one.
    """
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):  # type: ignore
            _one_tile(
                tile, A, W, Out, Rows, Scales, Bias, Zero, Sums, m, n, k, a_m, w_n, o_m,
                STATIC, BIAS, DESCRIPTORS, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), A, W, Out, Rows, Scales, Bias, Zero, Sums, m, n, k, a_m, w_n, o_m,
            STATIC, BIAS, DESCRIPTORS, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip


# -- what runs where -------------------------------------------------------------------------


class Part(NamedTuple):
    """Of a device: compute capability, (0, 0) off NVIDIA, and processors."""

    capability: tuple[int, int]
    processors: int


@functools.lru_cache(maxsize=8)
def part(device: torch.device) -> Part:
    if device.type != "cuda":
        return Part((0, 0), 1)  # the interpreter
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    hip = torch.version.hip is not None
    return Part((0, 0) if hip else torch.cuda.get_device_capability(device), processors)


def config_for(part: Part, m: int, n: int, k: int) -> Config:
    """The table's entry for a part and a shape."""
    key = SAME_AS.get(part.capability, part.capability)
    large, small, few = CONFIGS.get(key, CONFIGS[0, 0])
    if m <= 32:
        return few
    tiles = triton.cdiv(m, large.block_m) * triton.cdiv(n, large.block_n)
    return large if tiles >= part.processors else small


def quantised_rows(
    x: Tensor, kind: torch.dtype = torch.int8, *,
    scale: Tensor | None = None, zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (m, k) -> codes (m, k) and scales (m); of given ``scale`` and ``zero``, no scales (0)."""
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    static, floats = scale is not None, kind != torch.int8
    codes = torch.empty(m, k, dtype=kind, device=x.device)
    rows = torch.empty(0 if static else m, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    kernel: Any = quantise_rows[(m,)]
    with on_device(x.device):
        kernel(
            x, codes, rows, scale if static else rows, zero if static else rows, k, x.stride(0),
            STATIC=static, FLOATS=floats, LARGEST=LARGEST_E4M3 if floats else 127.0, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, rows


def multiplied(
    codes: Tensor, weight: Tensor, rows: Tensor, scales: Tensor, bias: Tensor | None,
    zero: Tensor | None = None, sums: Tensor | None = None, *,
    dtype: torch.dtype, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """codes s8 (m, k), weight s8 (n, k), rows (m) or one for all, scales (n) -> (m, n) of dtype.

    zero, sums: zero point (1) of u8 codes, and sums of the weight's rows (n). config: instead of
    the table's.
    """
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    chosen = config or config_for(part(codes.device), m, n, k)
    descriptors = chosen.descriptors and all(map(_describable, (codes, weight, out)))
    tile_m, tile_n, tile_k = chosen[:3]
    a, w, o = codes, weight, out
    if descriptors:
        a = TensorDescriptor.from_tensor(codes, [tile_m, tile_k])
        w = TensorDescriptor.from_tensor(weight, [tile_n, tile_k])
        o = TensorDescriptor.from_tensor(out, [tile_m, tile_n])
    static = zero is not None
    tiles = triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n)
    programs = chosen.programs * part(codes.device).processors
    kernel: Any = multiply[(min(tiles, programs) if programs else tiles,)]
    with on_device(codes.device):
        kernel(
            a, w, o, rows, scales, scales if bias is None else bias,
            zero if static else scales, sums if static else scales,
            m, n, k, codes.stride(0), weight.stride(0), out.stride(0),
            STATIC=static, BIAS=bias is not None, DESCRIPTORS=descriptors, WHOLE_K=k % tile_k == 0,
            BLOCK_M=tile_m, BLOCK_N=tile_n, BLOCK_K=tile_k, GROUP=GROUP, PERSISTENT=programs > 0,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _describable(x: Tensor) -> bool:
    """Whether a descriptor takes it: address and rows at multiples of 16 bytes, and any of them."""
    whole = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return whole and x.numel() > 0


# Each as one operator, so that a compiled graph holds it as a whole, and its work is counted.

torch.library.define(f"{NAMESPACE}::rows_s8", "(Tensor x) -> (Tensor, Tensor)")
torch.library.define(f"{NAMESPACE}::static_s8", "(Tensor x, Tensor scale, Tensor zero) -> Tensor")
torch.library.define(f"{NAMESPACE}::rows_e4m3", "(Tensor x) -> (Tensor, Tensor)")
torch.library.define(
    f"{NAMESPACE}::multiply_s8",
    "(Tensor codes, Tensor weight, Tensor rows, Tensor scales, Tensor? bias, Tensor? zero, "
    "Tensor? sums, ScalarType dtype) -> Tensor",
)
_HERE = "CompositeExplicitAutograd"  # the interpreter's tensors are the CPU's


@torch.library.impl(f"{NAMESPACE}::rows_s8", _HERE)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantised_rows(x)


@torch.library.impl(f"{NAMESPACE}::rows_e4m3", _HERE)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantised_rows(x, torch.float8_e4m3fn)


@torch.library.impl(f"{NAMESPACE}::static_s8", _HERE)
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return quantised_rows(x, scale=scale, zero=zero)[0]


@torch.library.impl(f"{NAMESPACE}::multiply_s8", _HERE)
def _(codes, weight, rows, scales, bias, zero, sums, dtype):
    return multiplied(codes, weight, rows, scales, bias, zero, sums, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::rows_s8")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::rows_e4m3")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::static_s8")
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake(f"{NAMESPACE}::multiply_s8")
def _(codes, weight, rows, scales, bias, zero, sums, dtype):
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


@register_flop_formula(torch.ops.accel_quant.multiply_s8)
def _(codes_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * codes_shape[0] * codes_shape[1] * weight_shape[0]


# -- layers ----------------------------------------------------------------------------------


def runs_on(device: torch.device) -> bool:
    """Whether integers are multiplied here: NVIDIA's parts from Ampere on, and AMD's."""
    return torch.version.hip is not None or part(device).capability >= (8, 0)


def has_e4m3(device: torch.device) -> bool:
    """Whether rows of e4m3 can be multiplied here: NVIDIA's parts from Ada on."""
    return device.type == "cuda" and part(device).capability >= (8, 9)


def linear_token(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (m, k), weight s8 (n, k), scales (n) -> (m, n) in x's type; a scale for each row."""
    if torch.compiler.is_compiling():
        rows = _row_scales(x, 127)
        codes = ((x.float() / rows[:, None] + 128.5).to(torch.int32) - 128).to(torch.int8)
    else:
        codes, rows = torch.ops.accel_quant.rows_s8(x)
    return torch.ops.accel_quant.multiply_s8(codes, weight, rows, scales, bias, None, None, x.dtype)


def linear_static(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor, zero: Tensor,
    sums: Tensor,
) -> Tensor:  # fmt: skip
    """With one scale (1) and zero point (1) of u8 codes; sums: of the weight's rows (n)."""
    if torch.compiler.is_compiling():
        moved = x.float() * (1 / scale) + (zero + 0.5)
        codes = (moved.clamp(0, 255).to(torch.int32) - 128).to(torch.int8)
    else:
        codes = torch.ops.accel_quant.static_s8(x, scale, zero)
    return torch.ops.accel_quant.multiply_s8(
        codes, weight, scale, scales, bias, zero, sums, x.dtype
    )


def linear_e4m3(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (m, k), weight e4m3 (n, k), scales (n) -> (m, n) in x's type, from bfloat16."""
    if torch.compiler.is_compiling():
        rows = _row_scales(x, LARGEST_E4M3)
        codes = (x.float() / rows[:, None]).to(torch.float8_e4m3fn)
    else:
        codes, rows = torch.ops.accel_quant.rows_e4m3(x)
    out = torch._scaled_mm(
        codes, weight.t(), scale_a=rows[:, None], scale_b=scales[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out.to(x.dtype)


def e4m3_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (n, k) in e4m3 and its scales (n)."""
    scales = _row_scales(weight, LARGEST_E4M3)
    return (weight.float() / scales[:, None]).to(torch.float8_e4m3fn), scales


def _row_scales(x: Tensor, largest: float) -> Tensor:
    return x.float().abs().amax(1).clamp(min=1e-12) / largest
