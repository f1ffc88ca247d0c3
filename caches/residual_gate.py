"""Skip a transformer's blocks where its first block says that they would tell nothing new.

The first block always runs. What the other blocks add to its output is extrapolated from the
newest steps that computed them; so is the first block's own residual, and the gap between that
forecast and the truth is the gate's evidence. ParaAttention's first-block cache and its kin
(TeaCache, DBCache) take the change itself, against a threshold that nobody can choose, as the mean
over the batch. Here every sample and guidance branch decides for itself, rows that compute run
without those that do not, so a sample comes out the same whatever else is in its batch; and
`calibrate` finds the threshold for a wanted fidelity, in units of the finished sample's error: it
measures how far a unit of evidence at each step moves the result.
Memory: four activations a branch. Waits for the device once a call, to know which rows compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.artifact import Artifact, ArtifactRef, fingerprints
from accel.method import Attached, Claim, Method, attached
from caches._drawn import digest_of, drawn, fidelity
from caches._gating import WARMUP, LiveGate, gate_claims, halved

if TYPE_CHECKING:
    from torch import Tensor

PROBES = 10  # steps at which a calibration skips alone
TRIES = 7  # thresholds it then tries


@dataclass(frozen=True)
class ResidualGate(Method):
    """Skip all blocks but the first while the error this makes in the result stays small.

    artifact: from ``calibrate``. error: what one skipped step may add to the finished sample, as
    root mean square in its range 0 to 1; None takes the calibrated one, 0 never skips.
    """

    SLOTS = ("block.skip", "denoiser.call")
    PAPER = "first-block gates (ParaAttention; TeaCache, arXiv 2411.19108), by sample"

    artifact: ArtifactRef
    error: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error is not None and not 0 <= self.error < math.inf:
            raise ValueError(f"ResidualGate.error = {self.error}: must be 0 or more")

    def neutral(self) -> ResidualGate:
        return ResidualGate(self.artifact, 0.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return gate_claims(pipe)

    def new_live(self, pipe: Any) -> Attached:
        return LiveGate(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveGate)
        artifact = Artifact.load(self.artifact)
        artifact.check_method(self.name())
        artifact.check_pipeline(pipe)
        live.made_with = artifact.guidance
        live.error = float(artifact.tensors["error"]) if self.error is None else self.error
        live.shares = artifact.tensors["shares"].tolist()
        live.responses = artifact.tensors["responses"].tolist()
        if live.error > 0:
            live.adopt_all(pipe)

    @staticmethod
    def calibrate(pipe: Any, inputs: list[dict[str, Any]], *, quality: float) -> Artifact:
        """Find the largest error that keeps `quality` dB of PSNR to the unmodified pipeline.

        Measures how the finished samples answer to a single skipped step, at ten noise levels, then
        tries seven thresholds; `inputs` are pipeline-call arguments, call n has noise of seed n.
        Eight samples or more, or the fidelity of others will differ from theirs.

        Raises:
            ValueError: no inputs, not all of the same steps or not JSON, or no threshold keeps the
                quality.
        """
        digest = digest_of(inputs, "ResidualGate.calibrate")
        with attached(_Probe(), pipe) as live:
            assert isinstance(live, LiveGate)
            live.only = -1
            plain = drawn(pipe, inputs)
            responses = _responses(pipe, inputs, plain, live)
            live.shares, live.responses = list(responses), list(responses.values())
            error = _largest_error(pipe, inputs, plain, live, quality)
        return Artifact(
            method=ResidualGate.name(),
            **fingerprints(pipe),
            match="architecture",
            tensors=_as_tensors(responses, error),
            grid=live.grid,
            guidance=live.guided,
            inputs_sha256=digest,
            settings={"quality": quality},
        )


@dataclass(frozen=True)
class _Probe(Method):
    """The gate while it is being calibrated: its live state is driven from outside."""

    SLOTS = ("block.skip", "denoiser.call")

    def neutral(self) -> Method:
        return self

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return gate_claims(pipe)

    def new_live(self, pipe: Any) -> Attached:
        return LiveGate(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveGate)
        live.adopt_all(pipe)


def _as_tensors(responses: dict[float, float], error: float) -> dict[str, Tensor]:
    import torch

    return {
        "shares": torch.tensor(list(responses), dtype=torch.float64),
        "responses": torch.tensor(list(responses.values()), dtype=torch.float64),
        "error": torch.tensor(error, dtype=torch.float64),
    }


def _responses(
    pipe: Any, inputs: list[dict[str, Any]], plain: list[Any], live: LiveGate
) -> dict[float, float]:
    """Error of the finished samples per unit of gap and of the step's length, by noise share."""
    import torch

    steps, found = len(live.grid), {}
    for step in sorted({round(s) for s in np.linspace(min(WARMUP, steps - 1), steps - 1, PROBES)}):
        live.only, live.gaps = step, []
        skipped = drawn(pipe, inputs)
        if not live.gaps:
            continue  # another denoiser's first steps
        moved = [(a - b).square().mean() for a, b in zip(skipped, plain, strict=True)]
        gap = torch.cat(live.gaps).square().mean().cpu()
        answer = float((torch.stack(moved).mean() / gap.clamp(min=1e-24)).sqrt())
        found[live.places[step]] = answer / live.lengths[step]
    live.only = None
    if not found:
        raise ValueError(f"ResidualGate.calibrate: {steps} steps leave none to skip")
    return found


def _largest_error(
    pipe: Any, inputs: list[dict[str, Any]], plain: list[Any], live: LiveGate, quality: float
) -> float:
    def keeps(error: float) -> bool:
        live.error = error
        return fidelity(drawn(pipe, inputs), plain) >= quality

    best, _ = halved(keeps, TRIES)
    if best is None:
        raise ValueError(f"ResidualGate.calibrate: no threshold keeps {quality} dB")
    return best
