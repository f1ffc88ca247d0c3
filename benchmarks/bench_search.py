"""Noise search on ``zoo:digits-sd``: every algorithm against random search at equal cost.

    python -m benchmarks.bench_search [--prompts 64] [--keep FOLDER] [--kill] [--draw]

Prompts are chosen for headroom: of many captions those whose samples a pilot (other seeds) finds
worst, without guidance. The judge is searched; the referee, of another architecture and trained on
other scans, is not, and says whether the gain is real. Figures are nines of certainty,
-log10(1 - p) of what was asked; the order is the log-likelihood's, which saturates. Random search
is exact: the mean over all choices of n of 32 draws. Drafts are judged by the gain of best-of-8
that rendering the best of 8 drafts captures. ``--kill``: a search is killed with SIGKILL at random
moments and resumed. With ``--keep`` an interrupted study goes on. A picture goes to
``benchmarks/pictures/search.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import accel
from accel.artifact import inputs_digest
from accel.loading import zoo_path
from accel.measure import environment, load_average
from accel.method import Recipe, Search
from accel.metrics.protocol import Protocol, file_sha256
from accel.metrics.statistics import bootstrap, paired_test
from accel.settings import Settings
from accel.zoo.world import BACKGROUNDS, caption
from benchmarks.digits_study import SD, weights_sha256
from benchmarks.distil import RECIPES
from benchmarks.results_file import RESULTS, read, write
from benchmarks.search_picture import PICTURE, draw
from caches.interval import IntervalCache
from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.draft_commit import DraftCommit, compared
from samplers.search.evolution import Evolution
from samplers.search.particles import Particles
from samplers.search.paths import Paths
from samplers.search.random import Random
from samplers.search.result import Candidate, Winner
from samplers.search.rollover import Rollover
from samplers.search.session import PLAIN
from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.zero_order import ZeroOrder
from samplers.swap import SwapScheduler

JUDGE, REFEREE = "digits-judge", "digits-judge-b"
STEPS, GUIDANCE = 20, 1.0
POOL, LOOKED_AT, PILOT_SEEDS = 32, 160, 4
POINTS = (4, 8, 16)  # renders
MOST = 6.0  # nines: a float32 knows no more
SEED, PILOT = 0, 900_000
DRAFTED = 8  # draws of draft-and-commit, and of the best-of-N it is compared with
KILLS = 10
BEST_DRAFT = "output cache, every 4th"  # the one that is also given as much as best-of-8 takes


def algorithms() -> dict[str, tuple[Search, float]]:
    """What is run to 16 renders, and on what share of the prompts (all that scores costs)."""
    return {
        "zero-order, cosine 0.95": (ZeroOrder(4, 0.95), 1),
        "zero-order, cosine 0.8, of 4": (ZeroOrder(4, 0.8, starts=4), 1),
        "paths": (Paths(2, 3, start=0.4, up=0.25, down=0.4, rounds=None), 1),
        "particles": (Particles(4), 0.375),
        "control: stochastic steps alone": (Particles(4, strength=0.0), 0.375),
        "evolution": (Evolution((0.0, 0.4), (8, 4, 4), elites=2), 0.25),
        "rollover": (Rollover(8, 12, together=12), 0.1875),
    }


def drafts() -> dict[str, Recipe]:
    """Recipes that make drafts."""
    return {
        "student, 4 steps": accel.read_recipe(RECIPES / "digits-sd-4-steps.yaml").recipe,
        "output cache, every 4th": Recipe((IntervalCache(4, 1, 1, "output", 1),)),
        "output cache, every 6th": Recipe((IntervalCache(6, 1, 1, "output", 1),)),
        "control: DDIM, 3 steps": Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=3),)),
    }


# -- prompts ---------------------------------------------------------------------------------


def call_of(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def hard_prompts(pipe: Any, count: int) -> list[str]:
    """Of captions that go round the world those with the lowest mean score over a few seeds."""
    said = [
        caption(i * 37 % 10, i * 37 % 100 // 10, i % len(BACKGROUNDS)) for i in range(LOOKED_AT)
    ]
    said = list(dict.fromkeys(said))
    scores = []
    for start in range(0, len(said), 8):
        some = [p for p in said[start : start + 8] for _ in range(PILOT_SEEDS)]
        generators = [
            torch.Generator().manual_seed(PILOT + start * PILOT_SEEDS + i) for i in range(len(some))
        ]
        arguments = {**call_of(""), "prompt": some, "generator": generators, "output_type": "np"}
        frames = (pipe(**arguments).images * 255).round().astype(np.uint8)
        scores += DigitsJudge(JUDGE).score(frames, some).reshape(-1, PILOT_SEEDS).mean(1).tolist()
    order = np.argsort(scores, kind="stable")[:count]
    return [said[i] for i in sorted(order)]


# -- figures ---------------------------------------------------------------------------------


def nines(log_p: float) -> float:
    """-log10(1 - p), at most MOST."""
    return min(MOST, -math.log10(max(-math.expm1(log_p), 10**-MOST)))


def figures_of(c: Candidate) -> tuple[float, float]:
    """Nines by judge and referee."""
    score, held = c.scores[JUDGE], c.held_out[REFEREE]
    assert score is not None
    assert held is not None
    return nines(score), nines(held)


def expected_best(pool: list[Candidate], count: float) -> np.ndarray:
    """Nines (judge, referee) of the best by the judge of ``count`` of the pool, exactly.

    Fractions of a draw lie on the line between whole ones.
    """
    if count % 1:
        low = math.floor(count)
        share = count - low
        return (1 - share) * expected_best(pool, low) + share * expected_best(pool, low + 1)
    n, k = len(pool), int(count)
    order = sorted(pool, key=lambda c: -(c.score if c.score is not None else -math.inf))
    chance = [math.comb(n - 1 - j, k - 1) / math.comb(n, k) for j in range(n)]
    return np.array(chance) @ np.array([figures_of(c) for c in order])


def best_at(winner: Winner, evaluations: float) -> Candidate | None:
    """The best render known after so many evaluations."""
    known = [
        c
        for c in winner.candidates
        if c.purpose == "render" and c.evaluations <= evaluations and c.score is not None
    ]
    return max(known, key=lambda c: c.score or -math.inf, default=None)


def compared_row(own: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """(prompts, 2) nines of an algorithm and of random search at its cost."""
    row: dict[str, Any] = {"prompts": len(own)}
    for i, name in enumerate(("judge", "referee")):
        test = paired_test(own[:, i].tolist(), reference[:, i].tolist())
        row[name] = {
            "nines": bootstrap(own[:, i].tolist()).as_json(),
            "random": bootstrap(reference[:, i].tolist()).as_json(),
            "over_random": test.difference.as_json(),
            "p": test.as_json()["p"],
        }
    return row


# -- the study -------------------------------------------------------------------------------


class Bench:
    """A pipeline, its prompts, and the random pool that everything is compared with."""

    def __init__(self, count: int, folder: Path) -> None:
        torch.set_num_threads(1)
        self.pipe = accel.load(SD)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder = folder
        chosen = folder / f"prompts-{count}.json"
        if not chosen.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            chosen.write_text(json.dumps(hard_prompts(self.pipe, count)))
        self.prompts = json.loads(chosen.read_text())
        self.calls = [call_of(p) for p in self.prompts]
        self.pool = self.run("random", Random(), POOL)

    def run(
        self,
        name: str,
        search: Any,
        renders: float,
        recipe: Recipe = PLAIN,
        prompts: int | None = None,
    ) -> list[Winner]:
        journal = self.folder / "".join(c if c.isalnum() else "-" for c in name)
        settings = SearchSettings(seed=SEED, journal=str(journal), deliver=False)
        began, budget, calls = time.perf_counter(), Budget(renders=renders), self.calls[:prompts]
        judge = DigitsJudge(JUDGE)
        found = search.run(self.pipe, calls, judge, budget, recipe, settings=settings).winners
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return found

    @property
    def price(self) -> float:
        """Evaluations of a render."""
        return self.pool[0].ledger.spent().evaluations / POOL

    def reference(self, winners: list[int], counts: list[float]) -> np.ndarray:
        """Random search on these prompts with these numbers of draws."""
        pools = [self.pool[i].candidates for i in winners]
        return np.array([expected_best(p, n) for p, n in zip(pools, counts, strict=True)])

    def algorithm(self, name: str, search: Search, share: float) -> dict[str, Any]:
        """Rows at each point of cost, on the first ``share`` of the prompts."""
        count = max(1, round(share * len(self.calls)))
        winners, rows = self.run(name, search, max(POINTS), prompts=count), {}
        for renders in POINTS:
            best = [best_at(w, renders * self.price) for w in winners]
            here = [i for i, c in enumerate(best) if c is not None]
            if len(here) < len(winners):  # it has not finished anything for so little
                continue
            own = np.array([figures_of(c) for c in best if c is not None])
            rows[str(renders)] = compared_row(own, self.reference(here, [renders] * len(here)))
        spent = [w.ledger.spent() for w in winners]
        return {
            "search": search.to_json(),
            "at": rows,
            "verified_per_evaluation": round(
                sum(c.verified for c in spent) / 2 / sum(c.evaluations for c in spent), 4
            ),
            "decodes_per_evaluation": round(
                sum(c.decodes for c in spent) / sum(c.evaluations for c in spent), 4
            ),
        }

    def draft(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """One draft of best-of-8, and draft-and-commit for the cost of 8 renders."""
        once = self.run(f"8 drafts, {name}", DraftCommit(DRAFTED), 2 * DRAFTED, recipe)
        first = [w.candidates[:DRAFTED] for w in self.pool]
        made = [[c for c in w.candidates if c.purpose == "draft"] for w in once]
        assert all(
            [c.path[0] for c in a] == [c.path[0] for c in b]
            for a, b in zip(first, made, strict=True)
        )
        table = [np.array([[c.score for c in row] for row in part]) for part in (made, first)]
        drafted = sum(w.ledger.by_purpose["draft"].evaluations for w in once)
        price = drafted / (len(once) * DRAFTED * self.price)
        calibration = compared(table[0], table[1], price=price)
        more = None
        if name == BEST_DRAFT:
            more = self._at_own_cost(self.run(f"drafts to 8, {name}", DraftCommit(None), 8, recipe))
        return {
            "methods": [m.to_json() for m in recipe.methods],
            **calibration.as_json(),
            "at_own_cost": self._at_own_cost(once),
            "at_8": more,
        }

    def _at_own_cost(self, winners: list[Winner]) -> dict[str, Any]:
        """Against random search for what each took, commit included."""
        best = [best_at(w, math.inf) for w in winners]
        own = np.array([figures_of(c) for c in best if c is not None])
        counts = [w.ledger.spent().evaluations / self.price for w in winners]
        reference = self.reference(list(range(len(winners))), counts)
        return {"renders": float(np.mean(counts)), **compared_row(own, reference)}

    def head(self, load: float | None) -> dict[str, Any]:
        """The results without rows, and random search alone."""
        everyone = list(range(len(self.calls)))
        curve: dict[str, Any] = {}
        for n in (1, 2, *POINTS, POOL):
            nines_of = self.reference(everyone, [n] * len(everyone))
            names = enumerate(("judge", "referee"))
            curve[str(n)] = {k: bootstrap(nines_of[:, i].tolist()).as_json() for i, k in names}
        return {
            "environment": environment("cpu", load),
            "protocol": self.protocol().as_json(),
            "model": SD,
            "prompts": len(self.calls),
            "price": self.price,
            "random": curve,
            "algorithms": {},
            "drafts": {},
            "kills": {},
        }

    def protocol(self) -> Protocol:
        return Protocol(
            model={"name": SD, "weights_sha256": weights_sha256(zoo_path(SD))},
            inputs={"sha256": inputs_digest(self.calls), "prompts": self.prompts},
            samples=len(self.calls),
            seeds=f"search seed {SEED}; pilot from {PILOT}",
            steps=STEPS,
            guidance=GUIDANCE,
            scheduler=type(self.pipe.scheduler).__name__,
            features=JUDGE,
            features_sha256=file_sha256(zoo_path(f"zoo:{JUDGE}") / "model.safetensors"),
            quantise="round(255 x)",
            more={
                "referee_sha256": file_sha256(zoo_path(f"zoo:{REFEREE}") / "model.safetensors"),
                "pool": POOL,
                "looked_at": LOOKED_AT,
            },
        )


def without_folders(row: dict[str, Any]) -> dict[str, Any]:
    """Artifacts by their files' names."""
    for method in row["methods"]:
        artifact = method["settings"].get("artifact")
        if artifact:
            artifact["path"] = Path(artifact["path"]).name
    return row


