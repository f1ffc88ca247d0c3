"""The maths of quantisation: grids, AdaRound, GPTQ, packing. Tensors in, tensors out.

Weights are symmetric with one scale for each output channel: w = scale * q, |q| < 2^(b-1) (the
original has asymmetric weights; integer kernels want none of that). Activations are asymmetric u8
with one scale and zero point. AdaRound after arXiv 2004.10568 with the constants of TFMQ-DM's code
(zeta, gamma, the linear decay of beta); GPTQ after arXiv 2210.17323.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
SHRINKS = 80  # candidate ranges, each 1 % smaller
NORM = 2.4  # of the error that picks among them
WARMUP, BETA = 0.2, (20.0, 2.0)
DAMPING, COLUMNS = 0.01, 128  # of GPTQ


def top(bits: int) -> int:
    """The largest code of a symmetric grid."""
    return 2 ** (bits - 1) - 1


def largest_scale(weight: Tensor, bits: int) -> Tensor:
    """(o, ...) -> (o): the scale at which no weight is clipped."""
    return weight.flatten(1).abs().amax(1).clamp(min=1e-12) / top(bits)


def searched_scale(weight: Tensor, bits: int) -> Tensor:
    """(o, ...) -> (o): of 80 ranges, each 1 % smaller, the one of least mean |error|^2.4."""
    flat, whole = weight.flatten(1), largest_scale(weight, bits)
    best = torch.full_like(whole, math.inf)
    found = whole.clone()
    for i in range(SHRINKS):
        scale = whole * (1 - 0.01 * i)
        error = (nearest(flat, scale, bits) * scale[:, None] - flat).abs().pow(NORM).mean(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of the nearest grid points, as floats; ``scale``: (o) for weights (o, ...)."""
    grid = weight / per_channel(scale, weight.ndim)
    return grid.round().clamp(-top(bits), top(bits))


def per_channel(scale: Tensor, ndim: int) -> Tensor:
    """One scale (o) for each output channel of a weight; one for each value stays as it is."""
    return scale if scale.ndim > 1 else scale.view(-1, *(1,) * (ndim - 1))


# -- AdaRound --------------------------------------------------------------------------------


def soft_rounding(v: Tensor) -> Tensor:
    """h(V) in [0, 1]: the stretched sigmoid that decides between floor and ceiling."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def first_rounding(weight: Tensor, scale: Tensor) -> Tensor:
    """V at which the soft weight is the weight itself (where the grid reaches it)."""
    grid = weight / per_channel(scale, weight.ndim)
    rest = grid - grid.floor()
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def soft_weight(weight: Tensor, scale: Tensor, v: Tensor, bits: int) -> Tensor:
    """The weight with each value between its two grid points."""
    return soft_codes(weight, scale, v, bits) * per_channel(scale, weight.ndim)


def soft_codes(
    weight: Tensor, scale: Tensor, v: Tensor, bits: int, *, hard: bool = False
) -> Tensor:
    """The weight in steps of its grid, each value between two grid points or (hard) at one."""
    grid = weight / per_channel(scale, weight.ndim)
    up = (v >= 0).to(weight.dtype) if hard else soft_rounding(v)
    return (grid.floor() + up).clamp(-top(bits), top(bits))


def rounding_loss(v: Tensor, beta: float) -> Tensor:
    """sum(1 - |2 h(V) - 1|^beta): zero once every value has made up its mind."""
    return (1 - (2 * soft_rounding(v) - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int) -> float:
    """From 20 to 2 in a line, after a fifth of the steps, in which it stays and is not used."""
    begin = WARMUP * steps
    if step < begin:
        return BETA[0]
    return BETA[1] + (BETA[0] - BETA[1]) * max(0.0, 1 - (step - begin) / (steps - begin))


# -- GPTQ ------------------------------------------------------------------------------------


def gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Codes (o, k) of a weight (o, k), columns in turn, each error spread over those that follow.

    scale: (o), or (o, k). hessian: (k, k), sum of x x^T over inputs. Columns go by falling
    diagonal; damping is 1 % of its mean.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    steps = per_channel(scale.double(), 2).expand_as(w)[:, order]
    for begin in range(0, w.shape[1], COLUMNS):
        end = min(begin + COLUMNS, w.shape[1])
        errors = torch.zeros_like(w[:, begin:end])
        for j in range(begin, end):
            step = steps[:, j]
            codes[:, j] = (w[:, j] / step).round().clamp(-top(bits), top(bits))
            error = (w[:, j] - codes[:, j] * step) / inverse[j, j]
            w[:, j:end] -= error[:, None] * inverse[j, j:end]
            errors[:, j - begin] = error
        w[:, end:] -= errors @ inverse[begin:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[:, back].to(weight.dtype)


# -- activations -----------------------------------------------------------------------------


def static_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges -> (scale float32, zero point int32) of u8 grids that contain 0."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return scale.float(), zero


def through_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x as a static grid gives it back."""
    return ((x / scale + zero + 0.5).floor().clamp_(0, 255) - zero) * scale


def share_outside(x: Tensor, scale: Tensor, zero: Tensor) -> float:
    """Share of x that a static grid (one element each) clips; 1 if any of it is not a number."""
    ends = x.amin(), x.amax()  # aminmax is slow where channels come last
    read = torch.stack([t.reshape(()).float() for t in (*ends, scale, zero)])
    low, high, step, at = read.tolist()  # one wait for the device
    bottom, top = (-0.5 - at) * step, (255.5 - at) * step
    if bottom <= low and high <= top:
        return 0.0
    if math.isnan(low):
        return 1.0
    return float(((x < bottom) | (x > top)).float().mean())


def through_token(x: Tensor) -> Tensor:
    """x as signed 8-bit rows give it back; the last axis is the row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale + 0.5).floor() * scale


# -- packing ---------------------------------------------------------------------------------


def pack4(codes: Tensor) -> Tensor:
    """Signed 4-bit codes (o, ...) -> bytes (o, ceil(k / 2)): the first of two in the low half."""
    flat = codes.flatten(1).to(torch.int16) + 8
    if flat.shape[1] % 2:
        flat = torch.nn.functional.pad(flat, (0, 1), value=8)
    return (flat[:, 0::2] | (flat[:, 1::2] << 4)).to(torch.uint8)


def unpack4(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse: s8 codes of ``shape``."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8) - 8
    return halves[:, : math.prod(shape[1:])].reshape(shape).contiguous()


def floats4(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The same codes in float32, which integers take five times as long to become on a CPU."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).float().sub_(8)
    return halves[:, : math.prod(shape[1:])].reshape(shape)


def bits_of(scale: Tensor) -> Tensor:
    """float32 as int32 with the same bits: loaders cast floats to the model's type, not these."""
    return scale.float().contiguous().view(torch.int32)


def floats_of(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)
