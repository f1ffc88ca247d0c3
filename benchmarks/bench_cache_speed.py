"""How much of the work that a cache saves becomes time saved, at the shapes of public models.

    python -m benchmarks.bench_cache_speed [--device cuda] [--rounds 5] [--blocks 4] [--only DiT]
                                           [--compile DiT] [--fresh]

Random weights, so there is no quality here: DiT-XL/2 and Wan 2.1 1.3B, which are timed in turn with
and without a cache. On a CPU a few blocks, single precision and small samples; on a card bfloat16
at the sizes that the models are for, all of DiT-XL/2 (`SIZES`). On the small models of the zoo,
what is left of a block when its modules are reused (norms, embeddings, Python) is half of its time;
here it is what it is for users. "37.5 % of the modules" is what HarmoniCa's paper says of its
20-step router. Then every block is compiled for itself, without breaks, and schedules act inside
those graphs: they are timed in turn with the compiled blocks alone. Rows are written as they are
measured, and a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from accel import compat
from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.measure import counted_flops, environment, load_average, paired_time
from accel.method import Method, NoEffectWarning, attached
from accel.metrics.protocol import Protocol, require_same
from benchmarks.results_file import DEVICES, add_fresh, read, require_machine, write
from caches.evolution import EvolutionCache
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, TaylorSeer
from caches.router import RouterCache
from caches.schedule import COMPUTE, REUSE, Schedule, causal, module_columns, to_artifact
from caches.token_merge import VIDEO_CLASSES, TokenMerge

STEPS = 8
RESULT, COMPILED = "cache_speed", "compiled blocks"
IN_GRAPHS = (RouterCache, EvolutionCache, IntervalCache)
Draw = Callable[[], None]
Rows = dict[str, dict[str, Any]]
LEARNED_SHARE = 0.375  # reused, HarmoniCa, DiT-XL/2 256, 20 steps
RECOMPILE_LIMIT = 64  # patterns of letters times layouts of the input


@dataclass(frozen=True)
class Size:
    """What of a model is timed: its blocks, and one call's samples and text (tokens, width)."""

    blocks: int
    height: int
    width: int
    dtype: torch.dtype
    samples: int = 1
    frames: int = 1
    text: tuple[int, int] = (64, 64)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        frames = f" x {self.frames} frames" if self.frames > 1 else ""
        return f"{self.blocks} blocks, {kind}, {self.samples} x {self.width}x{self.height}{frames}"


DIT, WAN = "DiT-XL/2", "Wan 2.1 1.3B"
SIZES = {
    "cpu": {
        DIT: Size(4, 256, 256, torch.float32),
        WAN: Size(4, 192, 192, torch.float32, frames=9),
    },
    "cuda": {  # 28 of 28 blocks, 8,192 tokens; 8 of 30 blocks, 14,040 tokens
        DIT: Size(28, 512, 512, torch.bfloat16, samples=8),
        WAN: Size(8, 480, 832, torch.bfloat16, frames=33, text=(512, 4096)),
    },
}


def dit_xl(size: Size, device: str) -> tuple[Any, dict[str, Any]]:
    """DiT-XL/2: 1152 wide, 256 tokens at 256 pixels, no guidance."""
    with torch.device(device):
        transformer = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=4,
            num_layers=size.blocks, sample_size=size.width // 8, patch_size=2,
            num_embeds_ada_norm=1000,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler()).to(size.dtype)
    return pipe, {"class_labels": [1] * size.samples, "guidance_scale": 1.0, "output_type": "np"}


