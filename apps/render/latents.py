"""What a pipeline hands to its autoencoder, kept on disk so that a decode can be tried again.

One safetensors file: the tensors, and a JSON header with everything else (scalars, the state of
random generators, and the story of the denoise: timings, report, notes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from accel.files import write_atomically


@dataclass(frozen=True)
class Latents:
    """The arguments of one `vae.decode` call, or finished frames where there was none to split.

    Attributes:
        mode: "decode" (call the autoencoder with `args`, `kwargs`) or "frames" (`args[0]` holds
            float frames in [0, 1], (samples, height, width, channels) or with frames second).
        story: plain JSON about the denoise that made them.
    """

    mode: Literal["decode", "frames"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    story: dict[str, Any] = field(default_factory=dict)

    def is_finite(self) -> bool:
        values = [*self.args, *self.kwargs.values()]
        tensors = [v for v in values if torch.is_tensor(v) and v.is_floating_point()]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


class CannotKeep(TypeError):
    """A decode argument that cannot be written to disk."""


def write(path: Path, latents: Latents) -> int:
    """Write to `path` atomically; return the bytes. CannotKeep names an unknown argument type."""
    tensors: dict[str, torch.Tensor] = {}
    header = {
        "mode": latents.mode,
        "args": [_pack(value, tensors) for value in latents.args],
        "kwargs": {key: _pack(value, tensors) for key, value in latents.kwargs.items()},
        "story": latents.story,
    }
    data = save(tensors, {"accel": json.dumps(header, sort_keys=True)})
    write_atomically(path, data)
    return len(data)


def read(path: Path) -> Latents | None:
    """Read what `write` wrote; None when the file is missing or damaged."""
    try:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["accel"])
        tensors = load(raw)
        args = tuple(_unpack(value, tensors) for value in header["args"])
        kwargs = {key: _unpack(value, tensors) for key, value in header["kwargs"].items()}
        return Latents(header["mode"], args, kwargs, header["story"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if torch.is_tensor(value):
        return {"tensor": _keep(value, tensors), "device": str(value.device)}
    if isinstance(value, torch.Generator):
        return {"generator": _keep(value.get_state(), tensors), "device": str(value.device)}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CannotKeep(f"an argument of type {type(value).__name__}")


def _keep(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    key = f"t{len(tensors)}"
    tensors[key] = tensor.detach().cpu().contiguous().clone()
    return key


def _unpack(packed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in packed:
        return tensors[packed["tensor"]].to(_device(packed["device"]))
    if "generator" in packed:
        generator = torch.Generator(_device(packed["device"]))
        generator.set_state(tensors[packed["generator"]])
        return generator
    if "list" in packed:
        return [_unpack(item, tensors) for item in packed["list"]]
    return packed["value"]


def _device(name: str) -> str:
    return "cpu" if name.startswith("cuda") and not torch.cuda.is_available() else name
