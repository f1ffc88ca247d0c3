"""What launches of the Triton kernels share, forward and backward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels.reference import Pooled

# Of every launch. Products and sums in one instruction: Triton 3.10 does not unless it is told to,
# and 3.9 warns of that.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class Config(NamedTuple):
    """A tile of queries and keys, and what runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    described: bool = False  # keys come through tensor descriptors, where their strides permit


@functools.lru_cache(maxsize=8)
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA part; (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def padded(width: int) -> int:
    """Head size as tiles have it. Raises ValueError above 256."""
    if width > 256:
        raise ValueError(f"sparse attention: head size {width}, at most 256")
    return max(16, 1 << (width - 1).bit_length())


def constants(
    blocks: BlockMap, width: int, repeat: int, config: Config, dtype: torch.dtype, pooled: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "REPEAT": repeat,
        "QUERY_BLOCK": blocks.query_block,
        "KEY_BLOCK": blocks.key_block,
        "HEAD_DIM": width,
        "BLOCK_D": padded(width),
        "BLOCK_M": min(config.block_m, blocks.query_block),
        "BLOCK_N": config.block_n,
        "POOLED": pooled,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # ignored by narrow types
    }


def pooled_arguments(
    q: Tensor, k: Tensor, pooled: Pooled | None, blocks: BlockMap
) -> tuple[Any, ...]:
    """Pooled keys, values and biases, then their strides; stand-ins where there are none."""
    if pooled is None:
        return (k, k, q, *[0] * 10)
    b, h, nq, _ = blocks.keep.shape
    pk, pv = (last_stride_one(x.to(k.dtype)) for x in (pooled.k, pooled.v))
    bias = pooled.bias.float().expand(b, h, nq, pk.shape[2])
    return (pk, pv, bias, *pk.stride()[:3], *pv.stride()[:3], *bias.stride())


def last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """All but the last of each, which is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]
