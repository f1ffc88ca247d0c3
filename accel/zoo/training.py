"""What a model's training consists of: presets, stages, and one run of them below one folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from accel.checkpoints import POSITION, Position, newest_checkpoint
from accel.loop import LoopSettings, fit

SETTINGS = "settings.json"  # in a run's folder: how it was begun
TRAINING = "training.json"  # in a shipped folder: the same, the data positions and the loss curves


@dataclass(frozen=True)
class Stage:
    """One run of the loop: its settings and how many samples a step sees.

    compile: torch.compile the network. Worth its minutes at the start where a stage takes long and
    much of a step is small operations: 1.46 times as fast a step for `digits-wan` on one core.
    """

    batch: int
    loop: LoopSettings
    compile: bool = False


@dataclass(frozen=True)
class Preset:
    """A size of training. `pool`: samples whose latents a denoiser is trained on (0: none)."""

    device: str  # "cpu" or "cuda"
    precision: str  # as Accelerate names it
    stages: dict[str, Stage]  # in the order they are trained
    pool: int = 0


@dataclass(frozen=True)
class Model:
    """How one embedded model is made.

    train: runs the stages; write: (out, folder), puts the EMA weights below `out` into a folder as
    it is shipped.
    """

    presets: dict[str, Preset]
    train: Callable[[Training], None]
    write: Callable[[Path, Path], None]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order; the same in every preset."""
        return tuple(self.presets["cpu"].stages)


class LastStage(Exception):
    """The stage that a training was to end with is done."""


class Training:
    """One model's training below one folder."""

    def __init__(self, name: str, preset: Preset, out: Path, *, seed: int = 0):
        if preset.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("preset gpu needs a CUDA device; use --preset cpu")
        self.name, self.preset, self.out, self.seed = name, preset, out, seed
        self.device = torch.device(preset.device)
        if preset.device == "cuda":  # for this process: it trains and ends
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self.resume = False
        self.shipped: Path | None = None  # the folder a warm restart begins with
        self.first = self.last = list(preset.stages)[-1]  # the stages it goes on and ends with

    def stage(self, stage: str, model: nn.Module, loss) -> dict[str, torch.Tensor]:
        """Runs one stage; returns its EMA weights.

        Raises LastStage after the one that the training ends with, where others would follow.
        """
        start = self.shipped_position(stage)
        if self.preset.stages[stage].compile:
            model.compile(dynamic=False)
        weights, position = fit(
            stage,
            model,
            loss,
            self.preset.stages[stage].loop,
            self.out / stage,
            cpu=self.preset.device == "cpu",
            precision=self.preset.precision,
            resume=self.resume,
            start=start,
        )
        draw_curve(stage, position, self.out / f"{stage}.png")
        if stage == self.last != list(self.preset.stages)[-1]:
            raise LastStage
        return weights

    def shipped_position(self, stage: str) -> Position | None:
        """Where the shipped weights stopped; None where this stage starts from nothing."""
        if self.shipped is None:
            return None
        record = json.loads((self.shipped / TRAINING).read_text())["stages"].get(stage)
        if record is None:
            return None
        names = [field.name for field in dataclasses.fields(Position)]
        position = Position(**{name: record[name] for name in names})
        position.origin_step, position.origin_seconds = position.step, position.seconds
        return position

    def seed_weights(self) -> None:
        """Same fresh weights for the same seed."""
        torch.manual_seed(self.seed)

    def batch(self, stage: str) -> int:
        """Samples per step."""
        return self.preset.stages[stage].batch

    def keeps(self, stage: str) -> bool:
        """Is this stage's result taken over from the folder a warm restart begins with?"""
        order = list(self.preset.stages)
        return self.shipped is not None and order.index(stage) < order.index(self.first)

    def keep_record(self, stage: str) -> None:
        """Carries the position of a stage that is kept into this run's folder."""
        folder = self.out / stage / "checkpoint-0"
        folder.mkdir(parents=True, exist_ok=True)
        position = self.shipped_position(stage)
        assert position is not None
        position.write(folder / POSITION)


def draw_curve(name: str, position: Position, path: Path) -> None:
    """Loss over steps as JSON and, where matplotlib is installed, as PNG."""
    path.with_suffix(".json").write_text(json.dumps(vars(position)) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib, no loss curve picture: pip install -e '.[zoo]'")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*position.curve, strict=True) if position.curve else ((), ())
    axes.plot(steps, losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    figure.savefig(path, dpi=120)


def last_checkpoint(stage: Path) -> Path:
    """The newest checkpoint of a stage. Raises FileNotFoundError where there is none."""
    checkpoint = newest_checkpoint(stage)
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint in {stage}; train first")
    return checkpoint


def ema_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint of `accel.loop`."""
    state = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    return {name: value for name, value in state.items() if name != "updates"}


def trained_weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a stage's newest checkpoint below `out`."""
    return ema_weights(last_checkpoint(out / stage))
