"""Which kernel computes attention to kept blocks, by where the tensors are."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import cpu, cpu_backward
from sparse_attn.kernels.reference import Attention, Pooled

TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm's name, too


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
