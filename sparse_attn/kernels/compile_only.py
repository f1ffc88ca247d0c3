"""Compiles the Triton kernels for NVIDIA parts that are not there: registers, spills, memory.

    python -m sparse_attn.kernels.compile_only [--part 90] [--head 128] [--kernel forward]

Catches most of what breaks on a part without having one. ptxas and cuobjdump come with triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import triton_backward, triton_forward
from sparse_attn.kernels.launch import OPTIONS, Config

# compute capability -> bytes of shared memory that one program may have
PARTS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HEADS = (64, 96, 128)
MOST_SPILLED = 64  # bytes
STRIDES = re.compile(r"^(q|k|v|o|do|dk|dv|pk|pv|bias)_[bhsqp]$")


class Compiled(NamedTuple):
    """What one kernel needs on one part."""

    kernel: str
    part: int
    head: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes

    def problems(self) -> list[str]:
        found = []
        if self.spilled > MOST_SPILLED:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > PARTS[self.part] * 1024:
            found.append(f"wants {self.shared} bytes of shared memory")
        return found


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
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in meta:
            signature[name] = "constexpr"
            continue
        signature[name] = _type_of(name, element)
        if meta.get("DESCRIBED") and name in ("K", "V"):
            signature[name] = f"tensordesc<{element}[1, 1, {meta['BLOCK_N']}, {meta['BLOCK_D']}]>"
        if signature[name].startswith("*") or STRIDES.match(name):
            attributes[(i,)] = [["tt.divisibility", 16]]  # as the launcher finds them
    source = ASTSource(fn, signature, constexprs=meta, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options |= OPTIONS
    found = triton.compile(source, target=GPUTarget("cuda", part, 32), options=options)
    registers, spilled = _resources(found.asm["cubin"])
    return Compiled(kernel, part, head, registers, spilled, found.metadata.shared)


def _type_of(name: str, element: str) -> str:
    if name in ("Lse", "Bias", "Delta"):
        return "*fp32"
    if name in ("Index", "Count", "Order"):
        return "*i32"
    if name[0].isupper():
        return f"*{element}"
    return "fp32" if name == "scale" else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes that it keeps in memory for want of them."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        max(map(int, re.findall(rf"{what}:(\d+)", text)), default=0)
        for what in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=int, choices=list(PARTS))
    parser.add_argument("--head", type=int)
    parser.add_argument("--kernel", choices=("forward", "backward_q", "backward_kv"))
    args = parser.parse_args()
    print("kernel       part head registers spilled shared")
    for kernel in [args.kernel] if args.kernel else ["forward", "backward_q", "backward_kv"]:
        for part in [args.part] if args.part else PARTS:
            for head in [args.head] if args.head else HEADS:
                c = compiled(kernel, part, head)
                line = f"{c.kernel:12} sm{c.part:<3} {c.head:4} {c.registers:9} {c.spilled:7}"
                print(f"{line} {c.shared:6} {'; '.join(c.problems()) or 'ok'}", flush=True)


if __name__ == "__main__":
    main()
