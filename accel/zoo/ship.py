"""From training checkpoints to shipped folders: `python -m accel.zoo.ship NAME --out OUT`.

Ships the EMA weights of the newest checkpoint, in half precision, whether training has finished
or not. The shipped weights and `training.json` beside them are all a warm restart needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn

from accel.zoo.autoencoder import AutoencoderConfig
from accel.zoo.dit import DiTConfig, build_scheduler
from accel.zoo.judge import Judge
from accel.zoo.loop import POSITION, Position, newest_checkpoint
from accel.zoo.world import COLOURS, DIGITS, class_label

TRAINING = "training.json"
SETTINGS = "settings.json"


def ship(name: str, out: Path, folder: Path) -> None:
    """Writes model `name` to `folder`, from what training left below `out`.

    Raises ValueError for an unknown name and FileNotFoundError where training has left nothing.
    """
    writers = {"digits-dit": _ship_dit, "digits-judge": _ship_judge}
    if name not in writers:
        raise ValueError(f"ship: no model {name!r}; known: {', '.join(writers)}")
    folder.mkdir(parents=True, exist_ok=True)
    writers[name](out, folder)
    settings = json.loads((out / SETTINGS).read_text())
    stages = {}
    for stage in settings["stages"]:
        position = Position.read(_newest(out / stage) / POSITION)
        stages[stage] = settings["stages"][stage] | vars(position)
    record = {**settings, "torch": torch.__version__, "stages": stages}
    (folder / TRAINING).write_text(json.dumps(record, indent=1) + "\n")


def ema_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint of `accel.zoo.loop`."""
    state = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    return {name: value for name, value in state.items() if name != "updates"}


def _newest(stage: Path) -> Path:
    checkpoint = newest_checkpoint(stage)
    if checkpoint is None:
        raise FileNotFoundError(f"ship: no checkpoint in {stage}; train first")
    return checkpoint


def _ship_dit(out: Path, folder: Path) -> None:
    transformer = DiTConfig().build()
    transformer.load_state_dict(ema_weights(_newest(out / "denoiser")))
    trained = AutoencoderKL.from_pretrained(out / "vae")
    vae = AutoencoderConfig().build()  # a fresh one, whose configuration names no folder of ours
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(scaling_factor=trained.config.scaling_factor)
    pipe = DiTPipeline(transformer, vae, build_scheduler())
    labels = {str(i): class_label(i) for i in range(len(DIGITS) * len(COLOURS))}
    pipe.register_to_config(id2label=labels)
    for model in (transformer, vae):
        nn.Module.half(model)  # diffusers' own warns of modules to keep in float32: it has none
    for part in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)


def _ship_judge(out: Path, folder: Path) -> None:
    judge = Judge()
    judge.load_state_dict(ema_weights(_newest(out / "judge")))
    judge.save(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True, help="where training wrote")
    parser.add_argument("--to", type=Path, help="default: the package's own folder")
    args = parser.parse_args()
    ship(args.name, args.out, args.to or Path(__file__).parent / args.name)


if __name__ == "__main__":
    main()
