"""Where attention to kept blocks is faster than dense attention: measured once, not on the way.

A decision that timed the user's machine while it runs would change with its load, and a video
could not be made again. So the break-even points below are constants, from
``benchmarks/bench_sparse.py``; whoever knows better sets ``guard=False``.
"""

from __future__ import annotations

# Seconds of sparse attention over seconds of dense: overhead + slope * density, from so many
# tokens on (fewer were not measured). CPU: of blocks of 256 queries, in `results/sparse.json`;
# `_SLOWER` of smaller ones is from trials.
CPU_OVERHEAD, CPU_SLOPE, CPU_TOKENS = 0.03, 1.2, 4096
_SLOWER = {256: 1.0, 128: 1.2, 64: 1.6, 32: 2.2, 16: 3.5}
# GPU: an estimate from compiled kernels (no GPU was at hand), on the careful side.
GPU_OVERHEAD, GPU_SLOPE, GPU_TOKENS = 0.1, 1.6, 8192


def expected_ratio(device: str, blocks: tuple[int, int], density: float) -> float:
    """Time of sparse over time of dense attention, for long sequences."""
    if device == "cpu":
        slower = _SLOWER.get(min(256, blocks[0]), 1.0)
        return CPU_OVERHEAD + CPU_SLOPE * slower * density
    return GPU_OVERHEAD + GPU_SLOPE * density


def worth_it(device: str, tokens: int, blocks: tuple[int, int], density: float) -> bool:
    """Whether a sequence is long enough, and what is kept little enough, to gain."""
    least = CPU_TOKENS if device == "cpu" else GPU_TOKENS
    return tokens >= least and expected_ratio(device, blocks, density) < 1
