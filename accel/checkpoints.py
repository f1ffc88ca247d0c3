"""Checkpoints of a training: whole on disk or not there, and read from the newest that can be."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from accel.files import move_folder

POSITION = "position.json"
NAME = "checkpoint-"  # and the step
KEPT = 2
# What reading half a file raises, by its format.
DAMAGED = (
    *(OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError),
    *(SafetensorError, pickle.UnpicklingError),
)


@dataclass
class Position:
    """Where a run is: the next step, seconds spent in the loop, and the losses so far.

    The next step is the data position, too. `origin_*` say where the last warm restart was.
    """

    step: int = 0
    seconds: float = 0.0
    origin_step: int = 0
    origin_seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since last)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self)))

    @classmethod
    def read(cls, path: Path) -> Position:
        return cls(**json.loads(path.read_text()))


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoint folders below `out`, the newest first."""
    steps = {p.name.removeprefix(NAME): p for p in out.glob(f"{NAME}*")}
    return [steps[s] for s in sorted(filter(str.isdecimal, steps), key=int, reverse=True)]


def newest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint folder below `out`."""
    return next(iter(checkpoints(out)), None)


def save(accelerator: Accelerator, position: Position, out: Path) -> None:
    """Written under a temporary name and renamed, so that neither a kill nor a lost current ever
    leaves half a checkpoint. The last two are kept."""
    final = out / f"{NAME}{position.step}"
    if final.exists():
        return
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial))
    position.write(partial / POSITION)
    move_folder(partial, final)
    for old in checkpoints(out)[KEPT:]:
        shutil.rmtree(old)


def restore(name: str, accelerator: Accelerator, out: Path) -> Position | None:
    """Go on from the newest checkpoint that can be read; None where there is none at all.

    Newer ones that cannot be are set aside, as ``.damaged``.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    damaged: list[Path] = []
    for folder in checkpoints(out):
        try:
            position = Position.read(folder / POSITION)
            accelerator.load_state(str(folder))
        except DAMAGED as error:
            print(f"{name}: {folder} is damaged ({type(error).__name__}: {error})", flush=True)
            damaged.append(folder)
            continue
        for one in damaged:
            aside = one.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            one.rename(aside)
        print(f"{name}: resumed at step {position.step} from {folder.name}", flush=True)
        return position
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise ValueError(
            f"{out}: no checkpoint of it can be read ({names}); delete the folder to begin anew"
        )
    return None
