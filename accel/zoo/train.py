"""Trains the embedded models: `python -m accel.zoo.train digits-dit --out OUT [--resume]`.

Everything lands below OUT: checkpoints, the loss curve (JSON and PNG) and, at the end, the model as
it is shipped. A killed run continues with `--resume`; on a fresh machine, `--start shipped` goes on
from the shipped EMA weights at the data position recorded beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn

from accel import zoo
from accel.measure import hardware
from accel.zoo.autoencoder import AutoencoderConfig, AutoencoderLoss, encode_pool, measure_scaling
from accel.zoo.dit import DiTConfig, NoiseLoss
from accel.zoo.judge import Judge, JudgeLoss
from accel.zoo.loop import POSITION, LoopSettings, Position, fit, newest_checkpoint
from accel.zoo.ship import SETTINGS, TRAINING, ship
from accel.zoo.world import DigitWorld


@dataclass(frozen=True)
class Stage:
    """One run of the loop: its settings and how many pictures a step sees."""

    batch: int
    loop: LoopSettings


@dataclass(frozen=True)
class Preset:
    """A size of training. `pool`: pictures whose latents the denoiser is trained on."""

    device: str  # "cpu" or "cuda"
    precision: str  # as Accelerate names it
    pool: int
    stages: dict[str, Stage]


PRESETS = {
    # About an hour on one core of a server CPU: what was shipped.
    "cpu": Preset(
        device="cpu",
        precision="no",
        pool=65_536,
        stages={
            "judge": Stage(64, LoopSettings(minutes=5, lr=2e-3)),
            "autoencoder": Stage(32, LoopSettings(minutes=16, lr=2e-3)),
            "denoiser": Stage(128, LoopSettings(minutes=38, lr=2e-3, warmup=500)),
        },
    ),
    # For a better model where a GPU is at hand. No shipped weights come from it yet.
    "gpu": Preset(
        device="cuda",
        precision="bf16",
        pool=524_288,
        stages={
            "judge": Stage(256, LoopSettings(steps=20_000, lr=2e-3)),
            "autoencoder": Stage(256, LoopSettings(steps=30_000, lr=2e-3)),
            "denoiser": Stage(
                1024, LoopSettings(steps=150_000, lr=1.5e-3, warmup=1000, ema_decay=0.9999)
            ),
        },
    ),
    # Proves the machinery in seconds; the result is noise.
    "smoke": Preset(
        device="cpu",
        precision="no",
        pool=32,
        stages={
            "judge": Stage(8, LoopSettings(steps=6, checkpoint_steps=2, log_steps=2)),
            "autoencoder": Stage(4, LoopSettings(steps=2, log_steps=2)),
            "denoiser": Stage(4, LoopSettings(steps=6, checkpoint_steps=2, log_steps=2)),
        },
    ),
}
STAGES = {"digits-dit": ("autoencoder", "denoiser"), "digits-judge": ("judge",)}


class Training:
    """One model's training below one folder."""

    def __init__(self, name: str, preset: Preset, out: Path, *, seed: int = 0):
        if preset.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("preset gpu needs a CUDA device; use --preset cpu")
        self.name, self.preset, self.out, self.seed = name, preset, out, seed
        self.device = torch.device(preset.device)
        self.resume = False
        self.shipped: Path | None = None

    def stage(self, stage: str, model: nn.Module, loss) -> dict[str, torch.Tensor]:
        """Runs one stage; returns its EMA weights."""
        start = self.shipped_position(stage)
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
        return weights

    def shipped_position(self, stage: str) -> Position | None:
        """Where the shipped weights stopped; None where this run starts from nothing."""
        if self.shipped is None:
            return None
        record = json.loads((self.shipped / TRAINING).read_text())["stages"][stage]
        names = [field.name for field in dataclasses.fields(Position)]
        position = Position(**{name: record[name] for name in names})
        position.origin_step, position.origin_seconds = position.step, position.seconds
        return position

    def seed_weights(self) -> None:
        """Same fresh weights for the same seed."""
        torch.manual_seed(self.seed)

    def batch(self, stage: str) -> int:
        """Pictures per step."""
        return self.preset.stages[stage].batch


def train_judge(run: Training) -> None:
    """digits-judge: one stage."""
    run.seed_weights()
    judge = Judge.load(run.shipped).train() if run.shipped else Judge()
    run.stage("judge", judge, JudgeLoss(run.batch("judge"), run.seed, run.device))


