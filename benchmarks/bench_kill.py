"""Kill a render at random moments, resume it, and check that nothing was lost or done twice.

    python -m benchmarks.bench_kill [--kills 25] [--workers 1,2]

Writes benchmarks/results/kill.json: kills tried and survived, and the moments they hit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOBS = 8
STEPS = 12


@dataclass
class Trial:
    """One folder, killed several times. `problems` is empty when it survived them all."""

    kills: int = 0
    moments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_model(folder: Path) -> Path:
    """A tiny random DiT pipeline as a stock folder."""
    from accel.tiny import tiny

    tiny("dit").pipe.save_pretrained(str(folder))
    return folder


def write_jobs(path: Path) -> Path:
    rows = [
        {
            "name": f"job{i}",
            "seed": i,
            "inputs": {"class_labels": [i], "num_inference_steps": STEPS},
        }
        for i in range(JOBS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finish(jobs: Path, model: Path, out: Path) -> dict[str, str]:
    """Render to the end undisturbed, in this process; the SHA-256 of every job's frames."""
    from apps.render.driver import RunOptions, submit
    from apps.render.jobs import read_jobs
    from apps.render.plan import Settings, plan

    summary = submit(out, plan(read_jobs(jobs), Settings(model=str(model)), ROOT), RunOptions())
    if summary.exit_code != 0:
        raise RuntimeError(str(summary))
    return {path.stem: frames_of(path) for path in out.glob("*.json")}


def trial(
    jobs: Path,
    model: Path,
    out: Path,
    expected: dict[str, str],
    *,
    kills: int,
    workers: int,
    seed: int,
) -> Trial:
    """Start, kill, check and resume `kills` times, then finish and check that all is there."""
    chance = random.Random(seed)
    result = Trial()
    start = command(jobs, model, out, workers)
    for _ in range(kills):
        before = commit_times(out)
        moment = run_and_kill(start, chance)
        if moment is None:
            break  # it was done before the moment came
        result.kills += 1
        result.moments.append(moment)
        result.problems += check_killed(out, before)
        if (out / "plan.jsonl").exists():
            start = [sys.executable, "-m", "apps.cli", "resume", str(out), "--progress", "json"]
            start += ["--workers", str(workers)]
    before = commit_times(out)
    last = subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if last.returncode != 0:
        result.problems.append(f"exit code {last.returncode}: {last.stderr[-500:]}")
    result.problems += check_finished(out, expected, before)
    return result


