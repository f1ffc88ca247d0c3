"""Compiles Triton kernels for NVIDIA parts that are not there: registers, spills, memory.

Catches most of what breaks on a part without having one. ptxas and cuobjdump come with triton. What
a wing compiles, and with which settings, is in its own ``kernels/compile_only.py``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# compute capability -> KiB of shared memory that one program may have
PARTS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MOST_SPILLED = 64  # bytes


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


def compile_for(
    part: int, fn: Any, types: Mapping[str, str], meta: Mapping[str, Any], whole: Set[str],
    options: Mapping[str, Any],
) -> Compiled:  # fmt: skip
    """Compile a kernel. types: of its arguments by name but those in ``meta``, which are constants;
    whole: arguments that are multiples of 16, as the launcher finds them. options: of triton."""
    signature = {name: "constexpr" if name in meta else types[name] for name in fn.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name in whole
    }
    source = ASTSource(fn, signature, constexprs=meta, attrs=attributes)
    found: Any = triton.compile(source, target=GPUTarget("cuda", part, 32), options=dict(options))
    registers, spilled = _resources(found.asm["cubin"])
    shared, ptx = found.metadata.shared, found.asm["ptx"]
    return Compiled(fn.__name__, part, registers, spilled, shared, ptx)


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
