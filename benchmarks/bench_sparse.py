"""Attention to kept blocks against dense attention and FlexAttention, selection included.

    python -m benchmarks.bench_sparse [--rounds 5] [--device cuda] [--only attention|model]
                                      [--shape TOKENSxHEAD]

`attention`: random q, k, v; every round runs dense attention, this project's default policy
(scores, selection, kernel), its kernel alone, compiled FlexAttention over the same blocks, and one
large product of matrices: what FlexAttention would gain by working at its rate.
`model`: a block of Wan 2.1 1.3B's shape with random weights, whole, without and with the method.
Speeds do not depend on what weights say; what is kept here says nothing about quality.
On a CPU seconds are the processor's, of one thread, so that a busy machine changes them little.
On a GPU every dense backend of torch that runs takes part, and xformers, SageAttention and
SpargeAttn where installed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accel.clock import clock_of
from accel.counting import synchronize
from accel.environment import environment, load_average
from accel.method import Method, attached
from accel.metrics.statistics import bootstrap
from benchmarks.results_file import DEVICES, read, require_machine, write
from sparse_attn.block_map import BlockMap, keep_share
from sparse_attn.estimators import block_scores, complement, subblock_mass
from sparse_attn.kernels import dispatch
from sparse_attn.subblock_lse import SubblockLSE

DENSITIES = {"cpu": (1.0, 0.5, 0.25, 0.1), "cuda": (1.0, 0.5, 0.2, 0.1)}
MODEL_DENSITIES = {"cpu": (0.25, 0.1), "cuda": (0.2, 0.1)}
# (tokens, head size, heads): as many heads as a core computes in seconds, as models have
SHAPES = {
    "cpu": ((4096, 64, 3), (4096, 128, 3), (16384, 64, 1), (16384, 128, 1)),
    "cuda": (
        (8192, 64, 24), (8192, 128, 12), (32760, 64, 24), (32760, 128, 12),
        (75600, 64, 20), (75600, 128, 10),
    ),
}  # fmt: skip
BLOCKS = {"cpu": (256, 64), "cuda": (128, 64)}
TYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# latent frames, height, width; one block. 8,190 tokens on a CPU, 480p of 81 frames on a GPU.
LATENTS = {"cpu": (21, 30, 52), "cuda": (21, 60, 104)}
WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
TEXT_TOKENS, TEXT_WIDTH = 512, 4096
LAYERS = {"cpu": 1, "cuda": 30}
SPARGE = "sparge top-k 0.25"
SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product gives the machine's rate


def dense_backends(device: str) -> dict[str, SDPBackend]:
    """Every dense kernel of torch that is asked for by name; on a CPU there is one."""
    if device == "cpu":
        return {"sdpa": SDPBackend.FLASH_ATTENTION}
    return {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }


def dense(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return attend


def others() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Kernels of other packages, where installed; q, k, v (b, h, s, d). Not all are dense."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if find_spec("xformers"):
        from xformers.ops import memory_efficient_attention as xformers_attention  # pyright: ignore

        def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return xformers_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        found["xformers"] = xformers
    if find_spec("sageattention"):
        from sageattention import sageattn  # pyright: ignore

        found["sage"] = lambda q, k, v: sageattn(q, k, v, tensor_layout="HND")
    if find_spec("spas_sage_attn"):
        from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as sparge  # pyright: ignore

        found[SPARGE] = lambda q, k, v: sparge(q, k, v, topk=0.25)
    return found


def flex() -> Callable[[Tensor, Tensor, Tensor, BlockMap], Tensor]:
    """FlexAttention, compiled, over the blocks of a map."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> Tensor:
        # all blocks are full, so no function of positions has to be asked
        size = (blocks.query_block, blocks.key_block)
        none = torch.zeros_like(blocks.counts)
        lists = blocks.lists()
        mask = BlockMask.from_kv_blocks(
            none, torch.zeros_like(lists), blocks.counts, lists, BLOCK_SIZE=size,
            seq_lengths=(blocks.queries, blocks.keys), compute_q_blocks=False,  # for gradients
        )  # fmt: skip
        return compiled(q, k, v, block_mask=mask)  # pyright: ignore[reportReturnType]

    return attend


def fastvideo() -> Callable[[Tensor, Tensor, Tensor, BlockMap], Tensor] | None:
    """FastVideo's block-sparse kernel (for Hopper: ThunderKittens), of blocks of 64 x 64."""
    if not find_spec("fastvideo_kernel"):
        return None
    from fastvideo_kernel import block_sparse_attn_from_indices  # pyright: ignore

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> Tensor:
        sizes = torch.full((blocks.keep.shape[-1],), 64, dtype=torch.int32, device=q.device)
        lists, counts = blocks.lists(), blocks.counts
        return block_sparse_attn_from_indices(q, k, v, lists, counts, sizes)[0]

    return attend


