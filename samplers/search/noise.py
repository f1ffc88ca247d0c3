"""Keyed noise, and moves between noises and between noise levels. Maths only.

A draw is a pure function of its key, so that any candidate can be made again from a few integers,
whatever was drawn before it. Draws are float32 on the CPU and cast later: half-precision draws are
other numbers.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def key(*parts: Any) -> int:
    """A 63-bit key that depends on every part (JSON values) and on their order."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def gaussian(number: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of a key: float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(number))


def neighbour(x: Tensor, fresh: Tensor, cosine: float) -> Tensor:
    """The point at this cosine from ``x`` in the direction of ``fresh``; the norm stays exactly.

    Ma et al. 2025 (arXiv 2501.09732) search in such neighbourhoods. In float64; of x's type. With
    ``cosine`` c this is sqrt(1 - beta^2) x + beta e, beta = sqrt(1 - c^2), up to O(1 / sqrt(d)).
    """
    flat = x.double().flatten()
    norm = flat.norm()
    u = flat / norm
    z = fresh.to(u.device).double().flatten()
    w = z - (z @ u) * u
    turned = norm * (cosine * u + (1 - cosine**2) ** 0.5 * w / w.norm())
    return turned.view(x.shape).to(x.dtype)


def shifted(x: Tensor, steps: bytes, scale: float) -> Tensor:
    """x plus ``scale`` times whole numbers (one signed byte each, in x's order), at x's norm.

    Raises:
        ValueError: they are not as many as x has values.
    """
    if len(steps) != x.numel():
        raise ValueError(f"search: a shift of {len(steps)} values for noise of {x.numel()}")
    flat = x.double().flatten()
    moved = flat + scale * torch.frombuffer(bytearray(steps), dtype=torch.int8).to(flat)
    return (flat.norm() / moved.norm() * moved).view(x.shape).to(x.dtype)


def shift_to(x: Tensor, target: Tensor) -> tuple[bytes, float]:
    """Whole numbers and scale for ``shifted`` that lead from x nearest to ``target``."""
    change = (target.double() - x.double()).flatten().cpu()
    scale = float(change.abs().max()) / 127 or 1.0
    return (change / scale).round().to(torch.int8).numpy().tobytes(), scale


def packed_bytes(data: bytes) -> str:
    """As text for JSON."""
    return base64.b64encode(data).decode()


def unpacked(text: str) -> bytes:
    """The inverse of ``packed_bytes``. Raises ``ValueError`` for other text."""
    return base64.b64decode(text, validate=True)


def uphill(x: Tensor, gradient: Tensor, first: Tensor, *, cosine: float, floor: float) -> Tensor:
    """The point at this cosine from x along the gradient on the sphere, and within the cosine
    ``floor`` of ``first``: beyond it, the nearest point that is. All of x's shape; float64.

    A gradient of nothing leaves x where it is.
    """
    flat = x.double().flatten()
    norm = flat.norm()
    u, g = flat / norm, gradient.double().flatten()
    g = g - (g @ u) * u
    if float(g.norm()) > 0:
        u = cosine * u + (1 - cosine**2) ** 0.5 * g / g.norm()
    home = first.double().flatten() / first.double().norm()
    if float(u @ home) < floor:
        aside = u - (u @ home) * home
        u = floor * home + (1 - floor**2) ** 0.5 * aside / aside.norm()
    return (norm * u).view(x.shape)


def cosine_between(x: Tensor, y: Tensor) -> float:
    """Of two noises of one shape."""
    a, b = x.double().flatten(), y.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def rotate(x: Tensor, clean: Tensor, level: tuple[float, float], fresh: Tensor, beta: float):
    """A mutant of a half-finished sample on its own noise level (alpha, s).

    The noise e in x = alpha x_0 + s e turns: x' = alpha x_0 + s (sqrt(1 - beta^2) e + beta fresh).
    Adding noise instead, as EvoSearch's code does, leaves a sample noisier than its level.
    """
    alpha, s = level
    e = (x - alpha * clean) / s
    return alpha * clean + s * ((1 - beta**2) ** 0.5 * e + beta * fresh.to(x.device, x.dtype))
