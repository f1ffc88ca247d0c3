"""Searches killed with SIGKILL at random moments and resumed: same winner, nothing paid twice."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.particles import Particles
from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.zero_order import ZeroOrder

JUDGE, SEED, KILLS = "digits-judge", 0, 10


class _Noted(DigitsJudge):
    """Notes every sample it scores in a file, so that work done before a kill is seen."""

    def score(self, samples: np.ndarray, prompts: Any) -> np.ndarray:
        with open(_NOTES, "a") as file:
            file.write("x" * len(samples))
        return super().score(samples, prompts)


_NOTES = ""


def kill_test(pipe: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Searches in child processes, killed at random moments and resumed until they end."""
    global _NOTES
    rng, rows = random.Random(5), []
    searches: dict[str, Any] = {"zero-order": ZeroOrder(4, 0.8), "particles": Particles(4)}
    for name, search in searches.items():
        with tempfile.TemporaryDirectory() as scratch:
            whole, seconds = Path(scratch) / "whole", time.perf_counter()
            _NOTES = str(Path(scratch) / "notes")
            expected = _in_child(pipe, calls, search, whole, Path(scratch) / "expected", None)
            seconds = time.perf_counter() - seconds
            scored = os.path.getsize(_NOTES)
            for attempt in range(KILLS // len(searches)):
                _NOTES = str(Path(scratch) / f"notes{attempt}")
                folder, out = Path(scratch) / str(attempt), Path(scratch) / f"out{attempt}"
                moments = []
                delay = rng.uniform(0.05, 0.95) * seconds
                if _in_child(pipe, calls, search, folder, out, delay) is None:
                    moments.append(round(delay / seconds, 3))
                found = _in_child(pipe, calls, search, folder, out, None)
                twice = os.path.getsize(_NOTES) - scored
                rows.append(
                    {"search": name, "killed_at": moments, "same": found == expected,
                     "scored_twice": twice}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return {
        "tried": len(rows),
        "killed": sum(bool(r["killed_at"]) for r in rows),
        "same": sum(r["same"] for r in rows),
        "batch": 4,
        "most_scored_twice": max(r["scored_twice"] for r in rows),
        "rows": rows,
    }


def _in_child(
    pipe: Any,
    calls: list[dict[str, Any]],
    search: Any,
    journal: Path,
    out: Path,
    delay: float | None,
) -> str | None:
    """The winner and its costs as found by a forked process; ``None`` if it was killed."""
    out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        settings = SearchSettings(seed=SEED, batch=4, journal=str(journal))
        found = search.run(pipe, calls[:2], _Noted(JUDGE), Budget(renders=7.4), settings=settings)
        rows = []
        for w in found.winners:
            costs = {k: c.evaluations for k, c in w.ledger.by_purpose.items()}
            frames = w.frames.tobytes().hex() if w.frames is not None else ""
            rows.append([str(w.path), w.best.scores, w.delivered, sorted(costs.items()), frames])
        out.write_text(repr(rows))
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return out.read_text() if out.is_file() else None
