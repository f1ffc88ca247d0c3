"""Where attention to kept blocks is faster than dense attention: measured once, not on the way.

A decision that timed the machine while it runs would change with its load, and a video could not be
made again. On a CPU the break-even points are constants, from ``benchmarks/bench_sparse.py``. GPUs
differ too much for that: there dense attention and this project's are timed on random data when a
part first meets a size (to a power of two), and what was found is kept in a file, so that the
decision is made once a machine. Deleting the file measures again; whoever knows better sets
``guard=False``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.counting import synchronize
from accel.files import write_atomically
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.estimators import subblock_mass
from sparse_attn.kernels import dispatch

LEAST_TOKENS = 4096  # fewer were not measured on a CPU; on GPUs they are launches, not work
# CPU: seconds of sparse attention over seconds of dense: overhead + slope * density. Of blocks of
# 256 queries, in `results/sparse.json`; `_SLOWER` of smaller ones is from trials.
CPU_OVERHEAD, CPU_SLOPE = 0.03, 1.2
_SLOWER = {256: 1.0, 128: 1.2, 64: 1.6, 32: 2.2, 16: 3.5}
MEASURED_AT = (0.1, 0.4)  # densities between which a GPU's line is drawn
MEASURED_HEADS, ROUNDS = 4, 5


class Line(NamedTuple):
    """Time of sparse over time of dense attention, by density."""

    overhead: float
    slope: float

    def at(self, density: float) -> float:
        return self.overhead + self.slope * density


class Size(NamedTuple):
    """An attention as its speed depends on it."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    width: int
    tokens: int
    blocks: tuple[int, int]  # of queries and keys

    def rounded(self) -> Size:
        """To a power of two of tokens, and few heads: what is measured stands for those near."""
        tokens = 1 << round(math.log2(self.tokens))
        return self._replace(tokens=tokens, heads=min(self.heads, MEASURED_HEADS))

    def key(self) -> str:
        """Of the file: the part, the versions that make its kernels, and the size."""
        part = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.tokens} tokens, {self.heads} x {self.width}, blocks {self.blocks}"
        return f"{part}, torch {torch.__version__}, {dtype}, {shape}"


def worth_it(size: Size, density: float) -> bool:
    """Whether a sequence is long enough, and what is kept little enough, to gain."""
    if size.tokens < LEAST_TOKENS:
        return False
    line = cpu_line(size.blocks) if size.device.type == "cpu" else measured_line(size.rounded())
    return line.at(density) < 1


def cpu_line(blocks: tuple[int, int]) -> Line:
    return Line(CPU_OVERHEAD, CPU_SLOPE * _SLOWER.get(min(256, blocks[0]), 1.0))


def speeds_file() -> Path:
    """Where a machine's lines are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "accel" / "sparse_speeds.json"


@functools.lru_cache(maxsize=64)
def measured_line(size: Size) -> Line:
    """Of the file, or measured now and written there; where that fails, for this process."""
    file = speeds_file()
    known = _read(file)
    if size.key() not in known:
        found = {size.key(): list(measure(size))}
        known = _read(file) | found  # others may have written meanwhile
        with contextlib.suppress(OSError):  # a home that cannot be written to
            write_atomically(file, json.dumps(known, indent=1).encode())
    return Line(*known[size.key()])


def _read(file: Path) -> dict[str, list[float]]:
    """What is a line in the file; what is not is as if it were not there."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or cut off
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: line for key, line in entries if _is_line(line)}


def _is_line(found: object) -> bool:
    return (
        isinstance(found, list)
        and len(found) == 2
        and all(isinstance(x, int | float) and math.isfinite(x) for x in found)
    )


@torch.no_grad()
def measure(size: Size) -> Line:
    """By medians of rounds in turn, selection included."""
    shape = (1, size.heads, size.tokens, size.width)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g).to(size.device, size.dtype) for _ in "qkv")

    def sparse(density: float) -> Callable[[], object]:
        def attend() -> object:
            keep = keep_share(subblock_mass(q, k, size.blocks), density, "layer")
            return dispatch.attend(q, k, v, BlockMap(keep, *size.blocks, size.tokens, size.tokens))

        return attend

    runs = [lambda: scaled_dot_product_attention(q, k, v), *map(sparse, MEASURED_AT)]
    dense, low, high = (statistics.median(times) for times in _in_turn(runs))
    slope = (high - low) / dense / (MEASURED_AT[1] - MEASURED_AT[0])
    return Line(round(low / dense - slope * MEASURED_AT[0], 4), round(slope, 4))


def _in_turn(runs: list[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each run in every round, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(ROUNDS + 1):
        for run, times in zip(runs, seconds, strict=True):
            synchronize()
            begin = time.perf_counter()
            run()
            synchronize()
            if round_:
                times.append(time.perf_counter() - begin)
    return seconds