def timed_in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round, after one round that does not count.

    Of the processor on a CPU (one thread), else of the clock.
    """
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            synchronize()
            begin = now()
            run()
            synchronize()
            if round_:
                seconds[name].append(now() - begin)
    return seconds


def attention_rows(device: str, rounds: int, shape: str | None) -> list[dict[str, Any]]:
    rows = []
    for tokens, width, heads in SHAPES[device]:
        if shape not in (None, f"{tokens}x{width}"):
            continue
        torch.compiler.reset()
        over_blocks = flex()
        g = torch.Generator(device).manual_seed(0)
        size = (1, tokens, heads, width)  # as pipelines have them
        q, k, v = (
            torch.randn(size, generator=g, device=device, dtype=TYPES[device]).transpose(1, 2)
            for _ in "qkv"
        )
        # The flash kernel of torch's CPU and FlexAttention want one piece; it is made untimed.
        dense_runs = {n: _bound(dense(b), q, k, v) for n, b in dense_backends(device).items()}
        if device != "cpu":
            dense_runs |= {n: _bound(f, q, k, v) for n, f in others().items()}
            dense_runs = {n: f for n, f in dense_runs.items() if _runs(n, f)}
        for density in DENSITIES[device]:
            rows.append(_attention_row(q, k, v, density, dense_runs, over_blocks, rounds))
            print(_said(rows[-1]), flush=True)
    return rows


def _bound(fn: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


def _runs(name: str, fn: Callable[[], Any]) -> bool:
    try:
        fn()
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        print(f"{name} does not run here: {str(error).splitlines()[0]}")
        return False
    return True


def _attention_row(q, k, v, density, dense_runs, over_blocks, rounds) -> dict[str, Any]:
    device, tokens = q.device.type, q.shape[2]
    sizes = BLOCKS[device]

    def selected() -> BlockMap:
        keep = keep_share(subblock_mass(q, k, sizes), density, "layer")
        return BlockMap(keep, *sizes, tokens, tokens)

    blocks = selected()
    flex_blocks = blocks
    if device != "cpu":  # FlexAttention's tiles want its own size of block
        flex_keep = keep_share(subblock_mass(q, k, (128, 128)), density, "layer")
        flex_blocks = BlockMap(flex_keep, 128, 128, tokens, tokens)

    def pooled() -> Any:
        keep = keep_share(block_scores(q, k, v, sizes, True), density, "layer")
        found = BlockMap(keep, *sizes, tokens, tokens)
        return dispatch.attend(q, k, v, found, complement(k, v, keep, sizes[1]))

    runs = {
        **dense_runs,
        "ours": lambda: dispatch.attend(q, k, v, selected()),
        "ours, pooled": pooled,
        "kernel": lambda: dispatch.attend(q, k, v, blocks),
        "selection": selected,
        "flex": lambda: over_blocks(q, k, v, flex_blocks),
        "matmul": _matmul(q),
        **_fastvideo_runs(q, k, v, density),
    }
    seconds = timed_in_turn(runs, rounds)
    dense_names = [name for name in dense_runs if name != SPARGE]
    fastest = min(dense_names, key=lambda name: statistics.median(seconds[name]))
    executed = float(blocks.density().mean())
    products = 2 * q.shape[1] * tokens**2 * q.shape[-1] * executed  # of numbers, in two products
    least = [x * products / SQUARE[device] ** 3 for x in seconds["matmul"]]
    return {
        "tokens": tokens,
        "head_dim": q.shape[-1],
        "heads": q.shape[1],
        "blocks": list(sizes),
        "dtype": str(q.dtype).removeprefix("torch."),
        "density": density,
        "executed": round(executed, 6),  # a sum of floats may pass 1
        "fastest_dense": fastest,
        "seconds": {name: [round(x, 6) for x in times] for name, times in seconds.items()},
        "speedup": _ratio(seconds[fastest], seconds["ours"]),
        "speedup_pooled": _ratio(seconds[fastest], seconds["ours, pooled"]),
        "over_flex": _ratio(seconds["flex"], seconds["ours"]),
        "most_over_flex": _ratio(seconds["flex"], least),
        "selection_share": statistics.median(seconds["selection"])
        / statistics.median(seconds["ours"]),
    }


def _matmul(like: Tensor) -> Callable[[], Any]:
    """One large product: its rate is the most that an exact kernel of the same type can reach."""
    side = SQUARE[like.device.type]
    a, b = (torch.randn(side, side, device=like.device, dtype=like.dtype) for _ in "ab")
    return lambda: a @ b


def _fastvideo_runs(q: Tensor, k: Tensor, v: Tensor, density: float) -> dict[str, Callable]:
    """Its kernel alone, in the layout that it wants; its tokens are filled up to whole tiles."""
    if q.device.type == "cpu" or (attend := fastvideo()) is None:
        return {}
    q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % 64)).contiguous() for x in (q, k, v))
    keep = keep_share(subblock_mass(q, k, (64, 64)), density, "row")
    blocks = BlockMap(keep, 64, 64, q.shape[2], k.shape[2])
    run = _bound(attend, q, k, v, blocks)
    return {"fastvideo kernel": run} if _runs("fastvideo", run) else {}


def _ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    return bootstrap([a / b for a, b in zip(slow, fast, strict=True)], np.median).as_json()


def _said(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens']} tokens, {row['heads']} x {row['head_dim']}, density {row['density']}: "
        f"{row['speedup']['estimate']:.2f}x {row['fastest_dense']}, with pooled "
        f"{row['speedup_pooled']['estimate']:.2f}x, {row['over_flex']['estimate']:.2f}x flex, "
        f"selection {100 * row['selection_share']:.1f} %"
    )


# -- a whole block ---------------------------------------------------------------------------


def wan_slice(device: str) -> Any:
    """A WanPipeline that holds nothing but a transformer of Wan 2.1 1.3B's shape, few layers."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**WAN_1_3B, num_layers=LAYERS[device])
    transformer = transformer.to(TYPES[device]).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(None, None, None, scheduler, transformer=transformer)


