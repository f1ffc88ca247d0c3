"""From a pipeline and some calls of it to an artifact for ``quant.tfmq.TFMQ``; resumable.

Runs the pipeline once with the recipe that it will be used with (quantisation and caching do not
add up), rounds the weights part by part, chooses activation schemes on held-out inputs, and, if
asked, leaves a layer whole where the integer kernel is slower than the model's own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from accel.artifact import Artifact, fingerprints, inputs_digest
from accel.denoiser import denoisers
from accel.method import Recipe, Trainer
from accel.settings import Settings, check_fields, settings_json
from quant._parts import Parts, conditions, of_weights
from quant._quantise import WHOLE, OneDenoiser, Say, check_host
from quant._recording import record
from quant._stored import METHOD


@dataclass(frozen=True)
class TFMQCalibration(Trainer):
    """How to quantise.

    bits: of weights, 8 or 4. plan: of each layer's instead, 8, 4 or 16 (left as it is), by path
    from the slot on; what it does not name stays whole (``quant.mixed_precision`` makes one).
    activations: "auto" chooses for each layer, on held-out inputs, among one static scale, static
    scales for ``groups`` of timesteps and dynamic rows; or one of these for all; "whole" leaves
    activations as they are. rounding: "nearest", "gptq" or "adaround".
    temporal: what depends on the timestep, not the sample, is left whole for ``TemporalCache``
    where its table is smaller than its weights in these bits, and rounded on its own elsewhere
    ("cache"); always rounded on its own ("tiar"); or like all else ("plain"). skips: in UNets,
    layers that are fed with hidden states and skip as they are stay "whole", as in the official
    code, or get grids for each ("split", as in the paper) or for both ("joint"); a plan's are split
    unless they are to be joint. steps: of AdaRound, for each part. calls: of the denoiser, kept
    from each run. only_faster: leave layers whole that the integer kernel makes slower here. seed:
    of the noise.
    """

    bits: Literal[4, 8] = 8
    activations: Literal["auto", "static", "groups", "token", "whole"] = "auto"
    rounding: Literal["nearest", "gptq", "adaround"] = "gptq"
    temporal: Literal["cache", "tiar", "plain"] = "cache"
    groups: int = 5
    steps: int = 300
    calls: int = 8
    only_faster: bool = False
    skips: Literal["whole", "split", "joint"] = "whole"
    plan: Settings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("groups", "steps", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"TFMQCalibration.{name} = {getattr(self, name)}: at least 1")
        for path, bits in (self.plan or {}).items():
            if type(bits) is not int or bits not in (4, 8, WHOLE):
                raise ValueError(f"TFMQCalibration.plan: {path} in {bits} bits; 4, 8 or {WHOLE}")

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
            ValueError: no inputs, weights that are not those that run (``check_host``), a folder of
                another calibration, a plan of another model, or nothing to quantise.
        """
        if not inputs:
            raise ValueError("TFMQCalibration.fit: no inputs")
        recipe = student_recipe or Recipe(())
        check_host(pipe, recipe)
        slots = {d.slot for d in denoisers(pipe)}
        stray = sorted(p for p in self.plan or () if p.partition(".")[0] not in slots)
        if stray:
            raise ValueError(f"the plan has {stray[0]}; this pipeline has {sorted(slots)}")
        work = of_weights(settings_json(self)) | conditions(pipe, inputs, recipe)
        folder = Parts(Path(out), work)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        errors: dict[str, float] = {}
        guided: set[bool | None] = set()
        grid: tuple[float, ...] = ()
        began, before = time.monotonic(), 0.0
        for denoiser in denoisers(pipe):
            seen = record(pipe, denoiser, inputs, recipe, calls=self.calls, seed=self.seed)
            if not seen.calls:
                say(f"{denoiser.slot}: never called, and left as it is")
                continue
            say(f"{denoiser.slot}: {len(seen.layers)} layers seen at {len(seen.times)} timesteps")
            guided |= seen.guided
            grid = seen.grid
            one = OneDenoiser(self, denoiser, seen, folder, say)
            one.quantise(tensors, layers)
            errors[denoiser.slot] = one.temporal_error()
            before += one.seconds_before
        if not layers:
            why = "the plan leaves all as they are"
            if self.only_faster:
                why = "integers make none faster here; for its size, ask for every layer"
            raise ValueError(f"no layer is left to quantise: {why}")
        seconds = time.monotonic() - began + before
        say(f"{len(layers)} layers in {seconds:.0f} s")
        return Artifact(
            method=METHOD,
            **fingerprints(pipe),
            tensors=tensors,
            grid=grid,
            guidance=guided.pop() if len(guided) == 1 else None,
            inputs_sha256=inputs_digest(inputs),
            settings={
                "layers": layers,
                "calibration": settings_json(self),
                "temporal_error": errors,
                "seconds": round(seconds, 2),
            },
        )
