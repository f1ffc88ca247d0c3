"""Compiles the GPU kernels for NVIDIA parts that are not there: registers, spills, memory.

    python -m quant.kernels.compile_only [--part 90]

Catches most of what breaks on a part without having one. ptxas and cuobjdump come with triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant.kernels import gpu

# compute capability -> KiB of shared memory that one program may have
PARTS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MOST_SPILLED = 64  # bytes
TYPES = {
    **dict.fromkeys(("A", "W", "Codes"), "i8"),
    **dict.fromkeys(("Zero", "Sums"), "i32"),
    **dict.fromkeys(("X", "Out", "Bias"), "bf16"),
}


class Compiled(NamedTuple):
    """What one kernel needs on one part."""

    kernel: str
    part: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    ptx: str

    def problems(self) -> list[str]:
        found = []
        if self.spilled > MOST_SPILLED:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > PARTS[self.part] * 1024:
            found.append(f"wants {self.shared} bytes of shared memory")
        return found


def multiplied(part: int, config: gpu.Config, static: bool = True) -> Compiled:
    """The product with a bias, bfloat16 out, k a multiple of the tile."""
    meta = {
        "STATIC": static, "BIAS": True, "DESCRIPTORS": config.descriptors, "WHOLE_K": True,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP": gpu.GROUP, "PERSISTENT": config.programs > 0,
    }  # fmt: skip
    blocks: dict[str, tuple[str, int, int]] = {}
    if config.descriptors:
        m, n, k = config[:3]
        blocks = {"A": ("i8", m, k), "W": ("i8", n, k), "Out": ("bf16", m, n)}
    return _compiled(gpu.multiply, part, meta, blocks, config)


def quantised(part: int, k: int, static: bool, floats: bool = False) -> Compiled:
    """Rows of k values; floats: to e4m3."""
    block = 1 << (k - 1).bit_length()
    meta = {"STATIC": static, "FLOATS": floats, "LARGEST": 127.0, "BLOCK": block}
    config = gpu.Config(1, 1, 1, min(max(block // 512, 1), 16), 3)
    types = {"Codes": "fp8e4nv"} if floats else {}
    return _compiled(gpu.quantise_rows, part, meta, {}, config, types)


def _compiled(
    fn: Any, part: int, meta: dict[str, Any], blocks: dict[str, Any], config: gpu.Config,
    types: dict[str, str] | None = None,
) -> Compiled:  # fmt: skip
    known, signature, attributes = TYPES | (types or {}), {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in meta:
            signature[name] = "constexpr"
        elif name in blocks:
            kind, *block = blocks[name]
            signature[name] = f"tensordesc<{kind}{block}>"
        else:
            signature[name] = f"*{known.get(name, 'fp32')}" if name[0].isupper() else "i32"
            if name != "m":
                attributes[(i,)] = [["tt.divisibility", 16]]  # as the launcher finds them
    source = ASTSource(fn, signature, constexprs=meta, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = fn is gpu.multiply
    found: Any = triton.compile(source, target=GPUTarget("cuda", part, 32), options=options)
    registers, spilled = _resources(found.asm["cubin"])
    name = fn.__name__
    return Compiled(name, part, registers, spilled, found.metadata.shared, found.asm["ptx"])


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
    chosen = parser.parse_args().part
    print("kernel        part registers spilled shared")
    for part in [chosen] if chosen else PARTS:
        key = gpu.SAME_AS.get((part // 10, part % 10), (part // 10, part % 10))
        for config in gpu.CONFIGS[key]:
            _show(multiplied(part, config), str(tuple(config)))
        _show(quantised(part, 1536, static=False), "k = 1,536")
        _show(quantised(part, 12288, static=True), "k = 12,288")


def _show(c: Compiled, what: str) -> None:
    line = f"{c.kernel:13} sm{c.part:<3} {c.registers:8} {c.spilled:7} {c.shared:6}"
    print(f"{line} {'; '.join(c.problems()) or 'ok'}  {what}", flush=True)


if __name__ == "__main__":
    main()