def model_rows(device: str, rounds: int) -> list[dict[str, Any]]:
    pipe = wan_slice(device)
    frames, height, width = LATENTS[device]
    g = torch.Generator(device).manual_seed(0)
    make = {"generator": g, "device": device, "dtype": TYPES[device]}
    latents = torch.randn(1, 16, frames, height, width, **make)
    text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, **make)
    timestep = torch.tensor([500.0], device=device)

    def run() -> None:
        clock = clock_of(pipe)
        if clock.run is None:
            pipe.scheduler.set_timesteps(2)
            clock.begin(pipe.scheduler)
        with clock.at(1, branch="cond", sigma=0.5), torch.no_grad():
            pipe.transformer(latents, timestep, text)

    rows = []
    for density in MODEL_DENSITIES[device]:
        method = SubblockLSE((0.0, 0.0), BLOCKS[device], guard=False, density=density)
        report: dict[str, Any] = {}

        def under(chosen: Method, found: dict[str, Any]) -> None:
            with attached(chosen, pipe) as live:
                run()
                live.clock.end()
                found |= live.report()["runs"][0]

        sides = {"dense": SubblockLSE(density=1.0), "sparse": method}
        seconds = timed_in_turn({n: _bound(under, m, report) for n, m in sides.items()}, rounds)
        rows.append({
            "tokens": math.prod((frames, height // 2, width // 2)),
            "layers": LAYERS[device],
            "blocks": list(BLOCKS[device]),
            "density": density,
            "executed": report["detail"]["density"],
            "fallbacks": report["fallbacks"],
            "seconds": [[round(x, 6) for x in seconds[name]] for name in sides],
            "speedup": _ratio(seconds["dense"], seconds["sparse"]),
        })  # fmt: skip
        print(f"block, density {density}: {rows[-1]['speedup']['estimate']:.2f}x", flush=True)
    return rows


def renewed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of before, but for those measured again; by shape and density."""

    def key(row: dict[str, Any]) -> tuple[int, int, float]:
        return row["tokens"], row["head_dim"], -row["density"]

    rows = {key(row): row for row in (*old, *new)}
    return [rows[k] for k in sorted(rows)]


def kept_figures(device: str, here: dict[str, Any]) -> dict[str, Any]:
    """What is in the file. Raises ``ValueError`` where it was measured on another machine."""
    old = read("sparse", device) or {}
    if old:
        require_machine(old["environment"], here)
    return old


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--shape", help="one of the shapes, TOKENSxHEAD; others stay as they were")
    parser.add_argument("--only", choices=("attention", "model"))
    parser.add_argument("--dry", action="store_true", help="one round, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = load_average()
    rounds = 1 if args.dry else args.rounds
    part = bool(args.shape or args.only)
    if part and not args.dry:
        kept_figures(args.device, environment(args.device))
    attention, model = [], []

    def save() -> None:
        """After each part, with what the file has by then: others may have been measured too."""
        if args.dry:
            return
        here = environment(args.device, load_before=before)
        old = kept_figures(args.device, here) if part else {}
        content = {
            "environment": here,
            "protocol": None,
            "rounds": rounds,
            "attention": renewed(old.get("attention", []), attention),
            "model": model or old.get("model", []),
        }
        write("sparse", args.device, content)

    with torch.no_grad():
        if args.only != "model":
            attention = attention_rows(args.device, rounds, args.shape)
            save()
        if args.only != "attention":
            model = model_rows(args.device, rounds)
            save()


if __name__ == "__main__":
    main()
