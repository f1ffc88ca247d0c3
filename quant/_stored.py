"""Layers as an artifact of ``quant.calibrate`` holds them."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.artifact import Artifact
from quant._layers import Bins, layer_for
from quant._rounding import floats_of


def bins_of(artifact: Artifact, slot: str) -> Bins:
    """Groups of timesteps as calibrated."""
    times = floats_of(artifact.tensors[f"{slot}:times"])
    return Bins(len(times)).fill(times, artifact.tensors[f"{slot}:groups"])


def quantised(own: nn.Module, artifact: Artifact, path: str, how: dict[str, Any]) -> Any:
    """The layer that an artifact has for a module of the model."""
    tensors = {n: artifact.tensors.get(f"{path}:{n}") for n in ("q", "wscale", "ascale", "azero")}
    groups = 1 if tensors["ascale"] is None else len(tensors["ascale"])
    layer: Any = layer_for(own, bits=how["bits"], scheme=how["scheme"], groups=groups)
    layer.qweight.copy_(tensors["q"])
    layer.wscale.copy_(tensors["wscale"])
    if tensors["ascale"] is not None:
        layer.ascale.copy_(tensors["ascale"])
        layer.azero.copy_(tensors["azero"])
    bias: Any = own.bias
    if bias is not None:
        layer.bias = bias.detach().clone()
    return layer.to(own.weight.device)  # type: ignore[union-attr, arg-type]
