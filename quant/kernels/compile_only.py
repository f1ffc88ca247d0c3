"""Compiles the GPU kernels for NVIDIA parts that are not there; see ``accel.compile_only``.

python -m quant.kernels.compile_only [--part 90]
"""

from __future__ import annotations

import argparse
from typing import Any

from accel.compile_only import PARTS, Compiled, compile_for
from quant.kernels import gpu

TYPES = {
    **dict.fromkeys(("A", "W", "Codes"), "i8"),
    **dict.fromkeys(("Zero", "Sums"), "i32"),
    **dict.fromkeys(("X", "Out", "Bias"), "bf16"),
}


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
    known, found, whole = TYPES | (types or {}), {}, set()
    for name in fn.arg_names:
        if name in blocks:
            kind, *block = blocks[name]
            found[name] = f"tensordesc<{kind}{block}>"
        elif name not in meta:
            found[name] = f"*{known.get(name, 'fp32')}" if name[0].isupper() else "i32"
            whole |= {name} - {"m"}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = fn is gpu.multiply
    return compile_for(part, fn, found, meta, whole, options)


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