def wan_1b(size: Size, device: str) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 1.3B: 1536 wide, 12 heads, two branches; its autoencoder does not run."""
    tokens, width = size.text
    with torch.device(device):
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, text_dim=width, ffn_dim=8960,
            num_layers=size.blocks, in_channels=16, out_channels=16,
        )  # fmt: skip
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        text = {
            k: torch.randn(size.samples, tokens, width, dtype=size.dtype)
            for k in ("prompt_embeds", "negative_prompt_embeds")
        }
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).to(size.dtype)  # fmt: skip
    shape = {"height": size.height, "width": size.width, "num_frames": size.frames}
    return pipe, {**text, **shape, "guidance_scale": 5.0, "output_type": "latent"}


MODELS = {DIT: dit_xl, WAN: wan_1b}


def caches(pipe: Any, folder: Path) -> Iterator[tuple[str, Method]]:
    """What is timed."""
    (denoiser,) = denoisers(pipe)
    columns = module_columns(denoiser)
    pipe.scheduler.set_timesteps(STEPS)
    grid = sampling_grid(pipe.scheduler)[1]
    full = Schedule(columns, (COMPUTE * len(columns),) * STEPS)

    def made(schedule: Schedule, method: str, name: str) -> Any:
        artifact = to_artifact(schedule, denoiser, method=method, grid=grid)
        return artifact.save(folder / f"{name}.safetensors")

    rng, rows = random.Random(0), [COMPUTE * len(columns)]
    for _ in range(STEPS - 1):
        reused = set(rng.sample(range(len(columns)), round(LEARNED_SHARE * len(columns))))
        rows.append("".join(REUSE if j in reused else COMPUTE for j in range(len(columns))))
    learned = causal(Schedule(columns, tuple(rows)))
    computed = EvolutionCache(made(full, EvolutionCache.name(), "full"))
    yield "every module computed through a schedule", computed
    yield "37.5 % of the modules reused", RouterCache(made(learned, RouterCache.name(), "learned"))
    yield "FORA: 2", IntervalCache(2, 1, 0, "modules", 0)
    yield "interval, blocks: 2", IntervalCache(2, 2, 0, "blocks", 1)
    yield "interval, output: 2", IntervalCache(2, 2, 0, "output", 1)
    yield "TaylorSeer, lite: 2", TaylorSeer(2, 2, modules="lite")
    yield "FirstBlockCache, always after one step", FirstBlockCache(1e9)
    if denoiser.cls in VIDEO_CLASSES:
        yield "token merge: all steps", TokenMerge(1.0)


class Timing:
    """Times rows of one model into `rows`, each once; `keep` is called after each."""

    def __init__(self, name: str, rows: Rows, rounds: int, keep: Callable[[], None]) -> None:
        self.name, self.rows, self.rounds, self.keep = name, rows, rounds, keep

    def measure(self, pipe: Any, call: dict[str, Any], compiled: bool) -> None:
        """Speed-up and work of every row, uncompiled and then in compiled blocks."""
        pipe.set_progress_bar_config(disable=True)

        def draw(method: Method | None = None, around: Any = nullcontext) -> None:
            with around(), attached(method or (), pipe):
                generator = torch.Generator("cpu").manual_seed(0)
                pipe(**call, num_inference_steps=STEPS, generator=generator)

        plain = counted_flops(draw)
        with tempfile.TemporaryDirectory() as folder:
            methods = dict(caches(pipe, Path(folder)))
            for label, method in methods.items():
                self._row(label, draw, partial(draw, method), plain)
            if compiled:
                compile_blocks(pipe)
                self._row(COMPILED, partial(draw, None, compat.uncompiled), draw, plain, plain)
                for label, method in methods.items():
                    if isinstance(method, IN_GRAPHS) and not outputs(method):
                        work = self.rows[label]["flops"][1]  # graphs hide theirs
                        self._row(f"{COMPILED}, {label}", draw, partial(draw, method), plain, work)

    def _row(self, label: str, before: Draw, after: Draw, plain: int, work: int = 0) -> None:
        if label in self.rows:
            return
        flops = [plain, work or counted_flops(after)]
        times = paired_time(before, after, rounds=self.rounds)
        self.rows[label] = {"speedup": times.speedup.as_json(), "flops": flops}
        print(self.name, label, self.rows[label], round(flops[0] / flops[1], 3), flush=True)
        self.keep()


def outputs(method: Method) -> bool:
    """Whether it keeps what the whole network returns, which no graph has to do with."""
    return isinstance(method, IntervalCache) and method.parts == "output"


def compile_blocks(pipe: Any, **settings: Any) -> None:
    """Each block of the denoiser a graph of its own, which those that are alike share."""
    (denoiser,) = denoisers(pipe)
    for block in denoiser.blocks:
        denoiser.module.get_submodule(block.path).compile(fullgraph=True, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, help="of each model, not as many as in SIZES")
    parser.add_argument("--only", default="", help="models whose name holds this")
    add_fresh(parser)
    parser.add_argument("--compile", default="DiT", help="models whose blocks are compiled, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    load = load_average()
    warnings.simplefilter("ignore", NoEffectWarning)  # of the schedule that computes everything
    sizes = SIZES[given.device]
    if given.blocks:
        sizes = {name: replace(size, blocks=given.blocks) for name, size in sizes.items()}
    protocol = protocol_of(sizes, given.rounds)
    names = [name for name in MODELS if given.only in name]
    found = {} if given.fresh and not given.only else measured(given.device, protocol)
    if given.fresh:
        found = {name: model for name, model in found.items() if name not in names}

    def keep() -> None:
        block = environment(given.device, load)
        own(found, block)
        content = {"environment": block, "protocol": protocol.as_json(), "models": found}
        write(RESULT, given.device, content)

    for name in names:
        head = {"blocks": sizes[name].blocks, "size": str(sizes[name]), "rows": {}}
        rows = found.setdefault(name, head)["rows"]
        pipe, call = MODELS[name](sizes[name], given.device)
        Timing(name, rows, given.rounds, keep).measure(pipe, call, given.compile in name)


def protocol_of(sizes: dict[str, Size], rounds: int) -> Protocol:
    """What is timed, all models together."""
    return Protocol(
        model="public shapes, random weights",
        inputs={name: str(size) for name, size in sizes.items()},
        samples=max(size.samples for size in sizes.values()),
        seeds=[0],
        steps=STEPS,
        more={"rounds": rounds},
    )


def measured(device: str, protocol: Protocol) -> dict[str, Any]:
    """Models that are in the file already. Raises ValueError: they compare with nothing now."""
    old = read(RESULT, device)
    if old is None:
        return {}
    require_same(Protocol.read(old["protocol"]), protocol)
    require_machine(old["environment"], environment(device))
    own(old["models"], old["environment"])
    return old["models"]


def own(models: dict[str, Any], environment: dict[str, Any]) -> None:
    """Give an environment to rows that have none: new ones, or those whose file's it was."""
    for model in models.values():
        for row in model["rows"].values():
            row.setdefault("environment", environment)


if __name__ == "__main__":
    main()