def train_dit(run: Training) -> None:
    """digits-dit: the autoencoder, then the denoiser on its latents.

    A warm restart keeps the shipped autoencoder, whose latents the denoiser knows.
    """
    run.seed_weights()
    vae = _autoencoder(run)
    run.seed_weights()
    if run.shipped:
        transformer = DiTTransformer2DModel.from_pretrained(run.shipped / "transformer").eval()
    else:
        transformer = DiTConfig().build()
    means, stds, classes = encode_pool(vae, DigitWorld("train", run.seed), run.preset.pool)
    scale = vae.config.scaling_factor
    print(f"denoiser: {len(classes)} pictures encoded", flush=True)
    loss = NoiseLoss(
        (means * scale, stds * scale, classes),
        run.batch("denoiser"),
        run.seed,
        run.device,
    )
    run.stage("denoiser", transformer, loss)


def _autoencoder(run: Training) -> AutoencoderKL:
    """The finished autoencoder: read if there is one below `out`, else trained."""
    folder = run.out / "vae"
    if run.shipped:
        vae = AutoencoderKL.from_pretrained(run.shipped / "vae")
        vae.save_pretrained(folder)
        _keep_record(run, "autoencoder")
    if run.shipped or (run.resume and (folder / "config.json").is_file()):
        return AutoencoderKL.from_pretrained(folder).to(run.device).eval()
    vae = AutoencoderConfig().build()
    loss = AutoencoderLoss(run.batch("autoencoder"), run.seed, run.device)
    vae.load_state_dict(run.stage("autoencoder", vae, loss))
    vae.eval()
    scale = measure_scaling(vae, DigitWorld("train", run.seed))
    vae.register_to_config(scaling_factor=scale)
    partial = folder.with_suffix(".tmp")
    vae.save_pretrained(partial)
    os.replace(partial, folder)  # whole or not at all
    return vae


def _keep_record(run: Training, stage: str) -> None:
    """Carries the position of a stage that is not trained again into this run's folder."""
    folder = run.out / stage / "checkpoint-0"
    folder.mkdir(parents=True, exist_ok=True)
    position = run.shipped_position(stage)
    assert position is not None
    position.write(folder / POSITION)


def draw_curve(name: str, position: Position, path: Path) -> None:
    """Loss over steps as JSON and, where matplotlib is installed, as PNG."""
    path.with_suffix(".json").write_text(json.dumps(vars(position)) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib, no loss curve picture: pip install 'accel[zoo]'")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*position.curve, strict=True) if position.curve else ((), ())
    axes.plot(steps, losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    figure.savefig(path, dpi=120)


def _limited(preset: Preset, stages: tuple[str, ...], steps, minutes, batch) -> Preset:
    """The preset with the last stage limited as the command line says."""
    changed = dict(preset.stages)
    last = changed[stages[-1]]
    if steps is not None or minutes is not None:
        loop = dataclasses.replace(last.loop, steps=steps, minutes=minutes)
        last = dataclasses.replace(last, loop=loop)
    if batch is not None:
        last = dataclasses.replace(last, batch=batch)
    changed[stages[-1]] = last
    return dataclasses.replace(preset, stages=changed)


def _check_same_run(file: Path, settings: dict) -> None:
    """Resumed with other data, a run would be neither the old one nor a new one."""
    before = json.loads(file.read_text()) if file.is_file() else settings
    for key in ("model", "seed", "start", "pool"):
        if before[key] != settings[key]:
            raise SystemExit(
                f"{file.parent} was begun with {key} {before[key]}, not {settings[key]}; "
                f"resume it with that, or name another --out"
            )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="accel.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(STAGES))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--out", type=Path, help="default: out/NAME")
    parser.add_argument("--steps", type=int, help="of the last stage")
    parser.add_argument("--minutes", type=float, help="of the last stage")
    parser.add_argument("--batch", type=int, help="of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--start", choices=("scratch", "shipped"), default="scratch")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, then writes the model to OUT/shipped."""
    args = parse(argv)
    args.out = args.out or Path("out") / args.name
    stages = STAGES[args.name]
    preset = _limited(PRESETS[args.preset], stages, args.steps, args.minutes, args.batch)
    if not args.resume and any(newest_checkpoint(args.out / stage) for stage in stages):
        raise SystemExit(f"{args.out} holds a training already; add --resume or name another")
    run = Training(args.name, preset, args.out, seed=args.seed)
    run.resume = args.resume
    run.shipped = zoo.path(args.name) if args.start == "shipped" else None
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
    (args.out / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    {"digits-dit": train_dit, "digits-judge": train_judge}[args.name](run)
    ship(args.name, args.out, args.out / "shipped")


if __name__ == "__main__":
    main()
