"""Noise search on the embedded models: algorithms against random search at equal evaluations.

    python -m benchmarks.bench_search [--model zoo:digits-sd] [--prompts 100] [--only NAME ...]
                                      [--minutes 30] [--fresh | --kill | --draw]

Prompts are chosen for headroom: of many captions those whose samples a pilot (other seeds) finds
worst, without guidance; in a fixed shuffled order, so that the first few stand for all. The judge
is searched; the referee, of another architecture and trained on other scans, is not, and says
whether the gain is real. Figures are nines of certainty, -log10(1 - p) of what was asked; the order
is the log-likelihood's, which saturates. Random search is exact: the mean over all choices of n of
a pool. Drafts are judged by the gain of best-of-8 that rendering the best of 8 drafts captures.

What each prompt gave is kept in ``results/search_rows.json``, and every run adds what is missing up
to ``--prompts``: rows of other hardware or another protocol are refused (``--fresh`` measures all
again, and drops the kills). ``search.json``, which tables and the picture are made of, is reckoned
from them. ``--kill``: searches are killed with SIGKILL and resumed (``bench_search_kill.py``).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import accel
from accel.artifact import inputs_digest
from accel.environment import hardware
from accel.loading import zoo_path
from accel.measure import environment, load_average
from accel.method import Recipe, Search
from accel.metrics.protocol import Protocol, file_sha256
from accel.settings import Settings
from accel.zoo.world import BACKGROUNDS, DIRECTIONS, caption
from benchmarks import search_report
from benchmarks.bench_search_kill import kill_test
from benchmarks.digits_study import SD, weights_sha256, without_folder
from benchmarks.distil import RECIPES
from benchmarks.results_file import RESULTS, add_fresh, read, write
from benchmarks.search_picture import draw, picture_of
from benchmarks.search_report import DRAFTED, JUDGE, REFEREE
from caches.interval import IntervalCache
from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.correctors import Correctors
from samplers.search.draft_commit import DraftCommit
from samplers.search.evolution import Evolution
from samplers.search.gradient import Gradient
from samplers.search.particles import Particles
from samplers.search.paths import Paths
from samplers.search.random import Random
from samplers.search.result import Candidate, Winner
from samplers.search.rollover import Rollover
from samplers.search.session import PLAIN
from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.zero_order import ZeroOrder
from samplers.swap import SwapScheduler

WAN = "zoo:digits-wan"
LOOKED_AT, PILOT_SEEDS, PILOT = 160, 4, 900_000
SHUFFLED = 11  # seed of the order of prompts
BEST_DRAFT = "output cache, every 4th"  # the one that is also given as much as best-of-8 takes
WRITE_EVERY = 20.0  # seconds
GUIDED = 3.0  # where correctors need two guidance branches
CORRECTED = 24  # prompts, at most
ROUND = 16  # prompts


@dataclass(frozen=True)
class Entry:
    """Something that is compared with random search at ``points`` of cost (renders).

    prompts: how many, at most. apart: a search for each point (those that render only at the end),
    else one to the last, read at each.
    """

    search: Search
    prompts: int
    points: tuple[int, ...]
    recipe: Recipe = PLAIN
    apart: bool = False


@dataclass(frozen=True)
class Study:
    """What is measured on one model. kept: of ``hard`` captions at most."""

    name: str
    model: str
    call: dict[str, Any]
    hard: int
    pool: int
    points: tuple[int, ...]
    entries: Callable[[], dict[str, Entry]]
    drafts: Callable[[], dict[str, Recipe]]


def ddim(steps: int) -> Recipe:
    """The pipeline's own steps, fewer."""
    return Recipe((SwapScheduler("DDIMScheduler", Settings(), steps=steps),))


def student() -> Recipe:
    return accel.read_recipe(RECIPES / "digits-sd-4-steps.yaml").recipe


