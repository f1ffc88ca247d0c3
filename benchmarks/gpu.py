"""What is to be run on a card that is paid by the minute, in one go and in order of worth.

    python -m benchmarks.gpu --out OUT [--seconds 330] tests train tune
    python -m benchmarks.gpu --out OUT [--seconds 400] bench

`tests`: kernels against float64, while every tile that will be timed compiles. `train`: the small
models and students that a CPU is too slow for, in the background; they are held while something is
timed. `tune`: tiles of the kernels. `bench`: studies at the sizes of public models first. Each part
has a limit; when the time is up the rest is left out, and says so. OUT gets a log of each part,
`results.tgz` (what studies wrote) and an archive for each training. On a machine without the
project's environment: any Python that has its dependencies. `make gpu` measures all, for hours.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
KINDS = ("tests", "train", "tune", "bench")
STARTING, ENDING = 25, 25  # seconds: until a training's first step, and to pack all at the end
LEAST = 5  # seconds that are worth beginning a part
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"
}  # fmt: skip
STATE = ("optimizer", "random_states", "model.safetensors", "scheduler")  # of checkpoints


@dataclass(frozen=True)
class Part:
    """A module with its arguments, for at most so many seconds."""

    command: str
    seconds: float

    @property
    def name(self) -> str:
        return self.command.replace("benchmarks.", "").replace("--", "").replace(" ", "_")[:60]


WARM = [
    *(Part(f"benchmarks.tune_sparse --head {h} --keys {k}", 120) for h in (128, 64)
      for k in (64, 128)),
    Part("benchmarks.tune_quant", 120),
]  # fmt: skip
TESTS = [
    Part(
        "pytest -q -n 4 -p no:cacheprovider -k 'not compile' tests/sparse_attn/kernels "
        "tests/quant/test_gpu_kernels.py tests/accel/zoo/test_ddpm.py", 150,
    ),
    *WARM,
]  # fmt: skip
TUNE = [
    Part("benchmarks.tune_sparse --head 128", 45),
    Part("benchmarks.tune_quant", 45),
    Part("benchmarks.tune_sparse --head 64", 45),
]
BENCH = [
    Part("benchmarks.bench_sparse --device cuda --rounds 5", 150),
    Part("benchmarks.bench_quant_kernels --device cuda --only flux --rounds 5", 90),
    Part("benchmarks.bench_cache_speed --device cuda --rounds 3 --only DiT --compile none", 45),
    Part("benchmarks.bench_quant_kernels --device cuda --only layers --rounds 5", 80),
    Part("benchmarks.bench_overhead --device cuda --rounds 15", 25),
    Part("benchmarks.bench_temporal_cache --device cuda --parts times --rounds 7", 35),
    Part("benchmarks.bench_cache_speed --device cuda --rounds 3 --only Wan --compile none", 110),
    Part("benchmarks.bench_quant_kernels --device cuda --only wan --rounds 3", 70),
    Part("benchmarks.bench_cache_speed --device cuda --rounds 3 --only DiT", 110),
    Part("benchmarks.bench_native --device cuda --samples 40 --rounds 3 --only Taylor", 60),
    Part("benchmarks.bench_backend --device cuda --samples 20 --rounds 2", 60),
]
TRAIN = {  # without --minutes and --out
    "digits-ddpm": "accel.zoo.train digits-ddpm --preset gpu --start shipped",
    "digits-wan-4-steps-sparse": "benchmarks.distil digits-wan-4-steps-sparse --device cuda "
    "--batch 32",
    "digits-wan-4-steps": "benchmarks.distil digits-wan-4-steps --device cuda --batch 32 --compile",
}


class Running:
    """A command in a session of its own, so that all that it starts is held or ended with it."""

    def __init__(self, command: str, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *shlex.split(command)],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self, seconds: float) -> int | None:
        """Its exit status, or None where it had to be ended."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            for number in (signal.SIGCONT, signal.SIGTERM):
                self.signal(number)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()
            return None


class Session:
    """What runs until `seconds` have passed, with its logs below `out`."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.began, self.seconds = out, time.monotonic(), seconds
        self.trainings: dict[str, Running] = {}
        (out / "log").mkdir(parents=True, exist_ok=True)
        known = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(PROJECT)]
        if not list(distributions(name="accel")):
            known.append(str(registered(out / "site")))
        self.environment = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(known)}

    def left(self) -> float:
        return self.began + self.seconds - ENDING - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def start(self, command: str, name: str) -> Running:
        return Running(command, self.out / "log" / f"{name}.txt", self.environment)

    def train(self, trainings: dict[str, str]) -> None:
        minutes = max(0.05, (self.left() - STARTING) / 60)
        for name, command in trainings.items():
            folder = self.out / "trained" / name
            asked = f"{command} --minutes {minutes:.2f} --out {folder}"
            self.trainings[name] = self.start(asked, name)

    def together(self, parts: Iterable[Part]) -> None:
        """At once; nothing is timed."""
        begun = [(part, self.start(part.command, part.name)) for part in parts]
        now = time.monotonic()
        for part, running in begun:
            limit = min(part.seconds - (time.monotonic() - now), self.left())
            self._tell(part, running, running.end(limit))

    def alone(self, parts: Iterable[Part]) -> None:
        """One by one, with the trainings held."""
        for training in self.trainings.values():
            training.signal(signal.SIGSTOP)
        for part in parts:
            if self.left() < LEAST:
                self.say(f"no time for {part.command}")
                continue
            running = self.start(part.command, part.name)
            self._tell(part, running, running.end(min(part.seconds, self.left())))
        for training in self.trainings.values():
            training.signal(signal.SIGCONT)

    def finish(self) -> None:
        """Waits for the trainings as long as there is time, and packs."""
        for name, training in self.trainings.items():
            self._tell(Part(name, 0), training, training.end(self.left()))
            folder = self.out / "trained" / name
            if folder.is_dir():
                pack(self.out / f"{name}.tgz", [folder], self.out / "trained")
        pack(self.out / "results.tgz", sorted(RESULTS.glob("*_cuda.json")), RESULTS)
        pack(self.out / "log.tgz", [self.out / "log"], self.out)
        self.say("packed")

    def _tell(self, part: Part, running: Running, status: int | None) -> None:
        self.say(f"{part.command}: {'out of time' if status is None else f'status {status}'}")
        lines = running.log.read_text("utf-8", "replace").splitlines()
        print("\n".join(f"    {line[:150]}" for line in lines[-40:]), flush=True)


def registered(site: Path) -> Path:
    """A folder by which recipes find the methods of a project that is not installed."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    folder = site / f"accel-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    head = f"Metadata-Version: 2.1\nName: accel\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(head)
    methods = [f"{n} = {m}\n" for n, m in project["entry-points"]["accel.methods"].items()]
    (folder / "entry_points.txt").write_text("".join(["[accel.methods]\n", *methods]))
    return site


def pack(file: Path, paths: Iterable[Path], root: Path) -> None:
    """Without what only going on with a training needs."""

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(info.name).name.startswith(STATE) else info

    with tarfile.open(file, "w:gz") as archive:
        for path in paths:
            archive.add(path, str(path.relative_to(root)), filter=wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    given = parser.parse_args()
    session = Session(given.out, given.seconds)
    if "train" in given.what:
        session.train(TRAIN)
    if "tests" in given.what:
        session.together(TESTS)
    if "tune" in given.what:
        session.alone(TUNE)
    if "bench" in given.what:
        session.alone(BENCH)
    session.finish()


if __name__ == "__main__":
    main()
