"""From training checkpoints to shipped folders: `python -m accel.zoo.ship NAME --out OUT`.

Ships the EMA weights of the newest checkpoint, in half precision, whether training has finished
or not, even between stages. The shipped weights and `training.json` beside them are all a warm
restart needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch

from accel.checkpoints import POSITION, Position, newest_checkpoint
from accel.zoo.training import SETTINGS, TRAINING, Model, last_checkpoint

# Each module has a `MODEL`.
MODELS = {
    "digits-ddpm": "accel.zoo.ddpm",
    "digits-dit": "accel.zoo.dit",
    "digits-judge": "accel.zoo.judge",
    "digits-judge-b": "accel.zoo.judge_b",
    "digits-sd": "accel.zoo.sd",
    "digits-wan": "accel.zoo.wan",
}


def model(name: str) -> Model:
    """How an embedded model is made. Raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"zoo: no model {name!r}; known: {', '.join(MODELS)}")
    return importlib.import_module(MODELS[name]).MODEL


def ship(name: str, out: Path, folder: Path) -> None:
    """Writes model `name` to `folder`, from what training left below `out`.

    Raises ValueError for an unknown name and FileNotFoundError where training has left too little.
    """
    writer = model(name).write
    settings = json.loads((out / SETTINGS).read_text())
    begun = [stage for stage in settings["stages"] if newest_checkpoint(out / stage)]
    stages = {}
    for stage in begun:
        position = Position.read(last_checkpoint(out / stage) / POSITION)
        stages[stage] = settings["stages"][stage] | vars(position)
    folder.mkdir(parents=True, exist_ok=True)
    writer(out, folder)
    record = {**settings, "torch": torch.__version__, "stages": stages}
    (folder / TRAINING).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="where training wrote")
    parser.add_argument("--to", type=Path, help="default: the package's own folder")
    args = parser.parse_args()
    ship(args.name, args.out, args.to or Path(__file__).parent / args.name)


if __name__ == "__main__":
    main()
