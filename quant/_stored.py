"""Layers as an artifact of ``quant.calibrate`` holds them: tensors by name, and how they are made.

``how`` of a layer: ``{"bits": 8 | 4, "scheme": "static" | "token" | "weight"}``, with ``"split":
channels`` where the input is a concatenation whose two pieces have their own grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from accel.artifact import Artifact
from accel.denoiser import denoisers
from quant._layers import Bins, Layer, Scheme, layer_for
from quant._rounding import bits_of, floats_of, pack4

METHOD = "quant.tfmq:TFMQ"
Grids = tuple[Tensor, Tensor] | None  # scales float32 (groups) and zero points int32 (groups)


def layers_of(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """How each quantised layer is made, by path from the slot on.

    Raises:
        ValueError: the artifact is for another method, or does not say.
    """
    artifact.check_method(METHOD)
    layers: Any = artifact.settings.get("layers")
    good = isinstance(layers, dict) and len(layers) > 0
    if not good or not all(_is_how(how) for how in layers.values()):
        raise ValueError("the artifact does not say how its layers are made; calibrate again")
    return layers


def _is_how(how: Any) -> bool:
    known = isinstance(how, dict) and how.keys() <= {"bits", "scheme", "split"}
    whole = known and type(how.get("split", 0)) is int
    return whole and how.get("bits") in (4, 8) and how.get("scheme") in get_args(Scheme)


def check_fits(artifact: Artifact, pipe: Any) -> None:
    """Raises ``ValueError`` saying why an artifact is not for this pipeline's denoisers."""
    parts = {d.slot: d.module for d in denoisers(pipe)}
    asked = {path.partition(".")[0] for path in layers_of(artifact)}
    if not asked <= parts.keys():
        raise ValueError(f"the artifact is for {sorted(asked)}, here are {list(parts)}")
    for slot in sorted(asked):
        if any(p.is_meta for p in parts[slot].parameters()):
            raise ValueError(f"the weights of {slot} are elsewhere: attach first, then offload")
    artifact.check_pipeline(pipe)
    there = {f"{slot}.{path}" for slot, m in parts.items() for path, _ in m.named_modules()}
    if not layers_of(artifact).keys() <= there:
        raise ValueError(f"the model has no {min(layers_of(artifact).keys() - there)}")


def bins_of(artifact: Artifact, slot: str) -> Bins:
    """Groups of timesteps as calibrated.

    Raises:
        ValueError: the artifact has none, or groups that its layers have no scales of.
    """
    times, groups = (artifact.tensors.get(f"{slot}:{name}") for name in ("times", "groups"))
    if times is None or groups is None or times.shape != groups.shape or not times.numel():
        raise ValueError(f"the artifact has no timesteps of {slot}; calibrate again")
    if (times.ndim, times.dtype, groups.dtype) != (1, torch.int32, torch.int64):
        raise ValueError(
            f"timesteps of {slot} in the artifact are of another form; calibrate again"
        )
    mine = (n for n in artifact.tensors if n.startswith(f"{slot}.") and n.endswith(":ascale"))
    scales = [n for n in (artifact.tensors[name].numel() for name in mine) if n > 1]
    if groups.min() < 0 or groups.max() >= min(scales, default=len(groups)):
        raise ValueError(f"groups of timesteps of {slot} have no scales; calibrate again")
    return Bins(len(times)).fill(floats_of(times), groups)


def refuse_adapters(pipe: Any) -> None:
    """Raises ``ValueError`` if a denoiser has adapters, fused or not: whose weights are meant?"""
    if any(hasattr(part, "base_layer") for d in denoisers(pipe) for part in d.module.modules()):
        raise ValueError(
            "the model has adapters: fuse them (fuse_lora, then unload_lora_weights) before, or "
            "load them after, to run beside the quantised layers"
        )


def names_of(path: str, how: Mapping[str, Any]) -> list[str]:
    """Of a layer's pieces, as ``SplitConv`` calls them too."""
    return [f"{path}.hidden", f"{path}.skip"] if how.get("split") else [path]


def stored(
    path: str, how: Mapping[str, Any], codes: Tensor, scale: Tensor, grids: list[Grids]
) -> dict[str, Tensor]:
    """What an artifact holds of one layer. scale: (o), or one for each value."""
    split, tensors = how.get("split", 0), {}
    cut = [split, codes.shape[1] - split] if split else [codes.shape[1]]
    by_piece = zip(names_of(path, how), codes.split(cut, 1), grids, strict=True)
    scales = [s.flatten(1)[:, 0] for s in scale.split(cut, 1)] if scale.ndim > 1 else [scale]
    for (name, part, grid), own in zip(by_piece, scales, strict=True):
        packed = part.to(torch.int8).contiguous()
        tensors[f"{name}:q"] = pack4(packed) if how["bits"] == 4 else packed
        tensors[f"{name}:wscale"] = bits_of(own)
        if grid is not None:
            tensors |= {f"{name}:ascale": bits_of(grid[0]), f"{name}:azero": grid[1]}
    return tensors


def quantised(
    own: nn.Module, tensors: Mapping[str, Tensor], path: str, how: Mapping[str, Any]
) -> Layer:
    """The layer that an artifact has for a module of the model."""
    names = names_of(path, how)
    groups = [len(tensors.get(f"{name}:ascale", "?")) for name in names]
    layer = layer_for(
        own,
        bits=how["bits"],
        scheme=how["scheme"],
        groups=groups if len(names) > 1 else groups[0],
        split=how.get("split", 0),
    )
    bias: Any = own.bias
    for name, piece in zip(names, layer.pieces(), strict=True):
        for buffer, held in piece.named_buffers():
            given = tensors.get(f"{name}:{'q' if buffer == 'qweight' else buffer}")
            if given is None or (given.shape, given.dtype) != (held.shape, held.dtype):
                raise ValueError(f"the artifact has no {buffer} of {path} for {own}")
            held.copy_(given)
        if piece.bias is not None:
            piece.bias.data = bias.detach().clone()
    weight: Any = own.weight
    return layer.to(weight.device)