def sd_entries() -> dict[str, Entry]:
    """On digits-sd, in order of worth; what decodes and scores at many steps on fewer prompts."""
    to16, steps = (4, 8, 16), Entry
    return {
        "zero-order, cosine 0.95": steps(ZeroOrder(4, 0.95), 100, to16),
        "zero-order, cosine 0.8, of 4": steps(ZeroOrder(4, 0.8, starts=4), 100, to16),
        "paths": steps(Paths(2, 3, start=0.4, up=0.25, down=0.4, rounds=None), 100, to16),
        "gradient through 8 DDIM steps": steps(
            Gradient(4, cosine=0.9, floor=0.5), 100, (8, 16), ddim(8), apart=True
        ),
        "gradient through 3 DDIM steps": steps(
            Gradient(8, cosine=0.95), 100, (4, 8), ddim(3), apart=True
        ),
        "gradient through the 4-step student": steps(
            Gradient(8, cosine=0.95), 100, (4, 8), student(), apart=True
        ),
        "evolution": steps(Evolution((0.0, 0.4), (8, 4, 4), elites=2), 48, to16),
        "particles": steps(Particles(4), 48, to16),
        "control: stochastic steps alone": steps(Particles(4, strength=0.0), 48, to16),
        "rollover": steps(Rollover(8, 12, together=12), 32, to16),
    }


def sd_drafts() -> dict[str, Recipe]:
    """Recipes that make drafts of digits-sd."""
    return {
        "student, 4 steps": student(),
        BEST_DRAFT: Recipe((IntervalCache(4, 1, 1, "output", 1),)),
        "output cache, every 6th": Recipe((IntervalCache(6, 1, 1, "output", 1),)),
        "control: DDIM, 3 steps": ddim(3),
    }


def wan_entries() -> dict[str, Entry]:
    """On digits-wan, to 8 renders."""
    to8 = (4, 8)
    return {
        "zero-order, cosine 0.8, of 4": Entry(ZeroOrder(4, 0.8, starts=4), 16, to8),
        "paths": Entry(Paths(2, 3, start=0.4, up=0.25, down=0.4, rounds=None), 16, to8),
        "particles": Entry(Particles(4), 16, to8),
        "evolution": Entry(Evolution((0.0, 0.4), (4, 2, 2), elites=1), 16, to8),
    }


def wan_drafts() -> dict[str, Recipe]:
    return {BEST_DRAFT: Recipe((IntervalCache(4, 1, 1, "output", 1),))}


STUDIES = {
    SD: Study("search", SD, {"num_inference_steps": 20, "guidance_scale": 1.0}, 100, 32,
              (4, 8, 16), sd_entries, sd_drafts),
    WAN: Study("search_wan", WAN,
               {"num_inference_steps": 20, "guidance_scale": 1.0, "height": 64, "width": 64,
                "num_frames": 17}, 16, 16, (4, 8), wan_entries, wan_drafts),
}  # fmt: skip


# -- prompts ---------------------------------------------------------------------------------


def captions(study: Study) -> list[str]:
    """Captions that go round the world; of videos with a motion."""
    turns = list(DIRECTIONS) if study.model == WAN else [None]
    count = LOOKED_AT if study.model == SD else 2 * study.hard
    said = [
        caption(i * 37 % 10, i * 37 % 100 // 10, i % len(BACKGROUNDS),
                *([] if turns == [None] else [i % len(turns)]))
        for i in range(count)
    ]  # fmt: skip
    return list(dict.fromkeys(said))


def hard_prompts(pipe: Any, study: Study) -> list[str]:
    """Of ``captions`` those with the lowest mean score over a few seeds, shuffled."""
    said, scores = captions(study), []
    for start in range(0, len(said), 8):
        some = [p for p in said[start : start + 8] for _ in range(PILOT_SEEDS)]
        seeds = [PILOT + start * PILOT_SEEDS + i for i in range(len(some))]
        arguments = {
            **study.call,
            "prompt": some,
            "generator": [torch.Generator().manual_seed(s) for s in seeds],
            "output_type": "np",
        }
        frames = (np.asarray(pipe(**arguments)[0]) * 255).round().astype(np.uint8)
        scores += DigitsJudge(JUDGE).score(frames, some).reshape(-1, PILOT_SEEDS).mean(1).tolist()
    order = sorted(np.argsort(scores, kind="stable")[: study.hard].tolist())
    np.random.default_rng(SHUFFLED).shuffle(order)
    return [said[i] for i in order]


