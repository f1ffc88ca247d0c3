"""Trains the embedded models: `python -m accel.zoo.train digits-dit --out OUT [--resume]`.

Everything lands below OUT: checkpoints, the loss curve (JSON and PNG) and, at the end, the model as
it is shipped. A killed run continues with `--resume`; on a fresh machine, `--start shipped` goes on
from the shipped EMA weights at the data position recorded beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from accel import zoo
from accel.checkpoints import POSITION, Position, newest_checkpoint
from accel.files import write_atomically
from accel.measure import hardware
from accel.zoo.ship import MODELS, model, ship
from accel.zoo.training import SETTINGS, TRAINING, LastStage, Preset, Training

PRESETS = ("cpu", "gpu", "smoke")
SCRATCH, SHIPPED = "scratch", "shipped"
COMPARED = ("model", "preset", "seed", "start", "pool")  # of a training that is resumed


def _limited(preset: Preset, stage: str, steps, minutes, batch) -> Preset:
    """The preset with one stage limited as the command line says."""
    changed = dict(preset.stages)
    last = changed[stage]
    if steps is not None or minutes is not None:
        loop = dataclasses.replace(last.loop, steps=steps, minutes=minutes)
        last = dataclasses.replace(last, loop=loop)
    if batch is not None:
        last = dataclasses.replace(last, batch=batch)
    changed[stage] = last
    return dataclasses.replace(preset, stages=changed)


def _check_same_run(file: Path, settings: dict) -> None:
    """Resumed with other data, a run would be neither the old one nor a new one."""
    before = json.loads(file.read_text()) if file.is_file() else settings
    pairs = [(key, before[key], settings[key]) for key in COMPARED]
    for stage, how in settings["stages"].items():
        if stage in before["stages"] and _goes_on(file.parent / stage, how["loop"]):
            pairs.append((f"batch of {stage}", before["stages"][stage]["batch"], how["batch"]))
    for key, was, now in pairs:
        if was != now:
            raise SystemExit(
                f"{file.parent} was begun with {key} {was}, not {now}; "
                f"resume it with that, or name another --out"
            )


def _goes_on(stage: Path, loop: dict) -> bool:
    """Whether a stage was begun and draws more of its data, the place of which its batch tells."""
    newest = newest_checkpoint(stage)
    if newest is None:
        return False
    at = Position.read(newest / POSITION)
    in_steps = loop["steps"] is None or at.step < loop["steps"]
    return in_steps and (loop["minutes"] is None or at.seconds < 60 * loop["minutes"])


def _start(start: str, name: str) -> Path | None:
    """Folder to go on from; None where training begins with nothing."""
    if start in (SCRATCH, SHIPPED):
        return None if start == SCRATCH else zoo.path(name)
    if not (Path(start) / TRAINING).is_file():
        raise SystemExit(f"--start {start}: no {TRAINING} there; it is what accel.zoo.ship writes")
    return Path(start)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="accel.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, help="default: out/NAME")
    parser.add_argument("--again", help="the stage that --start goes on with; default: the last")
    parser.add_argument("--until", help="the stage to end with; default: the last")
    parser.add_argument("--steps", type=int, help="of the stage it ends with")
    parser.add_argument("--minutes", type=float, help="of the stage it ends with")
    parser.add_argument("--batch", type=int, help="of the stage it ends with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--start",
        default=SCRATCH,
        help=f"{SCRATCH}, {SHIPPED} (go on from the package's own weights), or a folder to go on "
        "from, as accel.zoo.ship writes it",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, then writes the model to OUT/shipped, if it trained to the end."""
    args = parse(argv)
    args.out = args.out or Path("out") / args.name
    made = model(args.name)
    stages = made.stages
    until = args.until or stages[-1]
    if until not in stages:
        raise SystemExit(f"--until {until}: names one of {stages}")
    preset = _limited(made.presets[args.preset], until, args.steps, args.minutes, args.batch)
    if not args.resume and any(newest_checkpoint(args.out / stage) for stage in stages):
        raise SystemExit(f"{args.out} holds a training already; add --resume or name another")
    run = Training(args.name, preset, args.out, seed=args.seed)
    run.resume = args.resume
    run.shipped = _start(args.start, args.name)
    run.first, run.last = args.again or run.first, until
    if run.first not in stages or (args.again and not run.shipped):
        raise SystemExit(f"--again {run.first}: goes with --start, and names one of {stages}")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": args.name,
        "preset": args.preset,
        "seed": args.seed,
        "start": args.start,
        "pool": preset.pool,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "stages": {stage: dataclasses.asdict(preset.stages[stage]) for stage in stages},
    }
    if args.resume:
        _check_same_run(args.out / SETTINGS, settings)
    write_atomically(args.out / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
    try:
        made.train(run)
    except LastStage:
        print(f"{until} is done; accel.zoo.ship writes what there is", flush=True)
        return
    ship(args.name, args.out, args.out / "shipped")


if __name__ == "__main__":
    main()
