"""What the sample loses at each density, by layer and noise level, and how to spend a budget on it.

`accel calibrate sparse` measures the curves (``calibrate.py``); a policy asks for an allocation.
The best use of a mean density is to go down the convex hulls of all curves at once, always where
the loss falls fastest: whole layers or stages that need it attend densely, others to little. Within
a layer the policy shares out by scores, head by head, or over all heads, whose scores gains make
comparable. An allocation is asked for by density or by quality, from one artifact. Losses only rank
what can be done: they were measured one by one and do not quite add up, so a quality is what runs
with whole allocations had (`Checks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import denoisers
from sparse_attn.block_map import Scope

METHOD = "sparse_attn.subblock_lse:SubblockLSE"
PARTS = ("losses", "gains", "sigmas", "steps")
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Curves:
    """Of one denoiser. losses: (stages, layers, ladder), mean squared error of the sample, of which
    the last is density 1, loss 0. gains: (stages, layers, heads) by which scores of blocks are
    multiplied. sigmas, steps: (stages,), mean noise level and number of steps. ends: (stages,),
    noise level at which each ends, the last at 0; without them midway between the means.
    """

    losses: np.ndarray
    gains: np.ndarray
    sigmas: np.ndarray
    steps: np.ndarray
    ends: np.ndarray | None = None

    def stage(self, sigma: float) -> int:
        """The stage in which a noise level lies: of a grid's own steps, the one they were put in.

        A mean would not tell: where the signal is zero at first (CogVideoX), the first step has
        nearly all of its stage's noise.
        """
        ends = self.ends
        if ends is None:
            ends = np.append((self.sigmas[:-1] + self.sigmas[1:]) / 2, 0.0)
        return int((ends > sigma).sum())


def stage_ends(stages: list[list[float]]) -> list[float]:
    """Where stages end, given the noise levels of the steps of each, descending: midway between
    steps, by share of noise sigma / (1 + sigma), so that other grids divide alike."""
    shares = [[sigma / (1 + sigma) for sigma in stage] for stage in stages]
    middles = [(one[-1] + other[0]) / 2 for one, other in pairwise(shares)]
    return [*(share / (1 - share) for share in middles), 0.0]


@dataclass(frozen=True, eq=False)
class Checks:
    """Qualities of a few allocations in dB of PSNR: as losses sum up, (n,), and as they were seen,
    (inputs, n); of an artifact that does not tell its inputs apart, (1, n).

    A line is drawn through their means.
    """

    summed: np.ndarray
    seen: np.ndarray

    @property
    def line(self) -> tuple[float, float]:
        """Slope and offset; where all are alike, an offset alone."""
        seen = self.seen.mean(0)
        x, y = self.summed - self.summed.mean(), seen - seen.mean()
        slope = float((x @ y) / (x @ x)) if np.ptp(x) > 0.1 else 1.0
        slope = max(slope, 0.1)
        return slope, float(seen.mean() - slope * self.summed.mean())

    def quality(self, loss: float) -> float:
        slope, offset = self.line
        return math.inf if loss <= 0 else slope * decibels(loss) + offset

    def extremes(self, loss: float) -> tuple[float, float] | None:
        """Qualities of the inputs that lose most and least; None where they were not told apart."""
        if len(self.seen) < 2:
            return None
        of_inputs = [Checks(self.summed, one[None]).quality(loss) for one in self.seen]
        return min(of_inputs), max(of_inputs)

    def loss(self, quality: float) -> float:
        slope, offset = self.line
        return 10 ** (-(quality - offset) / slope / 10)


def decibels(loss: float) -> float:
    """PSNR of a mean squared error in [0, 1]."""
    return -10 * math.log10(loss)


@dataclass(frozen=True, eq=False)
class Allocation:
    """shares[slot]: (stages, layers) of blocks to keep. density: mean over calls and layers. loss:
    sum of what its cells lose. quality: expected PSNR to the sample of dense attention, in dB, the
    mean of the inputs; extremes: of the worst and the best of them. allocate: within what a layer's
    share holds."""

    curves: dict[str, Curves]
    shares: dict[str, np.ndarray]
    density: float
    loss: float
    quality: float
    extremes: tuple[float, float] | None
    allocate: Scope
    _gains: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def of(
        self, slot: str, layer: int, sigma: float, device: torch.device = CPU
    ) -> tuple[float, Tensor]:
        """Share of blocks that a layer keeps, and (heads,) gains of its scores, on `device`."""
        stage = self.curves[slot].stage(sigma)
        gains = self._gains.get((slot, device))
        if gains is None:  # once a device: a copy at every attention would wait for it
            with torch.inference_mode(False):
                gains = torch.as_tensor(self.curves[slot].gains, device=device)
            self._gains[slot, device] = gains
        return float(self.shares[slot][stage, layer]), gains[stage, layer]


@dataclass(frozen=True, eq=False)
class Budgets:
    """Curves of every denoiser of a pipeline, by slot."""

    ladder: np.ndarray
    curves: dict[str, Curves]
    checks: Checks
    allocate: Scope
    guidance: bool | None = None  # whether it was calibrated with guidance; None: not known

    @classmethod
    def load(cls, ref: ArtifactRef, pipe: Any, **wanted: Any) -> Budgets:
        """wanted: settings that the calibration must have had.

        Raises:
            ValueError: the artifact is of another kind, model or setting.
        """
        artifact = Artifact.load(ref)
        if artifact.method != METHOD:
            raise ValueError(
                f"{ref.path} is an artifact of {artifact.method}; "
                "make one with `accel calibrate sparse`"
            )
        found = denoisers(pipe)
        artifact.check_pipeline(pipe)
        for name, value in wanted.items():
            had = artifact.settings.get(name)
            if (list(value) if isinstance(value, tuple) else value) != had:
                raise ValueError(f"{ref.path} was calibrated with {name} {had}, not {value}")
        tensors = {name: t.numpy() for name, t in artifact.tensors.items()}
        missing = [d.slot for d in found if f"{d.slot}/losses" not in tensors]
        if missing:
            raise ValueError(f"{ref.path} has no budgets for {missing[0]}; calibrate again")
        for slot in (d.slot for d in found if f"{d.slot}/ends" not in tensors):
            if tensors[f"{slot}/sigmas"].max() > 1:  # of flow models, means tell the stages
                raise ValueError(f"{ref.path} does not say where its stages end; calibrate again")
        # the first artifacts do not say, and were of layers
        allocate = artifact.settings.get("allocate", "layer")
        found_budgets = cls.of(tensors, [d.slot for d in found], allocate)
        return replace(found_budgets, guidance=artifact.guidance)

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray], slots: list[str], allocate: Scope) -> Budgets:
        """From an artifact's tensors; without checks losses are taken to add up."""
        exact = np.zeros(1)
        return cls(
            tensors["ladder"],
            {slot: _curves(tensors, slot) for slot in slots},
            Checks(tensors.get("summed", exact), np.atleast_2d(tensors.get("seen", exact))),
            allocate,
        )

    def at_density(self, density: float) -> Allocation:
        """The least expected loss at a mean density.

        Raises:
            ValueError: less than the ladder begins with, more than 1.
        """
        if not self.ladder[0] <= density <= 1:
            raise ValueError(f"density {density}: calibrated from {self.ladder[0]:g} to 1")
        return self._spend(lambda cells: (density - cells.density) / cells.cost_of_next)

    def at_quality(self, quality: float) -> Allocation:
        """The least density whose expected PSNR is at least `quality` dB."""
        loss = self.checks.loss(quality)
        return self._spend(lambda cells: (cells.loss - loss) / cells.worth_of_next)

    def _spend(self, room: Callable[[_Cells], float]) -> Allocation:
        """Takes steps down the hulls while there is room; of the last, the part that fits."""
        cells = _Cells(self)
        while cells.left and (part := room(cells)) > 0:
            cells.take(min(1.0, part))
        shares, at = {}, 0
        for slot, curves in self.curves.items():
            shape = curves.losses.shape[:2]
            shares[slot] = cells.shares[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        loss = float(cells.loss)
        return Allocation(
            self.curves, shares, float(cells.density), loss, self.checks.quality(loss),
            self.checks.extremes(loss), self.allocate,
        )  # fmt: skip


def _curves(tensors: dict[str, np.ndarray], slot: str) -> Curves:
    found = (tensors[f"{slot}/{part}"] for part in PARTS)
    return Curves(*found, ends=tensors.get(f"{slot}/ends"))


class _Cells:
    """All curves on the way down; a cell is a layer in a stage."""

    def __init__(self, budgets: Budgets) -> None:
        ladder, found = budgets.ladder, list(budgets.curves.values())
        losses = np.concatenate([c.losses.reshape(-1, len(ladder)) for c in found])
        steps = np.concatenate([np.repeat(c.steps, c.losses.shape[1]) for c in found])
        self.weights = steps / steps.sum()
        self.shares = np.full(len(losses), ladder[0])
        self.density, self.loss = float(ladder[0]), float(losses[:, 0].sum())
        down = [
            step
            for cell, (curve, weight) in enumerate(zip(losses, self.weights, strict=True))
            for step in hull(ladder, curve, cell, weight)
        ]
        self.left = sorted(down, key=lambda step: step.worth / step.cost)  # the best is the last

    @property
    def cost_of_next(self) -> float:
        return self.left[-1].cost

    @property
    def worth_of_next(self) -> float:
        return max(self.left[-1].worth, 1e-30)

    def take(self, part: float) -> None:
        step = self.left.pop()
        self.shares[step.cell] += part * step.share
        self.density += part * step.cost
        self.loss = max(0.0, self.loss - part * step.worth)
        if part < 1:
            self.left.clear()


@dataclass(frozen=True)
class Step:
    """From one corner of a cell's hull to the next: by how much its share grows, what that costs of
    the mean density, what the loss falls by."""

    cell: int
    share: float
    cost: float
    worth: float


def hull(ladder: np.ndarray, losses: np.ndarray, cell: int = 0, weight: float = 1.0) -> list[Step]:
    """The lower convex hull of a curve from left to right: the first step is worth most."""
    corners = [0]
    for i in range(1, len(ladder)):
        while len(corners) > 1 and _slope(ladder, losses, corners[-2], i) <= _slope(
            ladder, losses, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(i)
    shares = [float(ladder[b] - ladder[a]) for a, b in pairwise(corners)]
    worths = [float(losses[a] - losses[b]) for a, b in pairwise(corners)]
    return [Step(cell, s, s * weight, w) for s, w in zip(shares, worths, strict=True)]


def _slope(x: np.ndarray, y: np.ndarray, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))
