"""Error against density, measured by head, layer and noise level, and how to spend a budget on it.

`accel calibrate sparse` measures the curves (``calibrate.py``); a policy asks for an allocation.
Cells cost alike, so the best use of a mean density is to go down the convex hulls of all curves at
once, always where the error falls fastest: whole layers, heads or stages that need it attend
densely, others to little. An allocation is asked for by density or by error, from one artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import denoisers

METHOD = "sparse_attn.subblock_lse:SubblockLSE"


@dataclass(frozen=True, eq=False)
class Allocation:
    """shares[slot]: (stages, layers, heads) of blocks to keep; sigmas[slot]: of the stages."""

    shares_by_slot: dict[str, np.ndarray]
    sigmas: dict[str, np.ndarray]
    density: float
    error: float  # expected, relative, root of the mean over layers and stages

    def shares(self, slot: str, layer: int, sigma: float) -> np.ndarray:
        """(heads,): of the stage whose noise level is nearest."""
        stage = int(np.abs(self.sigmas[slot] - sigma).argmin())
        return self.shares_by_slot[slot][stage, layer]


@dataclass(frozen=True, eq=False)
class Budgets:
    """errors[slot]: (stages, layers, heads, ladder), of which the last is density 1, error 0.

    An error is a head's part of its layer's squared relative error: heads of a layer add up.
    """

    ladder: np.ndarray
    errors: dict[str, np.ndarray]
    sigmas: dict[str, np.ndarray]

    @classmethod
    def load(cls, ref: ArtifactRef, pipe: Any) -> Budgets:
        """Raises ValueError where the artifact is of another kind or model."""
        artifact = Artifact.load(ref)
        if artifact.method != METHOD:
            raise ValueError(
                f"{ref.path} is an artifact of {artifact.method}; "
                "make one with `accel calibrate sparse`"
            )
        found = denoisers(pipe)
        artifact.check_model(found[0].module)
        tensors = {name: t.numpy() for name, t in artifact.tensors.items()}
        missing = [d.slot for d in found if f"{d.slot}/errors" not in tensors]
        if missing:
            raise ValueError(f"{ref.path} has no budgets for {missing[0]}; calibrate again")
        return cls(
            tensors["ladder"],
            {d.slot: tensors[f"{d.slot}/errors"] for d in found},
            {d.slot: tensors[f"{d.slot}/sigmas"] for d in found},
        )

    def at_density(self, density: float) -> Allocation:
        """The least expected error at a mean density.

        Raises:
            ValueError: less than the ladder begins with.
        """
        if density < self.ladder[0]:
            raise ValueError(
                f"density {density} is below the {self.ladder[0]:g} that was calibrated"
            )
        return self._allocate(lambda mean_density, _: mean_density >= density, density)

    def at_error(self, error: float) -> Allocation:
        """The least density whose expected relative error is at most `error`."""
        if error < 0:
            raise ValueError(f"error {error}: at least 0")
        return self._allocate(lambda _, found: found <= error, None)

    def _allocate(self, enough: Any, exactly: float | None) -> Allocation:
        cells = np.concatenate([e.reshape(-1, len(self.ladder)) for e in self.errors.values()])
        steps = [step for i, curve in enumerate(cells) for step in hull(self.ladder, curve, i)]
        steps.sort(key=lambda step: step.slope)
        place = np.zeros(len(cells), dtype=int)
        shares = np.full(len(cells), self.ladder[0])
        errors = cells[:, 0].copy()
        layers = sum(e.shape[0] * e.shape[1] for e in self.errors.values())
        for step in steps:
            if enough(shares.mean(), _root(errors.sum() / layers)):
                break
            place[step.cell] = step.to
            shares[step.cell], errors[step.cell] = self.ladder[step.to], cells[step.cell, step.to]
        if exactly is not None and shares.mean() > exactly:
            shares = np.maximum(self.ladder[0], shares * exactly / shares.mean())
        return Allocation(
            self._by_slot(shares), self.sigmas, float(shares.mean()), _root(errors.sum() / layers)
        )

    def _by_slot(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for slot, errors in self.errors.items():
            shape = errors.shape[:3]
            size = int(np.prod(shape))
            found[slot] = flat[at : at + size].reshape(shape)
            at += size
        return found


@dataclass(frozen=True)
class _Step:
    """From one corner of a cell's hull to the next: what error falls by per density."""

    cell: int
    to: int
    slope: float


def hull(ladder: np.ndarray, errors: np.ndarray, cell: int = 0) -> list[_Step]:
    """The lower convex hull of a curve, slopes ascending (steepest fall first)."""
    corners = [0]
    for i in range(1, len(ladder)):
        while len(corners) > 1 and _slope(ladder, errors, corners[-2], i) <= _slope(
            ladder, errors, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(i)
    return [_Step(cell, b, _slope(ladder, errors, a, b)) for a, b in pairwise(corners)]


def _root(x: float) -> float:
    return float(max(0.0, x) ** 0.5)  # what is left of rounding is not below zero


def _slope(x: np.ndarray, y: np.ndarray, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))
