"""Integer layers at public shapes against the model's own and torchao's, in turn.

    python -m benchmarks.bench_quant_kernels [--rounds 5] [--no-compile]
    python -m benchmarks.bench_quant_kernels --device cuda [--only layers|flux|wan] [--search]

Layers, then a whole DiT-XL/2-shaped transformer (random weights, guidance, 256 pixels). Every time
includes quantising the input. torchao: int8 dynamic, eager, and through torch.compile. On a GPU:
``quant_gpu``; what is not measured again stays in the file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from accel.measure import environment, load_average, paired_time
from benchmarks.results_file import DEVICES, read, require_machine, write
from quant._layers import quantisable
from quant._rounding import nearest, searched_scale, static_grid
from quant._stored import quantised, stored

LINEAR = {  # rows, in, out
    "DiT-XL/2 256: feed-forward in": (512, 1152, 4608),
    "DiT-XL/2 256: attention": (512, 1152, 1152),
    "PixArt 512: feed-forward out": (2048, 4608, 1152),
    "Wan 1.3B, 1,560 tokens: attention": (1560, 1536, 1536),
    "Wan 1.3B, 1,560 tokens: feed-forward in": (1560, 1536, 8960),
}
CONV = {  # batch, in, out, side, kernel
    "SD 1.5: 3x3 at 64": (2, 320, 320, 64, 3),
    "SD 1.5: 3x3 at 16": (2, 1280, 1280, 16, 3),
    "SD 1.5: 1x1 at 32": (2, 640, 640, 32, 1),
}


def ours(own: nn.Module, x: Tensor, scheme: Any) -> nn.Module:
    """The layer in 8 bits, rounded to the nearest."""
    weight: Any = own.weight
    scale, how = searched_scale(weight.detach(), 8), {"bits": 8, "scheme": scheme}
    grid = static_grid(x.min()[None], x.max()[None]) if scheme == "static" else None
    codes = nearest(weight.detach(), scale, 8)
    return quantised(own, stored("layer", how, codes, scale, [grid]), "layer", how)


def torchao(module: nn.Module) -> nn.Module:
    """A copy, quantised by torchao (linear layers only)."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = nn.Sequential(copy.deepcopy(module))
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made


def compared(own: nn.Module, x: Tensor, compiled: bool, rounds: int) -> dict[str, Any]:
    """Speed-ups over the module itself."""
    schemes = ("static", "token") if isinstance(own, nn.Linear) else ("static",)
    others: dict[str, nn.Module] = {f"ours, {s}": ours(own, x, s) for s in schemes}
    if isinstance(own, nn.Linear):
        others["torchao, eager"] = torchao(own)
        if compiled:
            others["torchao, compiled"] = torch.compile(torchao(own))  # type: ignore[assignment]
    return timed(own, others, lambda module: module(x), rounds)


def timed(
    own: Any, others: dict[str, Any], call: Callable[[Any], Any], rounds: int
) -> dict[str, Any]:
    found = {}
    for name, other in others.items():
        with torch.no_grad():
            pair = paired_time(lambda: call(own), lambda o=other: call(o), rounds=rounds, warmup=2)
        found[name] = pair.speedup.as_json()
        print(name, found[name], flush=True)
    return found


def dit_xl(rounds: int) -> dict[str, Any]:
    """A whole denoiser: linear layers of the blocks in 8 bits, the rest as it was."""
    from benchmarks.bench_overhead import dit_xl as build

    model: Any = build("cpu").transformer
    rows = torch.randn(2, 4, 32, 32)
    call = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 1000])}
    quantised = copy.deepcopy(model)
    inside = [n for n, m in model.named_modules() if quantisable(m) and ".norm1." not in n]
    for name in inside:
        if "transformer_blocks" in name:
            own = model.get_submodule(name)
            quantised.set_submodule(name, ours(own, rows, "token"))
    peer = copy.deepcopy(model)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(peer, Int8DynamicActivationInt8WeightConfig())
    models = {"ours, token": quantised, "torchao, eager": peer}
    return timed(model, models, lambda m: m(rows, **call), rounds)


def on_gpu(given: argparse.Namespace) -> None:
    """Each part, written as it comes; ``--only`` keeps what the file has of the others."""
    from benchmarks import quant_gpu

    load = load_average()
    if given.search:
        from torchao.quantization.utils import recommended_inductor_config_setter

        recommended_inductor_config_setter()
    here = environment("cuda", load)
    old = read("quant_kernels", "cuda") or {}
    if old and given.only:
        require_machine(old["environment"], here)
    parts = old.get("gpu", {}) if given.only else {}

    def save(name: str, found: quant_gpu.Found) -> None:
        parts[name] = {"search": given.search, **found.as_json()}
        block = environment("cuda", load)
        block["versions"] |= {p: version(p) for p in ("torchao", "triton")}
        write("quant_kernels", "cuda", {"environment": block, "gpu": parts})

    for name in [given.only] if given.only else ["layers", *quant_gpu.WHOLE]:
        torch.manual_seed(0)
        kept = functools.partial(save, name)
        if name == "layers":
            quant_gpu.layers(given.rounds, kept)
        else:
            quant_gpu.whole(name, given.rounds, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--only", choices=("layers", "flux", "wan"), help="of a GPU's parts")
    parser.add_argument("--search", action="store_true", help="compile as torchao recommends")
    given = parser.parse_args()
    if given.device == "cuda":
        on_gpu(given)
        return
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load, rows = load_average(), {}
    for name, (m, k, n) in LINEAR.items():
        print(name, flush=True)
        compiled = not given.no_compile
        rows[name] = compared(nn.Linear(k, n), torch.randn(m, k), compiled, given.rounds)
    for name, (b, c, o, side, kernel) in CONV.items():
        print(name, flush=True)
        own = nn.Conv2d(c, o, kernel, padding=kernel // 2)
        rows[name] = compared(own, torch.randn(b, c, side, side), False, given.rounds)
    print("whole", flush=True)
    whole = dit_xl(given.rounds)
    block = environment("cpu", load)
    block["versions"]["torchao"] = version("torchao")
    write("quant_kernels", "cpu", {"environment": block, "layers": rows, "dit_xl_256": whole})


if __name__ == "__main__":
    main()
