"""torchao and optimum-quanto as methods, for the same paired measurements as ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from accel.clock import Run
from accel.denoiser import denoisers
from accel.method import Attached, Claim, Method

Scheme = Literal["int8 dynamic", "int8 weight-only"]


@dataclass(frozen=True)
class _Peer(Method):
    """A quantised copy in place of the denoiser."""

    SLOTS = ("weights",)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return frozenset({("weights", frozenset(d.slot for d in denoisers(pipe)))})

    def new_live(self, pipe: Any) -> Attached:
        return _LivePeer(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        for denoiser in denoisers(pipe):
            quantised = copy.deepcopy(denoiser.module)
            self.convert(quantised)
            live.patch.swap(pipe, denoiser.slot, quantised.eval())

    def convert(self, module: nn.Module) -> None:
        """Quantise a module in place."""
        raise NotImplementedError


@dataclass(frozen=True)
class TorchAO(_Peer):
    """torchao ``quantize_``: linear layers only, dynamic activations or none."""

    PAPER = "torchao"

    scheme: Scheme = "int8 dynamic"

    def convert(self, module: nn.Module) -> None:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        dynamic = self.scheme == "int8 dynamic"
        quantize_(
            module, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
        )


@dataclass(frozen=True)
class Quanto(_Peer):
    """optimum-quanto: linear layers and convolutions, weights in 8 or 4 bits."""

    PAPER = "optimum-quanto"

    bits: Literal[4, 8] = 8

    def convert(self, module: nn.Module) -> None:
        from optimum.quanto import freeze, qint4, qint8, quantize

        quantize(module, weights=qint8 if self.bits == 8 else qint4)
        freeze(module)


class _LivePeer(Attached):
    def on_run_end(self, run: Run) -> None:
        self.count("changed", run.calls)
