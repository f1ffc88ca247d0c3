"""Layers as an artifact of ``quant.calibrate`` holds them: tensors by name, and how they are made.

``how`` of a layer: ``{"bits": 8 | 4, "scheme": "static" | "token" | "weight"}``, with ``"split":
channels`` where the input is a concatenation whose two pieces have their own grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.artifact import Artifact
from quant._layers import Bins, Layer, layer_for
from quant._rounding import bits_of, floats_of, pack4

Grids = tuple[Tensor, Tensor] | None  # scales float32 (groups) and zero points int32 (groups)


def bins_of(artifact: Artifact, slot: str) -> Bins:
    """Groups of timesteps as calibrated."""
    times = floats_of(artifact.tensors[f"{slot}:times"])
    return Bins(len(times)).fill(times, artifact.tensors[f"{slot}:groups"])


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
        part: Any = piece
        part.qweight.copy_(tensors[f"{name}:q"])
        part.wscale.copy_(tensors[f"{name}:wscale"])
        if f"{name}:ascale" in tensors:
            part.ascale.copy_(tensors[f"{name}:ascale"])
            part.azero.copy_(tensors[f"{name}:azero"])
        if part.bias is not None:
            part.bias = bias.detach().clone()
    weight: Any = own.weight
    return layer.to(weight.device)