def command(jobs: Path, model: Path, out: Path, workers: int) -> list[str]:
    options = ["--model", str(model), "--out", str(out), "--workers", str(workers)]
    options += ["--device", "cpu", "--progress", "json"]
    return [sys.executable, "-m", "apps.cli", "render", str(jobs), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_and_kill(start: list[str], chance: random.Random) -> str | None:
    """Kill -9 a renderer some milliseconds after a random event; what it said last.

    One kill in three aims at any event (mostly steps), one at the writing of latents, one at the
    writing of outputs and their entry in the ledger: files are where a kill can do harm.
    """
    aim = chance.choice(["", "denoise", "decode"])
    after = chance.randrange(JOBS if aim else JOBS * (STEPS + 4))
    delay = chance.random() * 0.03
    seen = "before the first event"
    with subprocess.Popen(
        start,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            seen = event["event"] + (f" {event['stage']}" if "stage" in event else "")
            after -= int(not aim or event.get("stage") == aim)
            if after < 0:
                break
        time.sleep(delay)
        if process.poll() is not None:
            return None
        os.kill(process.pid, signal.SIGKILL)
    return seen


def check_killed(out: Path, before: dict[str, int]) -> list[str]:
    """What is wrong right after a kill: partial files, a broken ledger, lost outputs."""
    from apps.render.ledger import integrity_problem

    time.sleep(0.5)  # orphaned workers notice within 0.2 s
    problems = list(damaged_files(out))
    if (out / "ledger.sqlite").exists() and (problem := integrity_problem(out / "ledger.sqlite")):
        problems.append(f"ledger: {problem}")
    now = commit_times(out)
    problems += [f"{name} was written again" for name in before if now.get(name) != before[name]]
    return problems


def check_finished(out: Path, expected: dict[str, str], before: dict[str, int]) -> list[str]:
    """What is wrong in a folder after the last resume."""
    from apps.render.ledger import Ledger

    problems = list(damaged_files(out))
    made = {path.stem: frames_of(path) for path in out.glob("*.json")}
    if made != expected:
        wrong = [name for name in expected if made.get(name) != expected[name]]
        problems.append(
            f"outputs missing or different: {wrong}, extra: {set(made) - set(expected)}"
        )
    if {path.stem for path in out.glob("*.png")} != set(expected):
        problems.append("pictures and jobs do not match one to one")
    now = commit_times(out)
    problems += [f"{name} was done twice" for name in before if now.get(name) != before[name]]
    left = [p.name for p in out.rglob("*") if p.name.endswith((".part", ".safetensors"))]
    problems += [f"left behind: {name}" for name in left]
    with Ledger.open(out / "ledger.sqlite") as ledger:
        counts = ledger.counts()
        if counts["done"] != len(expected) or sum(counts.values()) != len(expected):
            problems.append(f"ledger: {counts}")
    return problems


def damaged_files(out: Path) -> Iterator[str]:
    """Files under a final name that are not whole."""
    from PIL import Image

    for path in out.glob("*.png"):
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError) as error:
            yield f"{path.name} is partial: {error}"
    for path in [*out.glob("*.json"), *out.glob("plan.jsonl")]:
        try:
            for line in (
                path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            ):
                json.loads(line)
        except ValueError as error:
            yield f"{path.name} is partial: {error}"


def commit_times(out: Path) -> dict[str, int]:
    """When each job was committed (its sidecar written), in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}


def frames_of(sidecar: Path) -> str:
    return json.loads(sidecar.read_text())["files"][0]["frames_sha256"]


def study(kills: int, workers: list[int], seed: int) -> dict[str, Any]:
    """Trials of up to three kills each until `kills` were tried; the figures as JSON."""
    from accel.environment import environment as where_measured
    from accel.environment import load_average
    from accel.metrics.protocol import Protocol

    load = load_average()
    moments: Counter[str] = Counter()
    problems: list[str] = []
    tried = survived = 0
    with tempfile.TemporaryDirectory(prefix="accel-kill-") as scratch:
        folder = Path(scratch)
        model, jobs = write_model(folder / "model"), write_jobs(folder / "jobs.jsonl")
        expected = finish(jobs, model, folder / "reference")
        number = 0
        while tried < kills:
            count = workers[number % len(workers)]
            out = folder / f"out{number}"
            result = trial(jobs, model, out, expected, kills=3, workers=count, seed=seed + number)
            tried += result.kills
            survived += 0 if result.problems else result.kills
            moments.update(result.moments)
            problems += result.problems
            number += 1
    protocol = Protocol(
        model="tiny random DiT",
        inputs={"jobs": JOBS},
        samples=JOBS,
        seeds="that of job i is i",
        steps=STEPS,
        more={"kills": kills, "workers": workers, "moments_seed": seed},
    )
    return {
        "environment": where_measured("cpu", load),
        "protocol": protocol.as_json(),
        "what": "kill -9 of `accel render` at random moments, then resume",
        "tried": tried,
        "survived": survived,
        "renders": number,
        "jobs_per_render": JOBS,
        "workers": workers,
        "last_event_before_kill": dict(sorted(moments.items())),
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from benchmarks.results_file import write

    figures = study(given.kills, [int(n) for n in given.workers.split(",")], given.seed)
    write("kill", "cpu", figures)
    print(json.dumps(figures, indent=2))
    sys.exit(0 if figures["survived"] == figures["tried"] else 1)


if __name__ == "__main__":
    main()
