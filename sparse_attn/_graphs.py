"""Sparse attention inside compiled graphs: one operator that a graph calls without looking inside.

What is attended to changes from step to step, so a graph that knew it would be made again at every
step. A graph has the number of the attention as a tensor, which is no reason to make it again for
every block; at each call the attention with that number says what to do.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from accel import compat
from sparse_attn._dense import attend_by


class Numbered(Protocol):
    """An attention that graphs call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


_numbers = itertools.count()
_NUMBERED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def numbered(attention: Numbered) -> Tensor:
    """What a graph calls `attention` by, for as long as it lives; on the CPU, read at no cost."""
    number = next(_numbers)
    _NUMBERED[number] = attention
    return torch.tensor(number, device="cpu")


def _attend(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return _NUMBERED[int(number)].attend(q, k, v).contiguous()


def _shape(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return q.new_empty(q.shape)


attend: Any = torch.library.custom_op(
    "accel::sparse_attention", _attend, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor number) -> Tensor",
)  # fmt: skip
attend.register_fake(_shape)


def attend_as_host(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense, q, k, v (b, s, h, d), by the kernel that a processor of the host has."""
    kernel = compat.attention_kernel_of(processor) or compat.attention_kernels()["native"]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend_by(kernel, q, k, v).transpose(1, 2)
