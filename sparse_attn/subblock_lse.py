"""Keeps the blocks that would be missed most, and lets means stand for the others.

The default policy: deterministic, no random state, about one per cent of the work of dense
attention. A block's softmax mass is estimated as in SGLang's sub-block selection, by a log-sum-exp
over the means of 4x4 sub-blocks of a pair of blocks, normalised by row. With `pooled`, what is
dropped takes part as one mean key and value a block, weighted by its tokens, in the same softmax
(Video-BLADE's global branch, but without counting what is kept twice): density 1 is dense
attention. Then what matters is not the mass but what the mean misses of it, so the mass is
multiplied by the spread of the block's logits and values (`estimators.loss_by_means`; ours).
Calibrated, each layer has a budget for each noise level.
Costs no memory beyond the maps and the means, and no synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from accel.artifact import Artifact, ArtifactRef
from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import Scope, keep_share
from sparse_attn.budgets import Budgets
from sparse_attn.calibrate import CalibrationSettings, measured_budgets
from sparse_attn.estimators import block_scores, complement, weighed
from sparse_attn.kernels.reference import Pooled


@dataclass(frozen=True)
class SubblockLSE(SparseAttention, Method):
    """Attend to the blocks of keys with the largest estimated softmax mass.

    density: share of blocks kept; 1 is dense attention. allocate: within what the share holds, a
    "row" of blocks, a "head" or a "layer"; None: what the artifact was calibrated with (a head, as
    it comes), without one a row. pooled: what is dropped takes part as means. artifact: of `accel
    calibrate sparse` with the same blocks, pooled and share of dense steps; then `density` is the
    mean over layers and noise levels, spent where the sample gains most. Over a layer, scores of
    heads are weighed by what they were seen to miss.
    """

    PAPER = "SGLang sub-block selection; pooled branch after Video-BLADE, arXiv 2508.10774"

    density: float = 0.3
    allocate: Scope | None = None
    pooled: bool = True
    artifact: ArtifactRef | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"SubblockLSE.density = {self.density}: above 0, at most 1")

    def neutral(self) -> SubblockLSE:
        return replace(self, density=1.0, artifact=None)

    def attends_densely(self) -> bool:
        return self.density == 1

    def nominal(self) -> float:
        return self.density + (1 / self.blocks[1] if self.pooled else 0)

    @staticmethod
    def calibrate(
        pipe: Any,
        inputs: list[dict[str, Any]],
        settings: CalibrationSettings | None = None,
        parts: str | None = None,
    ) -> Artifact:
        """Measure what each layer and noise level costs the sample at each density.

        parts: a folder where each input's figures are kept, so that a stopped run goes on.
        """
        return measured_budgets(pipe, inputs, settings or CalibrationSettings(), parts)

    def prepare(self, pipe: Any, live: LiveSparse) -> None:
        if self.artifact is not None and self.density < 1:
            had = {"blocks": self.blocks, "pooled": self.pooled, "dense": self.dense[0]}
            budgets = Budgets.load(self.artifact, pipe, **had)
            live.made_with = budgets.guidance
            live.tables = budgets.at_density(self.density)

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        score = block_scores(q, k, live.values, place.blocks, self.pooled)
        if live.tables is None:
            return keep_share(score, self.density, self.allocate or "row")
        share, gains = live.tables.of(place.denoiser, place.layer, place.sigma, q.device)
        allocate = self.allocate or live.tables.allocate
        if allocate == "layer":  # else heads are not compared
            score = weighed(score, gains)
        return keep_share(score, share, allocate)

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        return complement(k, v, keep, place.blocks[1]) if self.pooled else None