# -- rows ------------------------------------------------------------------------------------


class OtherRows(ValueError):
    """There are rows that new ones do not belong to."""


class Bench:
    """A pipeline and the rows that were measured on it, which it adds to (``fresh``: to none)."""

    def __init__(self, study: Study, deadline: float = math.inf, *, fresh: bool = False) -> None:
        torch.set_num_threads(1)
        self.study, self.deadline = study, deadline
        self.file = f"{study.name}_rows"
        self.load = load_average()
        self.pipe = accel.load(study.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.rows = (None if fresh else read(self.file)) or self._empty()
        self._check()
        self._own(self.rows["environment"])
        self._written, self._added = time.monotonic(), False

    def _empty(self) -> dict[str, Any]:
        prompts = hard_prompts(self.pipe, self.study)
        return {
            "environment": environment("cpu", self.load),
            "protocol": self.protocol(prompts).as_json(),
            "model": self.study.model,
            "prompts": prompts,
            "random": {},
            "algorithms": {},
            "drafts": {},
        }

    def _check(self) -> None:
        """Raises ``OtherRows`` if what is there was measured elsewhere, or otherwise."""
        there, here = self.rows["environment"]["hardware"], hardware("cpu")
        if there != here:
            raise OtherRows(
                f"{self.file}.json was measured on {there}, this is {here}; measure there, or "
                "everything again (--fresh)"
            )
        protocol = self.protocol(self.rows["prompts"])
        if self.rows["protocol"] != protocol.as_json():
            raise OtherRows(f"{self.file}.json was measured by another protocol (--fresh)")

    def protocol(self, prompts: list[str]) -> Protocol:
        study = self.study
        return Protocol(
            model={"name": study.model, "weights_sha256": weights_sha256(zoo_path(study.model))},
            inputs={"sha256": inputs_digest([self.call(p) for p in prompts]), "prompts": prompts},
            samples=len(prompts),
            seeds=f"search seed: the number of the prompt; pilot from {PILOT}",
            steps=study.call["num_inference_steps"],
            guidance=study.call["guidance_scale"],
            scheduler=type(self.pipe.scheduler).__name__,
            features=JUDGE,
            features_sha256=file_sha256(zoo_path(f"zoo:{JUDGE}") / "model.safetensors"),
            quantise="round(255 x)",
            more={
                "referee_sha256": file_sha256(zoo_path(f"zoo:{REFEREE}") / "model.safetensors"),
                "pool": study.pool,
                "looked_at": len(captions(study)),
            },
        )

    def call(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, **self.study.call, **more}

    def missing(self, rows: dict[str, Any], count: int) -> Iterator[tuple[int, str]]:
        """Numbers and prompts up to ``count`` that ``rows`` lacks, until time is over."""
        for number, prompt in enumerate(self.rows["prompts"][:count]):
            if prompt not in rows and time.monotonic() < self.deadline:
                yield number, prompt

    def search(
        self, search: Any, renders: float, number: int, recipe: Recipe = PLAIN, **more: Any
    ) -> Winner:
        """One prompt searched; the winner is not rendered again."""
        call = self.call(self.rows["prompts"][number], **more)
        settings = SearchSettings(seed=number, deliver=False)
        judge, budget = DigitsJudge(JUDGE), Budget(renders=renders)
        return search.run(self.pipe, [call], judge, budget, recipe, settings=settings).winners[0]

    def added(self, part: dict[str, Any] | None = None) -> None:
        """Something was measured, of this algorithm or these drafts: write it, now and then."""
        self.rows["environment"] = environment("cpu", self.load)
        if part is not None:
            part["environment"] = self.rows["environment"]
        self._added = True
        if time.monotonic() - self._written > WRITE_EVERY:
            self.keep()

    def keep(self) -> None:
        """Write the rows, if any were added."""
        if self._added:
            write(self.file, "cpu", self.rows)
            self._written, self._added = time.monotonic(), False

    def _own(self, environment: dict[str, Any]) -> None:
        """What has no environment of its own has the file's, which is renewed."""
        for kind in ("algorithms", "drafts"):
            for part in self.rows[kind].values():
                part.setdefault("environment", environment)

    # -- what is measured ------------------------------------------------------------------------

    def random(self, count: int) -> None:
        """The pool of every prompt: scores of its draws by judge and referee."""
        rows = self.rows["random"]
        for number, prompt in self.missing(rows, count):
            winner = self.search(Random(), self.study.pool, number)
            rows[prompt] = {
                "scores": [both(c) for c in winner.candidates],
                "evaluations": winner.ledger.spent().evaluations,
            }
            self.added()

    def algorithm(self, name: str, entry: Entry, count: int) -> None:
        """What it has found at each point of cost, for prompts that lack it."""
        known = self.rows["algorithms"].setdefault(
            name, {"search": entry.search.to_json(), "methods": methods(entry.recipe), "rows": {}}
        )
        if known["search"] != entry.search.to_json() or known["methods"] != methods(entry.recipe):
            raise OtherRows(f"{name} was measured with other settings: {known['search']}")
        for number, prompt in self.missing(known["rows"], min(count, entry.prompts)):
            if prompt not in self.rows["random"]:
                break
            known["rows"][prompt] = self._points(entry, number, prompt)
            self.added(known)

    def _points(self, entry: Entry, number: int, prompt: str) -> dict[str, Any]:
        price, at, spent = self.price(prompt), {}, []
        for renders in entry.points if entry.apart else entry.points[-1:]:
            winner = self.search(entry.search, renders, number, entry.recipe)
            spent.append(winner.ledger.spent())
            for point in (renders,) if entry.apart else entry.points:
                best = best_at(winner, point * price)
                if best is not None:
                    at[str(point)] = both(best)
        sums = {k: sum(getattr(c, k) for c in spent)
                for k in ("evaluations", "decodes", "verified")}  # fmt: skip
        return {"at": at, **sums}

    def price(self, prompt: str) -> float:
        """Evaluations of a render."""
        return self.rows["random"][prompt]["evaluations"] / self.study.pool

    def draft(self, name: str, recipe: Recipe, count: int) -> None:
        """Drafts of the pool's first draws, the best committed; and more for 8 renders' cost."""
        known = self.rows["drafts"].setdefault(name, {"methods": methods(recipe), "rows": {}})
        if known["methods"] != methods(recipe):
            raise OtherRows(f"drafts {name} were measured with other settings")
        for number, prompt in self.missing(known["rows"], count):
            if prompt not in self.rows["random"]:
                break
            once = self.search(DraftCommit(DRAFTED), 2 * DRAFTED, number, recipe)
            made = [c for c in once.candidates if c.purpose == "draft"]
            row = {
                "drafts": [c.scores[JUDGE] for c in made],
                "draft_evaluations": once.ledger.by_purpose["draft"].evaluations,
                "own": self._committed(once),
            }
            if name == BEST_DRAFT:
                more = self.search(DraftCommit(None), DRAFTED, number, recipe)
                row["at_8"] = self._committed(more)
            known["rows"][prompt] = row
            self.added(known)

    @staticmethod
    def _committed(winner: Winner) -> list[float]:
        """Scores of what was committed, and the evaluations of all."""
        best = best_at(winner, math.inf)
        assert best is not None
        return [*both(best), winner.ledger.spent().evaluations]

    def correctors(self, count: int) -> None:
        """Means over a whole population under guidance, weighed and (the control) not."""
        rows = self.rows.setdefault("correctors", {})
        for number, prompt in self.missing(rows, min(count, CORRECTED)):
            rows[prompt] = {}
            for name, clamp in (("weighed", 1.0), ("unweighed", 0.0)):
                search = Correctors(8, clamp=clamp, rounds=1)
                winner = self.search(search, 1000, number, guidance_scale=GUIDED)
                (report,) = winner.report["populations"]
                rows[prompt][name] = {
                    "scores": [both(c) for c in winner.candidates if c.purpose == "render"],
                    "ancestors": len(set(report["ancestors"])),
                    "spread": float(np.mean(report["spread"])),
                    "effective": float(np.mean(report["effective"])),
                }
            self.added()


def best_at(winner: Winner, evaluations: float) -> Candidate | None:
    """The best render known after so many evaluations."""
    known = [
        c
        for c in winner.candidates
        if c.purpose == "render" and c.evaluations <= evaluations and c.score is not None
    ]
    return max(known, key=lambda c: c.score or -math.inf, default=None)


def both(c: Candidate) -> list[float]:
    """Log-likelihoods by judge and referee."""
    score, held = c.scores[JUDGE], c.held_out[REFEREE]
    assert score is not None
    assert held is not None
    return [round(score, 6), round(held, 6)]


def methods(recipe: Recipe) -> list[dict[str, Any]]:
    return [without_folder(method) for method in recipe.methods]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=SD, choices=sorted(STUDIES))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop, and report")
    parser.add_argument("--only", action="append", help="what has this in its name; the rest stays")
    parser.add_argument("--kill", action="store_true", help="only the kills; the rest stays")
    parser.add_argument(
        "--draw", action="store_true", help="only report and picture, from the rows"
    )
    add_fresh(parser)
    given = parser.parse_args()
    if given.fresh and (given.only or given.kill):
        parser.error("--fresh: measures everything, so not with --only or --kill")
    study = STUDIES[given.model]
    if given.draw:
        return report(study)
    try:
        bench = Bench(study, time.monotonic() + 60 * given.minutes, fresh=given.fresh)
        if given.kill:
            found = read(study.name)
            assert found is not None, "measure the rest first"
            calls = [bench.call(p) for p in bench.rows["prompts"][:2]]
            kills = kill_test(bench.pipe, calls)
            kills["environment"] = environment("cpu", bench.load)
            write(study.name, "cpu", {**found, "kills": kills})
            return 0
        measure(bench, given.prompts, given.only)
    except OtherRows as error:
        print(f"bench_search: {error}", file=sys.stderr)
        return 2
    return report(study, fresh=given.fresh)


