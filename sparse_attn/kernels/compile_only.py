"""Compiles the Triton kernels for NVIDIA parts that are not there; see ``accel.compile_only``.

python -m sparse_attn.kernels.compile_only [--part 90] [--head 128] [--kernel forward]
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch

from accel.compile_only import PARTS, Compiled, compile_for
from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import triton_backward, triton_forward, triton_select
from sparse_attn.kernels.launch import OPTIONS, Config, padded

HEADS = (64, 96, 128)
STRIDES = re.compile(r"^(q|k|v|o|do|dk|dv|pk|pv|bias|x)_[bhsqp]$")
ATTENTION, SELECTION = ("forward", "backward_q", "backward_kv"), ("means", "mass", "lists")


def compiled(
    kernel: str, part: int, head: int, pooled: bool = True, dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None, key_block: int = 64,
) -> Compiled:  # fmt: skip
    """Compile with the table's configuration, or another; blocks of 128 queries.

    pooled: with the loop over pooled keys (forward, backward_q), or for pooled keys (backward_kv).
    """
    module = triton_forward if kernel == "forward" else triton_backward
    fn = getattr(module, kernel)
    capability = divmod(part, 10)
    config = config or module.config_for(capability, head, dtype)
    keep = torch.ones(1, 1, 1, 128 // key_block, dtype=torch.bool)
    blocks = BlockMap(keep, 128, key_block, 128, 128)
    meta = module.constants(blocks, head, 1, config, dtype, pooled)
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return _compiled(fn, part, meta, config, element)


def selection(kernel: str, part: int, head: int) -> Compiled:
    """One of ``SELECTION``, for blocks of 64 tokens in four parts, of 1,024 blocks."""
    fn, d = getattr(triton_select, kernel), {"HEAD_DIM": head, "BLOCK_D": padded(head)}
    tile = {"QUERIES": triton_select.QUERIES, "KEYS": triton_select.KEYS}
    meta: dict[str, Any] = {
        "means": {"PART": 16, "PARTS": triton_select.ROWS // 16, "SQUARES": False, **d},
        "mass": {"REPEAT": 1, "PARTS": 4, "PART": 16, **d, **tile},
        "lists": {"BLOCK": 1024},
    }[kernel]
    config = Config(0, 0, 4, 2 if kernel == "mass" else 3)
    return _compiled(fn, part, meta, config, "bf16" if kernel == "means" else "fp32")


def _compiled(fn: Any, part: int, meta: dict[str, Any], config: Config, element: str) -> Compiled:
    types = {name: _type_of(name, element) for name in fn.arg_names if name not in meta}
    if meta.get("DESCRIBED"):
        tile = f"tensordesc<{element}[1, 1, {meta['BLOCK_N']}, {meta['BLOCK_D']}]>"
        types |= {"K": tile, "V": tile}
    whole = {name for name, kind in types.items() if kind[0] == "*" or STRIDES.match(name)}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    return compile_for(part, fn, types, meta, whole, options)


def _type_of(name: str, element: str) -> str:
    if name in ("Lse", "Bias", "Delta", "Mean", "Mass"):
        return "*fp32"
    if name in ("Index", "Count", "Order", "List"):
        return "*i32"
    if name == "Keep":
        return "*i1"
    if name[0].isupper():
        return f"*{element}"
    return "fp32" if name == "scale" else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=int, choices=list(PARTS))
    parser.add_argument("--head", type=int)
    parser.add_argument("--kernel", choices=(*ATTENTION, *SELECTION))
    args = parser.parse_args()
    print("kernel       part head registers spilled shared")
    for kernel in [args.kernel] if args.kernel else [*ATTENTION, *SELECTION]:
        for part in [args.part] if args.part else PARTS:
            for head in [args.head] if args.head else HEADS:
                c = (compiled if kernel in ATTENTION else selection)(kernel, part, head)
                line = f"{c.kernel:12} sm{c.part:<3} {head:4} {c.registers:9} {c.spilled:7}"
                print(f"{line} {c.shared:6} {'; '.join(c.problems()) or 'ok'}", flush=True)


if __name__ == "__main__":
    main()