# -- kills -----------------------------------------------------------------------------------


class _Noted(DigitsJudge):
    """Notes every sample it scores in a file, so that work done before a kill is seen."""

    def score(self, samples: np.ndarray, prompts: Any) -> np.ndarray:
        with open(_NOTES, "a") as file:
            file.write("x" * len(samples))
        return super().score(samples, prompts)


_NOTES = ""


def kill_test(bench: Bench) -> dict[str, Any]:
    """Searches in child processes, killed at random moments and resumed until they end."""
    global _NOTES
    rng, rows = random.Random(5), []
    searches: dict[str, Any] = {"zero-order": ZeroOrder(4, 0.8), "particles": Particles(4)}
    for name, search in searches.items():
        with tempfile.TemporaryDirectory() as scratch:
            whole, seconds = Path(scratch) / "whole", time.perf_counter()
            _NOTES = str(Path(scratch) / "notes")
            expected = _in_child(bench, search, whole, Path(scratch) / "expected", None)
            seconds = time.perf_counter() - seconds
            scored = os.path.getsize(_NOTES)
            for attempt in range(KILLS // len(searches)):
                _NOTES = str(Path(scratch) / f"notes{attempt}")
                folder, out = Path(scratch) / str(attempt), Path(scratch) / f"out{attempt}"
                moments = []
                delay = rng.uniform(0.05, 0.95) * seconds
                if _in_child(bench, search, folder, out, delay) is None:
                    moments.append(round(delay / seconds, 3))
                found = _in_child(bench, search, folder, out, None)
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
    bench: Bench, search: Any, journal: Path, out: Path, delay: float | None
) -> str | None:
    """The winner and its costs as found by a forked process; ``None`` if it was killed."""
    out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        settings = SearchSettings(seed=SEED, batch=4, journal=str(journal))
        found = search.run(
            bench.pipe, bench.calls[:2], _Noted(JUDGE), Budget(renders=7.4), settings=settings
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="journals are kept here, and gone on from")
    parser.add_argument("--kill", action="store_true", help="only the kills; the rest stays")
    parser.add_argument("--only", help="only algorithms whose name holds this; the rest stays")
    parser.add_argument("--draw", action="store_true", help="only the picture")
    given = parser.parse_args()
    if given.draw:
        draw(RESULTS / "search.json", PICTURE)
        return
    load = load_average()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given.prompts, given.keep or Path(scratch))
        if given.kill:
            found = read("search")
            assert found is not None, "measure the rest first"
            write("search", "cpu", {**found, "kills": kill_test(bench)})
            return
        if given.only:
            found = read("search")
            assert found is not None, "measure the rest first"
            for name, (search, share) in algorithms().items():
                if given.only in name:
                    found["algorithms"][name] = bench.algorithm(name, search, share)
            write("search", "cpu", found)
            draw(RESULTS / "search.json", PICTURE)
            return
        found = bench.head(load)
        for name, recipe in drafts().items():
            found["drafts"][name] = without_folders(bench.draft(name, recipe))
        found["kills"] = kill_test(bench)
        for name, (search, share) in algorithms().items():
            found["algorithms"][name] = bench.algorithm(name, search, share)
            found["environment"] = environment("cpu", load)
            write("search", "cpu", found)  # what is known so far: the rest takes its time
    draw(RESULTS / "search.json", PICTURE)


if __name__ == "__main__":
    sys.exit(main())
