"""The part of ``bench_quant_kernels`` that runs on a GPU: layers, then whole transformers.

bfloat16, random weights, everything timed in turn with the model's own, quantising included. A
sample is several calls, so that launches follow one another as they do in a model. Peers: int8 and
float8 (by rows), both dynamic, of torchao. The compiler's settings are the default for all, or what
torchao recommends for all (``--search``, whose compiling takes minutes). Transformers are compiled
block by block.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from triton.errors import TritonError

from accel.measure import PairedTime, paired_time
from quant._layers import quantisable
from quant._rounding import largest_scale, nearest, static_grid
from quant._stored import quantised, stored
from quant.kernels import gpu

LAYERS = {  # rows, in, out
    "Wan 1.3B, 32,760 tokens: attention": (32760, 1536, 1536),
    "Wan 1.3B, 32,760 tokens: feed-forward in": (32760, 1536, 8960),
    "Wan 1.3B, 32,760 tokens: feed-forward out": (32760, 8960, 1536),
    "Flux, 4,608 tokens: attention": (4608, 3072, 3072),
    "Flux, 4,608 tokens: feed-forward in": (4608, 3072, 12288),
    "Flux, 4,608 tokens: feed-forward out": (4608, 12288, 3072),
    "Flux, 4,608 tokens: 3072 to 21504": (4608, 3072, 21504),
    "DiT-XL/2 256: feed-forward in": (512, 1152, 4608),
    "DiT-XL/2 512: feed-forward in": (2048, 1152, 4608),
}
DEVICE = "cuda"
COMPILED = ("Wan 1.3B, 32,760 tokens: feed-forward in", "Flux, 4,608 tokens: feed-forward in")
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, TritonError,
)  # fmt: skip
FLUX: dict[str, Any] = {"num_layers": 4, "num_single_layers": 8}  # of 19 and 38
WAN: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 8}  # of 30
WAN_LATENTS = (1, 16, 21, 60, 104)  # 81 frames of 832 x 480: 32,760 tokens


class RowsE4M3(nn.Module):
    """A linear layer with weights and rows in e4m3."""

    def __init__(self, own: nn.Linear) -> None:
        super().__init__()
        codes, scales = gpu.e4m3_weight(own.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = own.bias

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes
        scales: Any = self.scales
        out = gpu.linear_e4m3(x.reshape(-1, x.shape[-1]), codes, scales, self.bias)
        return out.view(*x.shape[:-1], codes.shape[0])


def ours(own: nn.Linear, scheme: Any) -> nn.Module:
    """The layer in 8 bits, rounded to the nearest; static: for inputs within 5."""
    weight = own.weight.detach().float()
    scale, how = largest_scale(weight, 8), {"bits": 8, "scheme": scheme}
    end = torch.full((1,), 5.0, device=weight.device)
    grid = static_grid(-end, end) if scheme == "static" else None
    codes = nearest(weight, scale, 8)
    layer = quantised(own, stored("layer", how, codes, scale, [grid]), "layer", how)
    layer.pieces()[0].pack()  # as compiled graphs want it
    return layer


def torchao_config(kind: str) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    if kind == "int8":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )


def _is_wanted(module: nn.Module, path: str) -> bool:
    """Linear layers of blocks, without those that make modulation of the timestep."""
    inside = "blocks." in path and "norm" not in path
    return type(module) is nn.Linear and quantisable(module) and inside


def in_place(model: nn.Module, kind: str) -> nn.Module:
    """Every wanted layer of a model in ``kind``."""
    name, _, how = kind.partition(", ")
    if name == "torchao":
        from torchao.quantization import quantize_

        quantize_(model, torchao_config(how), filter_fn=_is_wanted)
        return model
    wanted = [(path, m) for path, m in model.named_modules() if _is_wanted(m, path)]
    for path, own in wanted:
        made = RowsE4M3(own) if how == "e4m3 rows" else ours(own, how)  # type: ignore[arg-type]
        model.set_submodule(path, made)
    return model


KINDS = ("ours, token", "ours, static", "ours, e4m3 rows", "torchao, int8", "torchao, float8")


class Found:
    """Figures of one part, printed as they come. failed: by name, why."""

    def __init__(self) -> None:
        self.speedups: dict[str, dict[str, dict[str, float]]] = {}
        self.milliseconds: dict[str, dict[str, list[float]]] = {}  # the model's own, and this
        self.errors: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}

    def add(self, row: str, name: str, pair: PairedTime, calls: int, error: float) -> None:
        own, other = (1000 * statistics.median(s) / calls for s in (pair.seconds_a, pair.seconds_b))
        self.speedups.setdefault(row, {})[name] = speedup = pair.speedup.as_json()
        self.milliseconds.setdefault(row, {})[name] = [round(own, 4), round(other, 4)]
        self.errors.setdefault(row, {})[name] = float(f"{error:.3g}")
        said = f"{row}: {name}: {speedup['estimate']:.3f}x ({own:.3f} to {other:.3f} ms)"
        print(f"{said}, off by {error:.4f}", flush=True)

    def fail(self, row: str, name: str, error: BaseException) -> None:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.failed[f"{row}: {name}"] = told
        print(f"{row}: {name} failed: {told}", flush=True)

    def as_json(self) -> dict[str, Any]:
        return {
            "speedups": self.speedups,
            "milliseconds": self.milliseconds,
            "errors": self.errors,
            "failed": self.failed,
        }


def _off(made: Tensor, wanted: Tensor) -> float:
    """Relative error, of root mean squares."""
    apart = (made.float() - wanted.float()).pow(2).mean()
    return float((apart / wanted.float().pow(2).mean()).sqrt())


Save = Callable[[Found], None]


def layers(rounds: int, save: Save) -> None:
    """Each shape eager; those of ``COMPILED`` compiled as well. Saved after each shape."""
    found = Found()
    for row, (m, k, n) in LAYERS.items():
        with torch.device(DEVICE):
            own = nn.Linear(k, n).to(torch.bfloat16)
            x = torch.randn(m, k, dtype=torch.bfloat16)
        calls = max(2, min(20, int(1e13 / (2.0 * m * k * n))))
        _in_turn(found, row, own, KINDS, lambda module, x=x: module(x), rounds, calls)
        if row in COMPILED:
            kinds = [f"{kind}, compiled" for kind in KINDS if kind != "ours, static"]
            _in_turn(found, row, own, kinds, lambda module, x=x: module(x), rounds, calls)
        save(found)


def _in_turn(
    found: Found, row: str, own: nn.Linear, kinds: Any, call: Callable, rounds: int, calls: int
) -> None:
    """``kinds`` of one layer against itself."""
    with torch.no_grad():
        wanted = call(own)
        for name in kinds:
            try:
                inner = nn.ModuleDict({"blocks": nn.Sequential(copy.deepcopy(own))})
                quantised_in: Any = in_place(inner, name.removesuffix(", compiled"))
                made = quantised_in["blocks"]
                if name.endswith("compiled"):
                    made[0].compile(fullgraph=name.startswith("ours"))
                error = _off(call(made), wanted)

                def many(module: Any) -> None:
                    for _ in range(calls):
                        call(module)

                pair = paired_time(
                    lambda: many(own), lambda m=made: many(m), rounds=rounds, warmup=1
                )
                found.add(row, name, pair, calls, error)
            except FAILURES as error:
                found.fail(row, name, error)


# -- whole transformers ----------------------------------------------------------------------


def flux() -> tuple[nn.Module, Callable]:
    """A transformer of Flux's widths, fewer blocks; 1024 pixels: 4,096 tokens, 512 of text."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**FLUX, guidance_embeds=True)
    kept: dict[str, Any] = {"dtype": torch.bfloat16}
    side = torch.arange(64)
    places = torch.stack(torch.meshgrid(side[:1], side, side, indexing="ij"), -1)
    given = {
        "hidden_states": torch.randn(1, 4096, 64, **kept),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **kept),
        "pooled_projections": torch.randn(1, 768, **kept),
        "timestep": torch.full((1,), 0.5, **kept),
        "guidance": torch.full((1,), 3.5, **kept),
        "img_ids": places.reshape(-1, 3).to(torch.bfloat16),
        "txt_ids": torch.zeros(512, 3, **kept),
    }
    return model, lambda m: m(**given, return_dict=False)[0]


