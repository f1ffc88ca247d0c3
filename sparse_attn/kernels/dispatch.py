"""Which kernel computes attention to kept blocks, by where the tensors are."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import cpu, cpu_backward
from sparse_attn.kernels.reference import Attention, Pooled

TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm's name, too
MOST_LISTED = 8192  # blocks of keys, in one program
MOST_WIDE = 128  # head size; of 256, tiles of mass want 129 KiB of shared memory, and some have 99
MOST_OF_A_MEAN = 256  # tokens, in one tile


def kernel_for(device_type: str) -> str:
    """ "cpu" or "triton".

    Raises:
        ValueError: there is none for this device; says why.
    """
    if device_type == "cpu":
        return "cpu"
    if device_type not in TRITON_DEVICES:
        raise ValueError(
            f"sparse attention: no kernel for {device_type!r}; there are some for cpu, "
            f"{', '.join(TRITON_DEVICES)}"
        )
    if find_spec("triton") is None:
        raise ValueError("sparse attention on a GPU needs triton: pip install triton")
    return "triton"


def selects(x: Tensor, block: int, parts: int = 1) -> bool:
    """Whether ``triton_select`` has the means of `parts` of each block of x (b, h, s, d): on a GPU,
    without gradients, of few tokens and powers of two."""
    if x.device.type not in TRITON_DEVICES or find_spec("triton") is None:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    fits = block // parts <= MOST_OF_A_MEAN and x.shape[-1] <= MOST_WIDE
    return fits and block % parts == 0 and block & (block - 1) == 0


def lists(keep: Tensor) -> bool:
    """Whether ``triton_select`` lists the blocks of a map."""
    on_gpu = keep.device.type in TRITON_DEVICES and find_spec("triton") is not None
    return on_gpu and keep.shape[-1] <= MOST_LISTED


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None,
) -> Attention:  # fmt: skip
    """``reference.attend`` by the kernel for where q is."""
    gradients = any(x.requires_grad for x in (q, k, v))
    if kernel_for(q.device.type) == "triton":
        from sparse_attn.kernels import triton_backward, triton_forward

        kernel = triton_backward.attend if gradients else triton_forward.attend
    else:
        kernel = cpu_backward.attend if gradients else cpu.attend
    return kernel(q, k, v, blocks, pooled, scale=scale)
