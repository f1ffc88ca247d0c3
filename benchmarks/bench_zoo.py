"""Measures embedded models and writes their cards: `python -m benchmarks.bench_zoo [NAME ...]`.

Results go to `benchmarks/results/zoo_NAME.json`; the card and its pictures go into the model's own
folder. `--card` only writes cards again from the JSON. Every figure in a card comes from there, and
samples are read by the referee, which nothing is trained, calibrated or searched with.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel import zoo
from accel.clock import denoiser_modules
from accel.files import write_atomically
from accel.measure import environment
from accel.metrics import judged, memorised
from accel.metrics.distribution import frechet, kid
from accel.metrics.protocol import Protocol, file_sha256
from accel.metrics.statistics import share
from accel.metrics.video import flicker, motion, still_border
from accel.zoo.judge import AttributeJudge, accuracy, judge
from accel.zoo.world import COLOURS, DIGITS, Attributes, DigitWorld
from benchmarks import results_file, zoo_pictures
from benchmarks.digits_study import weights_sha256
from benchmarks.zoo_card import JUDGES, REFEREE, card
from benchmarks.zoo_subjects import SUBJECTS, Subject

STEPS = (50, 20, 10)  # the first one is the ordinary number
SEED = 1  # of the samples whose accuracy is measured; sheets have SEED + 1
LEAKED = 100  # samples per background or shift of the noise
UNASKED = 300
NEIGHBOUR_DRAWS = 1000
NEIGHBOURS_COMPARED = 50


class Study:
    """One pipeline under measurement: draws each set of samples once.

    keep: folder for what was drawn, by weights, batch by batch: a study that was cut off goes on,
    and two processes, one of them `backwards`, share the work. Without it nothing is kept.
    """

    def __init__(
        self,
        subject: Subject,
        samples: int | None,
        keep: Path | None = None,
        backwards: bool = False,
    ):
        self.subject, self.count = subject, samples or subject.samples
        self.backwards = backwards
        self.keep = keep and keep / f"{subject.name}-{weights_sha256(zoo.path(subject.name))[:12]}"
        self.also = {
            name: Study(replace(subject, pipeline=name, also=()), samples, keep, backwards)
            for name in subject.also
        }
        self.pipe, self.referee = subject.load(), judge(REFEREE)
        self.real, self.what = subject.real(self.count, SEED)
        self._samples: dict[tuple[float, int], np.ndarray] = {}

    @property
    def guidance(self) -> float:
        """The ordinary one."""
        return self.subject.guidances[0]

    def samples(self, guidance: float, steps: int) -> np.ndarray:
        """Samples asked for the attributes of the real ones."""
        key = (guidance, steps)
        if key not in self._samples:
            began = time.monotonic()
            parts = self.subject.parts(self.count)
            drawn = [self._part(rows, *key) for rows in (parts[::-1] if self.backwards else parts)]
            self._samples[key] = np.concatenate(drawn[::-1] if self.backwards else drawn)
            print(f"{self.subject.name} {key}: {time.monotonic() - began:.0f} s", flush=True)
        return self._samples[key]

    def others(self) -> dict[str, np.ndarray]:
        """Samples of the subject's other pipelines, as ordinary as its own."""
        return {name: s.samples(self.guidance, STEPS[0]) for name, s in self.also.items()}

    def _part(self, rows: np.ndarray, guidance: float, steps: int) -> np.ndarray:
        how = f"{type(self.pipe).__name__} guidance {guidance:g} steps {steps} seed {SEED}"
        name = f"{how} rows {rows[0]} to {rows[-1]}.npy"
        file = self.keep / name if self.keep else None
        if file and file.is_file():
            return np.load(file)
        part = self.subject.part(self.pipe, self.what, rows, guidance, steps, SEED)
        if file:
            content = io.BytesIO()
            np.save(content, part)
            write_atomically(file, content.getvalue())
        return part

    def protocol(self) -> dict[str, Any]:
        """How the samples were made and read."""
        return Protocol(
            model=self.subject.name,
            inputs="attributes in an order that covers all combinations evenly",
            samples=self.count,
            seeds=f"{SEED} x 1000003 + index, one generator a sample",
            steps=STEPS,
            guidance=self.subject.guidances,
            scheduler=type(self.pipe.scheduler).__name__,
            features=REFEREE,
            features_sha256=file_sha256(zoo.path(REFEREE) / "model.safetensors"),
            size=self.real.shape[1:-1],
            resize=None,
            quantise="rounded to 8 bits",
            more={"also": self.subject.also} if self.subject.also else {},
        ).as_json()


