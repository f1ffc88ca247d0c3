"""From a pipeline and some calls of it to an artifact for ``quant.tfmq.TFMQ``; resumable.

Runs the pipeline once with the recipe that it will be used with (quantisation and caching do not
add up), rounds the weights part by part, chooses activation schemes on inputs held out from the
ranges, and leaves a layer whole where the integer kernel is slower than the model's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from accel.artifact import Artifact, Fingerprint, inputs_digest
from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.method import Recipe, Trainer
from accel.settings import check_fields, settings_json
from quant._quantise import OneDenoiser, Parts, Say
from quant._recording import record

METHOD = "quant.tfmq:TFMQ"


@dataclass(frozen=True)
class TFMQCalibration(Trainer):
    """How to quantise.

    bits: of weights, 8 or 4. activations: "auto" chooses for each layer, on held-out inputs, among
    one static scale, static scales for ``groups`` of timesteps and dynamic rows; or one of these
    for all; "whole" leaves activations as they are. rounding: "nearest", "gptq" or "adaround".
    temporal: what depends on the timestep, not the sample, is left whole for ``TemporalCache``
    where its table is smaller than its weights in these bits, and rounded on its own elsewhere
    ("cache"); always rounded on its own ("tiar"); or like all else ("plain"). steps: of AdaRound,
    for each part. only_faster: leave layers whole that the integer kernel makes slower here.
    """

    bits: Literal[4, 8] = 8
    activations: Literal["auto", "static", "groups", "token", "whole"] = "auto"
    rounding: Literal["nearest", "gptq", "adaround"] = "gptq"
    temporal: Literal["cache", "tiar", "plain"] = "cache"
    groups: int = 5
    steps: int = 300
    calls: int = 8
    only_faster: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("groups", "steps", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"TFMQCalibration.{name} = {getattr(self, name)}: at least 1")

    def fit(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        out: str,
        student_recipe: Recipe | None = None,
        say: Say = print,
    ) -> Artifact:
        """Calibrate on ``inputs``; parts that are done lie in ``out`` and are not done again.

        Raises:
            ValueError: no inputs, a model with adapters (fuse them first, or load them after), or
                a folder of another calibration.
        """
        if not inputs:
            raise ValueError("TFMQCalibration.fit: no inputs")
        recipe = student_recipe or Recipe(())
        folder = Parts(Path(out), self, inputs)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        errors: dict[str, float] = {}
        began = time.monotonic()
        for denoiser in denoisers(pipe):
            _refuse_adapters(denoiser.module)
            seen = record(pipe, denoiser, inputs, recipe, calls=self.calls)
            say(f"{denoiser.slot}: {len(seen.layers)} layers seen at {len(seen.times)} timesteps")
            one = OneDenoiser(self, denoiser, seen, folder, say)
            one.quantise(tensors, layers)
            errors[denoiser.slot] = one.temporal_error()
        seconds = time.monotonic() - began
        say(f"{len(layers)} layers in {seconds:.0f} s")
        return Artifact(
            method=METHOD,
            fingerprint=Fingerprint.of(denoisers(pipe)[0].module),
            tensors=tensors,
            grid=sampling_grid(pipe.scheduler)[1],
            inputs_sha256=inputs_digest(inputs),
            settings={
                "layers": layers,
                "calibration": settings_json(self),
                "temporal_error": errors,
                "seconds": round(seconds, 2),
            },
        )


def _refuse_adapters(module: nn.Module) -> None:
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise ValueError(
            "the model has adapters: fuse them (fuse_lora) and calibrate, or calibrate without "
            "them and load them after, to run beside the quantised layers"
        )