def wan() -> tuple[nn.Module, Callable]:
    """A transformer of Wan 2.1 1.3B's widths with fewer blocks, at 81 frames of 832 x 480."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**WAN)
    latents = torch.randn(WAN_LATENTS, dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, dtype=torch.bfloat16)
    timestep = torch.full((1,), 500)
    return model, lambda m: m(latents, timestep, text, return_dict=False)[0]


WHOLE = {
    "flux": (flux, f"Flux-shaped, {FLUX['num_layers']} + {FLUX['num_single_layers']} blocks"),
    "wan": (wan, f"Wan 1.3B-shaped, {WAN['num_layers']} blocks"),
}


def _to_bfloat16(model: nn.Module) -> None:
    """But for what diffusers loads in float32 whatever it is told."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, held in [*model.named_parameters(), *model.named_buffers()]:
        if held.is_floating_point() and not kept & set(path.split(".")):
            held.data = held.data.to(torch.bfloat16)


def whole(which: str, rounds: int, save: Save) -> None:
    """Compiled block by block, against the bfloat16 model compiled in the same way.

    Saved after each kind.
    """
    torch._dynamo.config.recompile_limit = 64  # one graph for each kind, of one code
    build, row = WHOLE[which]
    found = Found()
    with torch.no_grad():
        with torch.device(DEVICE):
            plain, call = build()
        _to_bfloat16(plain.eval())
        own: Any = copy.deepcopy(plain)
        wanted = call(own)
        own.compile_repeated_blocks(fullgraph=True)
        call(own)
        for name in ("ours, token", "torchao, int8", "ours, e4m3 rows", "torchao, float8"):
            try:
                made: Any = in_place(copy.deepcopy(plain), name)
                if name.startswith("ours"):
                    pair = paired_time(
                        lambda: call(plain), lambda m=made: call(m), rounds=rounds, warmup=1
                    )
                    found.add(row, f"{name}, eager", pair, 1, _off(call(made), wanted))
                made.compile_repeated_blocks(fullgraph=True)
                error = _off(call(made), wanted)
                pair = paired_time(
                    lambda: call(own), lambda m=made: call(m), rounds=rounds, warmup=1
                )
                found.add(row, f"{name}, compiled", pair, 1, error)
            except FAILURES as error:
                found.fail(row, name, error)
            save(found)
            made = None
            gc.collect()
            torch.cuda.empty_cache()
