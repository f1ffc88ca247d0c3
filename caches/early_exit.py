"""Early exit: leave out the last blocks of a transformer where they would change little.

DeeDiff (arXiv 2309.17074) asks after every block, of every sample, whether to stop; what it learns
to answer is almost a function of the noise level. So here the depth is a schedule: `calibrate`
measures what leaving at each exit and noise level does to the finished sample, and picks the depths
that do least harm for the blocks they run, where the paper has one threshold for all: it would take
the smallest savings first. The bound is a wanted fidelity or speed. In place of the blocks comes
nothing ("skip"), what they added when they last ran ("residual"), the line through the last two
times ("forecast"), or a head trained by ``ExitTraining``, without data: the network is the teacher,
not the true noise. A step's samples and guidance branches leave together.
Memory: an activation (residual) or two (forecast) a branch and exit in use. Waits for nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from accel.artifact import Artifact, ArtifactRef, fingerprints, inputs_digest
from accel.denoiser import denoisers
from accel.method import Attached, Method, Recipe, Trainer, attached
from caches._drawn import digest_of
from caches._exit_calibration import EXITS, Found, calibrated, spaced_exits
from caches._exit_training import trained_heads
from caches._exits import ExitHeads, LiveExit, Rest, depths_of, exit_columns
from caches._from_artifact import FromArtifact, OnGrid
from caches._resuming import work_digest
from caches.schedule import constant, to_artifact


@dataclass(frozen=True)
class EarlyExit(FromArtifact, Method):
    """Run so many blocks of a transformer as the noise level needs.

    artifact: from ``calibrate``. on_grid: in a run over other noise levels "resample" the schedule,
    raise an "error", or "bypass" it and compute.
    """

    PAPER = "DeeDiff, arXiv 2309.17074; DuoDiff, arXiv 2410.09633"

    artifact: ArtifactRef
    on_grid: OnGrid = "resample"

    def new_live(self, pipe: Any) -> Attached:
        return LiveExit(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveExit)
        super().build(pipe, live)
        artifact, found = live.artifact, live.found
        assert artifact is not None
        assert found is not None
        used = {d for slot in live.slots() for d in depths_of(found, slot) if d < live.blocks(slot)}
        live.rest = artifact.settings["rest"]
        if live.rest == "heads":
            live.heads = ExitHeads.of(artifact.tensors, artifact.settings["exits"])
            if not used <= set(live.heads.exits):
                raise ValueError(f"{self.artifact.path}: exits {sorted(used)} without a head")
        live.adopt_exits(pipe)

    @staticmethod
    def calibrate(
        pipe: Any,
        inputs: list[dict[str, Any]],
        *,
        rest: Literal["skip", "residual", "forecast"] | Artifact = "forecast",
        quality: float | None = None,
        speed: float | None = None,
    ) -> Artifact:
        """The boldest schedule that keeps `quality` dB of PSNR, or the most careful with `speed`.

        `inputs`: pipeline-call arguments; call n has noise of seed n. `rest`: "skip", "residual",
        "forecast", or what ``ExitTraining`` made. Takes a run of all inputs for each of up to eight
        noise levels and seven exits, then for nine prices. The speed-up is predicted from seconds a
        block; the fidelity is measured on `inputs`, which is worth little below eight samples.

        Raises:
            ValueError: both or none asked for, inputs of different steps or not JSON, another model
                than the heads are for, or no schedule does it.
        """
        if (speed is None) == (quality is None):
            raise ValueError("EarlyExit.calibrate: ask for a speed or for a quality")
        trained = rest if isinstance(rest, Artifact) else None
        kind: Rest = rest if not isinstance(rest, Artifact) else rest.settings.get("rest", "none")
        if kind not in get_args(Rest) or (kind == "heads") != (trained is not None):
            raise ValueError(
                f"EarlyExit.calibrate: rest is {kind!r}; "
                "give skip, residual, forecast or trained heads"
            )
        digest = digest_of(inputs, "EarlyExit.calibrate")
        found = calibrated(pipe, inputs, kind, trained, (quality, speed))
        settings = {"rest": kind, "quality": quality, "speed": speed}
        return _artifact(pipe, found, settings, digest)


@dataclass(frozen=True)
class ExitTraining(Trainer):
    """Settings of the training of exit heads: one update a run of the pipeline, Adam at rate `lr`.

    most: exits, evenly spaced over the blocks.
    """

    updates: int = 300
    lr: float = 1e-2
    most: int = EXITS
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.updates, self.most) < 1 or self.lr <= 0:
            raise ValueError(f"{self}: wants updates, most and lr above 0")

    def fit(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        out: str,
        student_recipe: Recipe | None = None,
    ) -> Artifact:
        """Train below `out`, where a training of the same settings goes on; heads for `calibrate`.

        `inputs`: pipeline-call arguments, used in turn; run n has noise of seed `seed` + n.
        `student_recipe` is attached all the while. The artifact leaves nothing out as it is.

        Raises:
            ValueError: no inputs, two denoisers or no stack of blocks, or `out` holds another
                training.
        """
        if not inputs or len(denoisers(pipe)) != 1:
            raise ValueError("ExitTraining wants inputs and a pipeline with one denoiser")
        columns = exit_columns(pipe)
        exits = spaced_exits(len(columns), self.most)
        recipe = student_recipe or Recipe(())
        digest = work_digest(pipe, inputs, self, recipe)
        with attached(recipe, pipe):
            heads, sigmas, guided = trained_heads(self, pipe, inputs, Path(out), exits, digest)
        settings = {"rest": "heads", "training": asdict(self)}
        schedule = constant(columns, len(sigmas))
        return _artifact(
            pipe,
            Found(schedule, sigmas, exits, heads.tensors(), guided),
            settings,
            inputs_digest(inputs),
        )


def _artifact(pipe: Any, found: Found, settings: dict[str, Any], digest: str) -> Artifact:
    made = to_artifact(
        found.schedule,
        denoisers(pipe)[0],
        method=EarlyExit.name(),
        grid=found.grid,
        guidance=found.guided,
        others=fingerprints(pipe)["others"],
        inputs_sha256=digest,
        settings={**settings, "exits": list(found.exits)},
    )
    made.tensors |= found.tensors
    made.match = "weights" if found.tensors else "architecture"
    return made
