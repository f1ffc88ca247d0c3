"""HarmoniCa (ICML 2025, arXiv 2410.01723): a schedule learned by walking the student's path.

A table of logits, a row a step and a column an attention or feed-forward, is trained against the
frozen network, without data: the pipeline itself runs, every module blends its new output with the
kept one by the table's score, and each step's loss compares with the uncached network at the same
place, weighted by how much caching there changes the final sample. Above the threshold a module
computes, below it repeats its last output.

Not taken over from the official code: kept outputs that leak from one sample into the next, and
the generator that is set back after every refresh of the weights, which forgets the weights before.
Guidance is what the pipeline does, in all channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accel.artifact import Artifact, ArtifactRef
from accel.denoiser import Denoiser, denoisers
from accel.method import Method, Recipe, Trainer, attached
from caches._drawn import digest_of, drawn, fidelity
from caches._drift import measure_drift
from caches._from_artifact import FromArtifact, OnGrid
from caches._resuming import work_digest
from caches._router_training import RouterTraining
from caches.schedule import (
    COMPUTE,
    REUSE,
    Schedule,
    constant,
    module_columns,
    of_artifact,
    predicted_cost,
    to_artifact,
)

BETAS = (1e-9, 1e-2)  # prices that a calibration looks between


@dataclass(frozen=True)
class RouterCache(FromArtifact, Method):
    """Run a schedule that ``RouterTrainer`` has learned.

    artifact: the schedule. on_grid: in a run over other noise levels "resample" the schedule,
    raise an "error", or "bypass" it and compute.
    """

    PAPER = "HarmoniCa, arXiv 2410.01723"

    artifact: ArtifactRef
    on_grid: OnGrid = "resample"

    @classmethod
    def load(cls, path: str, on_grid: OnGrid = "resample") -> RouterCache:
        """The method for a schedule file, as it is now. Raises ``FileNotFoundError``."""
        return cls(ArtifactRef.of(path), on_grid)


@dataclass(frozen=True)
class RouterTrainer(Trainer):
    """Settings of a training. The defaults are the paper's, with fewer and larger updates; the
    mean of squares is the official code's, whose beta is for it.

    beta: price of a computed module; the one knob between speed and quality. updates: of every
    row, one a trajectory. lr: of Adam on the logits. threshold: on the score. proxy: a step's
    weight is the change of the final sample when its row alone computes all ("leave_one_out", the
    paper) or when it begins to cache after all earlier ones ("cumulative", the official code), as
    a "mean" of squares (the code) or their "sum" (the paper; it wants another beta). refresh:
    trajectories between two measurements of the weights, each of which takes a sampling a step;
    their mean is used.
    """

    beta: float = 7e-8
    updates: int = 300
    lr: float = 0.05
    threshold: float = 0.1
    proxy: Literal["leave_one_out", "cumulative"] = "leave_one_out"
    reduce: Literal["mean", "sum"] = "mean"
    refresh: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = min(self.updates, self.refresh)
        if self.beta < 0 or self.lr <= 0 or counts < 1 or not 0 < self.threshold < 1:
            raise ValueError(
                f"{self}: wants beta >= 0, lr > 0, updates and refresh >= 1, 0 < threshold < 1"
            )

    @classmethod
    def official(cls, **changes: Any) -> RouterTrainer:
        """The settings of the authors' example for 10 steps, for pictures of their size."""
        return cls(**{"updates": 2000, "lr": 0.01, "proxy": "cumulative", "refresh": 50, **changes})

    def fit(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        out: str,
        student_recipe: Recipe | None = None,
    ) -> Artifact:
        """Train below `out`, where a training of the same settings goes on; returns the schedule.

        `inputs`: pipeline-call arguments, used in turn; trajectory n has noise of seed
        `seed` + n. `student_recipe` is attached all the while.

        Raises:
            ValueError: no inputs, not JSON or not all of the same steps and guidance, less than two
                steps, two denoisers, or `out` holds another training.
        """
        denoiser, inputs_sha256 = _only_denoiser(pipe), digest_of(inputs, "RouterTrainer")
        columns = module_columns(denoiser)
        recipe = student_recipe or Recipe(())
        digest = work_digest(pipe, inputs, self, recipe)
        with attached(recipe, pipe):
            training = RouterTraining(self, pipe, inputs, out, columns, digest)
            training.run()
        schedule = routed(training.logits(), columns, self.threshold)
        artifact = to_artifact(
            schedule,
            denoiser,
            method=RouterCache.name(),
            grid=training.sigmas,
            guidance=training.guided,
            inputs_sha256=inputs_sha256,
            seed=self.seed,
        )
        artifact.tensors["logits"] = training.logits()
        return artifact

    def calibrate(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        out: str,
        *,
        speed: float | None = None,
        quality: float | None = None,
        tries: int = 5,
    ) -> Artifact:
        """The schedule for a wanted speed-up or fidelity (dB of PSNR): the training finds `beta`.

        Trains `tries` times below `out`, at prices that halve the range `BETAS` in its logarithm;
        returns the schedule nearest to what was asked for that reaches it. The speed-up is
        predicted from seconds a module; the fidelity is measured on `inputs`.

        Raises:
            ValueError: both or none asked for, what `fit` raises, or no training reached it; what
                they did is said.
        """
        denoiser = _only_denoiser(pipe)
        digest_of(inputs, "RouterTrainer")  # before the work
        if (speed is None) == (quality is None):
            raise ValueError("RouterTrainer.calibrate: ask for a speed or for a quality")
        (low, high), best = BETAS, None  # how fast or good, and the schedule
        said = []
        plain = drawn(pipe, inputs)
        drift = measure_drift(pipe, inputs[0], module_columns(denoiser))
        for _ in range(tries):
            beta = (low * high) ** 0.5
            artifact = replace(self, beta=beta).fit(pipe, inputs, f"{out}/beta-{beta:.3g}")
            schedule = of_artifact(artifact)
            full = constant(schedule.columns, schedule.steps)
            costs = (drift.seconds, drift.rest)
            faster = predicted_cost(full, *costs) / predicted_cost(schedule, *costs)
            trial = Path(out) / "trial.safetensors"
            with attached(RouterCache(artifact.save(trial)), pipe):
                nearer = fidelity(drawn(pipe, inputs), plain)
            trial.unlink()
            said.append(f"{faster:.2f}x at {nearer:.1f} dB")
            found, wanted = (faster, speed) if speed is not None else (nearer, quality or 0.0)
            reached = found >= wanted
            if reached and (best is None or found <= best[0]):
                best = found, artifact
            if reached == (speed is not None):  # a lower price computes more
                high = beta
            else:
                low = beta
        if best is None:
            raise ValueError(f"RouterTrainer.calibrate: none is so fast or so good: {said}")
        return best[1]


def _only_denoiser(pipe: Any) -> Denoiser:
    found = denoisers(pipe)
    if len(found) != 1:
        raise ValueError(f"RouterTrainer wants a pipeline with one denoiser, not {len(found)}")
    return found[0]


def routed(logits: Any, columns: tuple[str, ...], threshold: float) -> Schedule:
    """The schedule of a table of logits (steps, columns): computed where the score is above."""
    bits = logits.sigmoid() > threshold
    bits[0] = True
    rows = tuple("".join(COMPUTE if bit else REUSE for bit in row) for row in bits.tolist())
    return Schedule(columns, rows)
