"""Times tiles of the sparse kernel and the parts of a selection on a GPU.

    python -m benchmarks.tune_sparse [--head 128] [--keys 64] [--density 0.2] [--few]

Every configuration is first held against float64 on a small problem: one that is wrong is not
timed. Then microseconds (median, cache flushed between calls) and tera-operations a second beside
torch's dense kernels, and what each part of choosing blocks takes. What is fastest goes into
``sparse_attn.kernels.triton_forward.CONFIGS`` by hand. --few: only what is in the table.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_sparse import dense, dense_backends
from benchmarks.tune_quant import explained, require_gpu, shown
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.estimators import block_scores, complement, subblock_mass
from sparse_attn.kernels import reference, triton_forward, triton_select
from sparse_attn.kernels.launch import Config, capability

TOKENS, HEADS = 32760, {64: 24, 128: 12}  # a video of 480p and 81 frames in Wan 2.1
QUERY_BLOCK, KEY_BLOCKS = 128, (64, 128)
MOST_ERROR = 1e-2  # relative (L2), of bfloat16


TILES = [  # queries, keys, warps, stages
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3),
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2), (128, 32, 4, 4),
]  # fmt: skip


def candidates(key_block: int) -> list[Config]:
    """Tiles with and without descriptors; these read tiles of one block."""
    plain = [Config(*tile) for tile in TILES]
    return plain + [c._replace(described=True) for c in plain if c.block_n <= key_block]


def problem(tokens: int, heads: int, width: int, key_block: int, density: float) -> Any:
    """q, k, v in bfloat16, strided as pipelines have them, and as many blocks for every row."""
    g = torch.Generator("cuda").manual_seed(0)
    size, made = (1, tokens, heads, width), {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(size, generator=g, **made).transpose(1, 2) for _ in "qkv")
    shape = (1, heads, -(-tokens // QUERY_BLOCK), -(-tokens // key_block))
    keep = keep_share(torch.rand(shape, generator=g, device="cuda"), density)
    return q, k, v, BlockMap(keep, QUERY_BLOCK, key_block, tokens, tokens)


def error(width: int, key_block: int, config: Config) -> float:
    """Of a ragged problem with means for what is dropped."""
    q, k, v, blocks = problem(1000, 2, width, key_block, 0.5)
    pooled = complement(k, v, blocks.keep, key_block)
    found = triton_forward.attend(q, k, v, blocks, pooled, config=config).out
    doubles = reference.Pooled(pooled.k.double(), pooled.v.double(), pooled.bias)
    right = reference.attend(q.double(), k.double(), v.double(), blocks, doubles).out
    return float((found.double() - right).norm() / right.norm())


def tuned(width: int, key_block: int, density: float, configs: list[Config]) -> None:
    q, k, v, blocks = problem(TOKENS, HEADS[width], width, key_block, density)
    work = 4 * TOKENS**2 * width * HEADS[width] * float(blocks.density().mean())
    for config in configs:
        what = f"blocks of {key_block} keys, {tuple(config)}"
        with explained(what):
            if not (off := error(width, key_block, config)) <= MOST_ERROR:  # or not a number
                print(f"  {what}: WRONG by {off:.3f}", flush=True)
                continue
            run = functools.partial(triton_forward.attend, q, k, v, blocks, config=config)
            shown(what, work, run)


def dense_kernels(width: int) -> None:
    q, k, v, _ = problem(TOKENS, HEADS[width], width, 64, 1.0)
    for name, backend in dense_backends("cuda").items():
        shown(name, 4 * TOKENS**2 * width * HEADS[width], lambda b=backend: dense(b)(q, k, v))


def selection(width: int, density: float) -> None:
    """Each part, then how lists are walked: ascending or not, longest row first or not."""
    sizes = (QUERY_BLOCK, 64)
    q, k, v, _ = problem(TOKENS, HEADS[width], width, sizes[1], density)
    mass = subblock_mass(q, k, sizes)
    keep = keep_share(mass, density, "layer")
    blocks, mixed = (kind(keep, *sizes, TOKENS, TOKENS) for kind in (BlockMap, Shuffled))
    parts: dict[str, Callable[[], Any]] = {
        "means of parts of queries": lambda: triton_select.block_means(q, sizes[0] // 4),
        "means of parts of keys": lambda: triton_select.block_means(k, sizes[1] // 4),
        "mass, with both": lambda: subblock_mass(q, k, sizes),
        "what means miss, times mass": lambda: block_scores(q, k, v, sizes, True),
        "means for the rest": lambda: complement(k, v, keep, sizes[1]),
        "the best of a row": lambda: keep_share(mass, density, "row"),
        "the best of a head": lambda: keep_share(mass, density, "head"),
        "the best of a layer": lambda: keep_share(mass, density, "layer"),
        "lists": lambda: triton_select.listed(keep),
        "longest first": lambda: blocks.counts.argsort(dim=-1, descending=True, stable=True),
        "kernel": lambda: triton_forward.attend(q, k, v, blocks),
        "kernel, lists in no order": lambda: triton_forward.attend(q, k, v, mixed),
    }
    for what, fn in parts.items():
        shown(what, 0, fn)


class Shuffled(BlockMap):
    """The same map with its lists in no order: what ascending ones are worth to the cache."""

    @functools.cached_property
    def _listed_on_gpu(self) -> tuple[Tensor, Tensor]:
        lists, counts = triton_select.listed(self.keep)
        at = torch.arange(lists.shape[-1], device=lists.device)
        drawn = torch.rand(lists.shape, device=lists.device)
        # the last one stays: kernels cut what a ragged block lacks off the end of a list
        order = torch.where(at < counts[..., None] - 1, drawn, at + 1.0).argsort(-1)
        return lists.gather(-1, order).contiguous(), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head", type=int, choices=list(HEADS), help="default: each")
    parser.add_argument("--keys", type=int, choices=KEY_BLOCKS, help="of a block; default: each")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--few", action="store_true", help="only what is in the table")
    given = parser.parse_args()
    require_gpu()
    part = capability(torch.device("cuda"))
    for width in [given.head] if given.head else HEADS:
        size = f"{TOKENS} tokens, {HEADS[width]} x {width}"
        print(f"{torch.cuda.get_device_name()}, {size}, density {given.density:g}", flush=True)
        with torch.no_grad():
            dense_kernels(width)
            for key_block in [given.keys] if given.keys else KEY_BLOCKS:
                table = triton_forward.config_for(part, width, torch.bfloat16)
                configs = [table] if given.few else [table, *candidates(key_block)]
                tuned(width, key_block, given.density, configs)
            selection(width, given.density)


if __name__ == "__main__":
    main()