def read(study: Study, samples: np.ndarray, reader: AttributeJudge) -> dict[str, np.ndarray]:
    """Which samples show what was asked for: (n,) bool per attribute, and "all"."""
    answer = reader.video_answers if study.subject.is_video else reader.answers
    asked = {name: getattr(study.what, name) for name in study.subject.asked}
    return judged.right(answer(samples), asked)


# -- the parts of a result -------------------------------------------------------------------


def measure_accuracy(study: Study) -> dict[str, Any]:
    """Share of samples that show what was asked for, per guidance, attribute and judge."""
    tables = {}
    for guidance in study.subject.guidances:
        samples = study.samples(guidance, STEPS[0])
        tables[str(guidance)] = {
            name: {k: share(v).as_json() for k, v in read(study, samples, judge(name)).items()}
            for name in JUDGES
        }
    samples = study.samples(study.guidance, STEPS[0])
    right = read(study, samples, study.referee)["all"]
    return {
        "guidance": tables,
        "by_digit": _by(right, study.what.digit, DIGITS),
        "by_colour": _by(right, study.what.colour, COLOURS),
    }


def _by(right: np.ndarray, index: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    return {name: float(right[index == i].mean()) for i, name in enumerate(names)}


def measure_digit_like(study: Study) -> dict[str, Any]:
    """Share of samples that either judge takes for a digit with confidence above 0.9."""
    sets = {"samples": study.samples(study.guidance, STEPS[0])}
    sets |= {f"samples, {name}": samples for name, samples in study.others().items()}
    sets |= {"real": study.real, **impostors(study.real, study.what)}
    return {
        name: {k: share(judge(name).digit_like(v)).as_json() for k, v in sets.items()}
        for name in JUDGES
    }


def impostors(real: np.ndarray, what: Attributes) -> dict[str, np.ndarray]:
    """What is no digit: noise, and blends and halves of two pictures with different digits."""
    rng = np.random.default_rng(SEED)
    other = np.array([rng.choice(np.flatnonzero(what.digit != digit)) for digit in what.digit])
    blend = (real.astype(np.uint16) + real[other]) // 2
    halves = real.copy()
    halves[:, real.shape[1] // 2 :] = real[other][:, real.shape[1] // 2 :]
    noise = np.clip(rng.normal(127.5, 60, real.shape), 0, 255)
    return {
        "blends": blend.astype(np.uint8),
        "halves": halves,
        "noise": noise.astype(np.uint8),
    }


def measure_distances(study: Study) -> dict[str, Any]:
    """Frechet and kernel distance to held-out real samples, equal counts, the referee's features.

    The floor is what a perfect generator would reach: real samples of the training scans, and
    another draw of the held-out scans.
    """
    real = study.referee.features_of(study.real)
    train = study.referee.features_of(study.subject.real(study.count, SEED + 1, "train")[0])
    again = study.referee.features_of(study.subject.real(study.count, SEED + 2)[0])
    sets = {"real, training scans": train, "real, held-out again": again}
    for steps in STEPS:
        sets[f"{steps} steps"] = study.referee.features_of(study.samples(study.guidance, steps))
    for name, samples in study.others().items():
        sets[f"{STEPS[0]} steps, {name}"] = study.referee.features_of(samples)
    return {
        name: {"frechet": frechet(real, other), "kid": kid(real, other, subsets=None).mean}
        for name, other in sets.items()
    }


def measure_movement(study: Study) -> dict[str, Any]:
    """Are videos frozen, do they flicker where real ones stand still?"""
    samples = study.samples(study.guidance, STEPS[0])
    sets = {"samples": samples, "real": study.real}
    videos = {k: torch.from_numpy(v).permute(0, 1, 4, 2, 3).float() / 255 for k, v in sets.items()}
    border = still_border(*samples.shape[2:4], 4)
    return {
        name: {
            "flicker": float(flicker(v, border).mean()),
            "motion": float(motion(v).mean()),
            "least motion": float(motion(v).min()),
        }
        for name, v in videos.items()
    }


def measure_brightness(study: Study) -> dict[str, Any]:
    """The known flaw of a schedule without zero terminal SNR: see `accel.zoo.sd`."""
    from accel.zoo import sd  # imports all of transformers' CLIP

    options = {"guidance_scale": study.guidance, "num_inference_steps": STEPS[0]}
    prompts = [""] * LEAKED
    leaked = sd.leaked_levels(study.pipe, prompts, (-2.0, 0.0, 2.0), **options)
    return {
        "asked": sd.asked_levels(study.pipe, LEAKED, **options),
        "unasked": sd.unasked_shares(study.pipe, UNASKED, **options),
        "leaked": {f"{shift:+g}": float(levels.mean()) for shift, levels in leaked.items()},
        "samples": LEAKED,
        "unasked_samples": UNASKED,
    }


def measure_cost(study: Study) -> dict[str, Any]:
    """Milliseconds of one evaluation of the denoiser, by number of threads: median and best."""
    return {str(n): evaluation_ms(study.pipe, study.subject, n) for n in (1, 2)}


def evaluation_ms(pipe: Any, subject: Subject, threads: int) -> dict[str, float]:
    """Of the second call of a run of three steps at batch 16; for a video, its guidance pair."""
    rows = 1 if subject.is_video else 16
    if subject.asked and not subject.is_video:
        rows //= 2  # guidance doubles them
    call = _denoiser_call(pipe, subject, rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = []
    with torch.inference_mode():
        for _ in range(12 if subject.is_video else 210):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    times = times[2:]
    return {"median": 1e3 * statistics.median(times), "best": 1e3 * min(times)}


def _denoiser_call(pipe: Any, subject: Subject, rows: int) -> Callable[[], Any]:
    """The calls of the denoiser in one step of a real run, to be repeated."""
    seen: list[tuple[Any, tuple, dict]] = []
    _, denoiser = denoiser_modules(pipe)[0]
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
    )
    _, what = subject.real(rows, 0)
    subject.generate(pipe, what, 4.0, 1, 0)
    hook.remove()
    return lambda: [module(*args, **kwargs) for module, args, kwargs in seen]


# -- nearest neighbours ----------------------------------------------------------------------


def strokes(images: np.ndarray) -> np.ndarray:
    """How coloured each pixel is, (n, h w) in 0..1: the digit without its grey background."""
    values = images.astype(np.float32)
    chroma = (values.max(-1) - values.min(-1)).reshape(len(images), -1)
    return chroma / np.maximum(chroma.max(1, keepdims=True), 1)


def stills(samples: np.ndarray, size: int = 32) -> np.ndarray:
    """Pictures as they are; of a video, the middle frame's window round the digit."""
    if samples.ndim == 4:
        return samples
    middle = samples[:, samples.shape[1] // 2]
    ink = strokes(middle).reshape(middle.shape[:3]) > 0.5
    windows = []
    for frame, mask in zip(middle, ink, strict=True):
        at = np.argwhere(mask).mean(0) if mask.any() else np.array(mask.shape) / 2
        y, x = np.clip(at - size // 2, 0, np.array(mask.shape) - size).round().astype(int)
        windows.append(frame[y : y + size, x : x + size])
    return np.stack(windows)


def nearest(images: np.ndarray, class_ids: np.ndarray, count: int, *, plain: bool):
    """Nearest training pictures by strokes: (n, count, 32, 32, 3) and distances (n, count)."""
    world = DigitWorld("train", seed=1, plain=plain)
    found, distances = [], []
    for picture, class_id in zip(images, class_ids, strict=True):
        draws = np.full(NEIGHBOUR_DRAWS, class_id)
        pool, _ = world.batch(np.arange(NEIGHBOUR_DRAWS), class_ids=draws)
        near = memorised.nearest(strokes(picture[None]), strokes(pool), count)
        found.append(pool[near.index[0]])
        distances.append(near.distance[0] / pool[0, :, :, 0].size ** 0.5)  # root mean square
    return np.stack(found), np.stack(distances)


def measure_neighbours(study: Study) -> dict[str, Any]:
    """Median distance to the nearest training picture: samples, held-out and training pictures."""
    samples = study.samples(study.guidance, STEPS[0])[:NEIGHBOURS_COMPARED]
    sets = {
        "samples": stills(samples),
        "heldout": stills(study.real[:NEIGHBOURS_COMPARED]),
        "train": stills(study.subject.real(NEIGHBOURS_COMPARED, SEED + 3, "train")[0]),
    }
    medians = {}
    for name, pictures in sets.items():
        answers = judge("digits-judge").answers(pictures)
        class_ids = answers["digit"] + 10 * answers["colour"]
        near, distance = nearest(pictures, class_ids, 4, plain=study.subject.plain)
        medians[name] = float(np.median(distance[:, 0]))
        if name == "samples":
            labels = [f"{COLOURS[c // 10]} {DIGITS[c % 10]}" for c in class_ids[:10]]
            path = zoo.path(study.subject.name) / "neighbours.png"
            zoo_pictures.draw_neighbours(pictures[:10], near[:10], labels, path)
    return {
        "draws": NEIGHBOUR_DRAWS,
        "compared": NEIGHBOURS_COMPARED,
        "median_distance": medians,
    }


def draw_sheet(study: Study) -> None:
    """Samples beside real ones that were asked for the same."""
    samples = study.samples(study.guidance, STEPS[0])
    path = zoo.path(study.subject.name) / "samples.png"
    if study.subject.is_video:
        captions = study.what.captions()[:12]
        zoo_pictures.draw_videos(samples[:12], study.real[:12], captions, path)
    else:
        title = f"{study.subject.name} samples"
        zoo_pictures.draw_pictures(samples[:100], study.real[:100], title, path)


# -- whole results ---------------------------------------------------------------------------


def measure_pipeline(study: Study) -> dict[str, Any]:
    """Everything the card of a pipeline quotes; draws the pictures on the way."""
    subject = study.subject
    parts: dict[str, Any] = {}
    if subject.asked:
        parts["accuracy"] = measure_accuracy(study)
    else:
        parts["digit_like"] = measure_digit_like(study)
    if subject.is_video:
        parts["movement"] = measure_movement(study)
    if subject.name == "digits-sd":
        parts["brightness"] = measure_brightness(study)
    parts["distances"] = measure_distances(study)
    parts["neighbours"] = measure_neighbours(study)
    draw_sheet(study)
    return {
        "model": subject.name,
        "environment": environment(),
        "protocol": study.protocol(),
        "evaluation_ms": measure_cost(study),
        **parts,
        **about(subject, study.pipe),
    }


def about(subject: Subject, pipe: Any) -> dict[str, Any]:
    """Size, schedule and training record, as they are in the shipped folder."""
    folder = zoo.path(subject.name)
    modules = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    scheduler = pipe.scheduler.config
    return {
        "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
        "parameters": {
            name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
        },
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "beta_schedule": scheduler.get("beta_schedule"),
            "prediction_type": scheduler.get("prediction_type"),
        },
        "training": training(subject.name),
    }


@cache
def real_for_judges() -> tuple[np.ndarray, Attributes]:
    """Held-out pictures that judges are tried on."""
    return DigitWorld("heldout").batch(np.arange(3000))


def measure_judge(name: str) -> dict[str, Any]:
    """Everything the card of a judge quotes."""
    reader, (real, what) = judge(name), real_for_judges()
    sets = {"real": real, **impostors(real, what)}
    videos = DigitWorld("heldout", canvas=64)
    return {
        "model": name,
        "environment": environment(),
        "protocol": Protocol(
            model=name, inputs="heldout", samples=len(real), seeds=0, more={"videos": 1000}
        ).as_json(),
        "pictures": accuracy(reader, DigitWorld("heldout"), len(real)),
        "videos": accuracy(reader, videos, 1000, videos=True),
        "digit_like": {k: share(reader.digit_like(v)).as_json() for k, v in sets.items()},
        "bytes": (zoo.path(name) / "model.safetensors").stat().st_size,
        "parameters": sum(p.numel() for p in reader.parameters()),
        "training": training(name),
    }


def training(name: str) -> dict[str, Any]:
    """The record beside the weights; draws its loss curves."""
    folder = zoo.path(name)
    record = json.loads((folder / "training.json").read_text())
    zoo_pictures.draw_curves(record["stages"], folder / "loss.png")
    return record


def _measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    if name in JUDGES:
        return measure_judge(name)
    return measure_pipeline(Study(SUBJECTS[name], args.samples, args.keep))


def _draw(name: str, args: argparse.Namespace) -> None:
    if name not in JUDGES:
        study = Study(SUBJECTS[name], args.samples, args.keep, backwards=True)
        for guidance in study.subject.guidances:
            study.samples(guidance, STEPS[0])
        for steps in STEPS[1:]:
            study.samples(study.guidance, steps)
        study.others()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*JUDGES, *SUBJECTS))}; or all")
    parser.add_argument("--samples", type=int, help="instead of the model's own number")
    parser.add_argument("--keep", type=Path, help="folder for the samples, to go on from")
    parser.add_argument(
        "--draw",
        action="store_true",
        help="only draw, from the last sample to the first, beside another process that measures "
        "with the same --keep",
    )
    parser.add_argument("--card", action="store_true", help="only write the cards again")
    parser.add_argument("--timing", action="store_true", help="only time again: on a quiet machine")
    args = parser.parse_args()
    if args.draw and not args.keep:
        parser.error("--draw: goes with --keep")
    for name in args.names or [n for n in (*JUDGES, *SUBJECTS) if n in zoo.names()]:
        kept = results_file.read(f"zoo_{name}")
        if args.draw:
            _draw(name, args)
            continue
        if (args.card or args.timing) and kept is None:
            raise SystemExit(f"no results of {name}; measure everything first")
        if args.timing and name in SUBJECTS:
            kept["evaluation_ms"] = {
                str(n): evaluation_ms(SUBJECTS[name].load(), SUBJECTS[name], n) for n in (1, 2)
            }
        elif not args.card:
            kept = _measured(name, args)
        if not args.card:
            results_file.write(f"zoo_{name}", "cpu", kept)
        (zoo.path(name) / "README.md").write_text(card(kept))


if __name__ == "__main__":
    main()
