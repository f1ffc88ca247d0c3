"""Times tiles of the GPU's integer product at public shapes, beside the product in other hands.

    python -m benchmarks.tune_quant [--few]

Prints microseconds (median, cache flushed between calls) and tera-operations a second; what is
fastest goes into ``quant.kernels.gpu.CONFIGS`` by hand. --few: only what is in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.errors import TritonError
from triton.testing import do_bench

from quant.kernels import gpu
from quant.kernels.gpu import Config

SHAPES = [
    (32760, 1536, 1536), (32760, 1536, 8960), (32760, 8960, 1536), (4608, 3072, 3072),
    (4608, 3072, 12288), (512, 1152, 4608),
]  # fmt: skip
CANDIDATES = [
    Config(128, 128, 128, 4, 3, True), Config(128, 128, 128, 8, 3, True),
    Config(128, 128, 128, 4, 4, True), Config(128, 256, 128, 8, 3, True),
    Config(128, 256, 128, 8, 4, True), Config(256, 128, 128, 8, 3, True),
    Config(256, 128, 128, 8, 4, True), Config(128, 256, 64, 8, 4, True),
    Config(128, 128, 128, 8, 3, True, 1), Config(128, 128, 128, 4, 3, True, 1),
    Config(128, 128, 128, 8, 4, True, 1), Config(128, 256, 128, 8, 3, True, 1),
    Config(256, 128, 128, 8, 3, True, 1), Config(128, 256, 64, 8, 4, True, 1),
    Config(128, 128, 64, 8, 4, True, 2), Config(128, 128, 128, 8, 3), Config(128, 256, 128, 8, 3),
    Config(64, 128, 128, 4, 4, True), Config(64, 64, 128, 4, 4), Config(64, 128, 128, 4, 4),
]  # fmt: skip


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Goes on after what a kernel or its compiler refuses, and says why."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TritonError) as error:
        print(f"  {what}: {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)


def shown(what: str, work: float, fn: Callable[[], object]) -> None:
    """Prints what a call takes; work: operations, or 0."""
    with explained(what):
        median: Any = do_bench(fn, warmup=5, rep=25, return_mode="median")
        print(f"  {1e3 * median:9.1f} us {work / median / 1e9:7.0f} TOPS  {what}", flush=True)


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this times tiles on a GPU, and there is none here")


def tuned(m: int, k: int, n: int, candidates: list[Config]) -> None:
    """One shape: other products, ours as the table has it, and the candidates' products alone."""
    work = 2.0 * m * k * n
    print(f"{m} x {k} x {n}, {torch.cuda.get_device_name()}", flush=True)
    with torch.device("cuda"):
        x, w = (torch.randn(size, dtype=torch.bfloat16) for size in ((m, k), (n, k)))
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        scales, bias = torch.rand(n) / 100, torch.randn(n, dtype=torch.bfloat16)
    codes, rows = gpu.quantised_rows(x)
    floats, float_scales = gpu.e4m3_weight(w)
    shown("bfloat16", work, lambda: torch.nn.functional.linear(x, w, bias))
    shown("torch._int_mm, int32 out", work, lambda: torch._int_mm(codes, weight.t()))
    shown("e4m3, quantising", work, lambda: gpu.linear_e4m3(x, floats, float_scales, bias))
    shown("s8, quantising", work, lambda: gpu.linear_token(x, weight, scales, bias))
    shown("quantising rows", 0.0, lambda: gpu.quantised_rows(x))
    for config in candidates:
        product = functools.partial(
            gpu.multiplied, codes, weight, rows, scales, bias, dtype=x.dtype, config=config
        )
        shown(str(tuple(config)), work, product)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", action="store_true")
    few = parser.parse_args().few
    require_gpu()
    torch.manual_seed(0)
    for shape in SHAPES:
        tuned(*shape, [] if few else CANDIDATES)


if __name__ == "__main__":
    main()