def measure(bench: Bench, count: int, only: list[str] | None) -> None:
    """Everything that is missing, or what holds one of the names in ``only``."""

    def wanted(name: str) -> bool:
        return only is None or any(part in name for part in only)

    parts: dict[str, Callable[[int], None]] = {}
    for name, recipe in bench.study.drafts().items():
        parts[f"drafts: {name}"] = functools.partial(bench.draft, name, recipe)
    for name, entry in bench.study.entries().items():
        parts[name] = functools.partial(bench.algorithm, name, entry)
    if bench.study.model == SD:
        parts["correctors"] = bench.correctors
    chosen = {name: part for name, part in parts.items() if wanted(name)}
    # some prompts of everything, then more: whenever it is stopped, all have their share
    for some in (*range(ROUND, count, ROUND), count):
        for name, part in {"random": bench.random, **chosen}.items():
            began = time.process_time()
            part(some)
            print(f"{some} prompts, {name}: {time.process_time() - began:.0f} s", flush=True)
        bench.keep()


def report(study: Study, *, fresh: bool = False) -> int:
    """``search.json`` and the picture, from the rows; kills stay, but of older code."""
    rows = read(f"{study.name}_rows")
    assert rows is not None, "measure first"
    old = None if fresh else read(study.name)
    kills = old["kills"] if old else None
    if kills is not None and old is not None:
        kills.setdefault("environment", old["environment"])
    write(study.name, "cpu", search_report.reported(rows, study.points, study.pool, kills))
    draw(RESULTS / f"{study.name}.json", picture_of(study.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
