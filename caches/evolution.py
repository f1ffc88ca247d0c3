"""Evolutionary search of caching schedules (ECAD, arXiv 2506.15682), begun where drift says.

A genome is a bit a cell of the schedule: compute, or not. NSGA-II (pymoo) minimises two numbers:
what a run costs, from a table of measured seconds a column, and how far its outputs are from the
uncached ones. Against the paper, which spends some million images: beside the paper's regular
intervals, the first population solves the same problem on recorded drift (`caches._drift`), the
search looks at a part of the inputs, and what survives is measured on all of them. Every evaluation
is written down as it is made, so a search that was cut off goes on where it stood.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np

from accel.artifact import Artifact, ArtifactRef, fingerprints, inputs_digest
from accel.denoiser import denoisers
from accel.measure import mean_psnr, pipeline_samples
from accel.method import Method, Recipe, attached
from accel.settings import check_fields
from caches._drawn import drawn, noise_levels
from caches._drift import Drift, best_steps, forecast_errors, measure_drift
from caches._from_artifact import FromArtifact, OnGrid
from caches._front import Candidate, Front, is_dominated
from caches._resuming import damaged, other_work, work_digest
from caches._step_mutation import step_mutation
from caches.schedule import (
    COMPUTE,
    FORECAST,
    REUSE,
    Schedule,
    block_columns,
    causal,
    from_steps,
    is_inside,
    is_unet,
    module_columns,
    predicted_cost,
    sole_readers,
    to_artifact,
    without_dead,
)

Quality = Callable[[Any, Any], float]  # (samples, uncached samples), both (n, ...) in 0..1
Parts = Literal["output", "blocks", "modules", "output+blocks", "output+modules"]

LEDGER, TRIAL = "evaluations.jsonl", "trial.safetensors"
RUINED = -1e6  # quality of what is no number: nothing is better than NaN, nor worse


@dataclass(frozen=True)
class EvolutionCache(FromArtifact, Method):
    """Run a schedule that ``EvolutionSearch`` has found.

    artifact: the schedule; `Front.pick` gives it, and `of` makes one of any other schedule.
    on_grid: in a run over other noise levels "resample" the schedule, raise an "error", or "bypass"
    it and compute.
    """

    PAPER = "ECAD, arXiv 2506.15682"

    artifact: ArtifactRef
    on_grid: OnGrid = "resample"

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        pipe: Any,
        path: str | os.PathLike[str],
        call: dict[str, Any] | None = None,
    ) -> EvolutionCache:
        """The method for a schedule from elsewhere (`caches.importers`), which goes to a file.

        Its rows are steps of this pipeline: of the noise levels that its scheduler lays for so
        many, or, where those depend on more (Flux: on the size), that a call with the arguments
        `call` has, which is made.

        Raises:
            ValueError: the scheduler alone cannot tell, or runs have another number of steps.
        """
        grid = noise_levels(pipe, schedule.steps, call)
        if len(grid) != schedule.steps:
            raise ValueError(
                f"EvolutionCache.of: a schedule of {schedule.steps} steps, of which "
                f"{type(pipe.scheduler).__name__} makes {len(grid)}; choose another scheduler"
            )
        made = to_artifact(
            schedule,
            denoisers(pipe)[0],
            method=cls.name(),
            grid=grid,
            others=fingerprints(pipe)["others"],
        )
        return cls(made.save(path))


@dataclass(frozen=True)
class EvolutionSearch:
    """Settings of a search.

    parts: columns that are searched; order: of the forecasts, 0 repeats (try both: pictures did
    better with 1 here, videos with 0); population, generations, crossover (4 points) and mutation
    (of a bit) as in the paper, with a smaller population; screen: inputs that a candidate is looked
    at with, before the front is measured on all.
    """

    parts: Parts = "output"
    order: int = 1
    population: int = 24
    generations: int = 12
    crossover: float = 0.9
    mutation: float = 0.05
    screen: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.population, self.generations, self.screen) < 1 or self.order < 0:
            raise ValueError(f"{self}: wants population, generations, screen >= 1, order >= 0")
        if not 0 <= self.crossover <= 1 or not 0 <= self.mutation <= 1:
            raise ValueError(f"{self}: crossover and mutation in 0..1")

    def run(
        self,
        pipe: Any,
        inputs: Sequence[dict[str, Any]],
        out: str | os.PathLike[str],
        *,
        recipe: Recipe | None = None,
        quality: Quality | None = None,
    ) -> Front:
        """Search on `pipe` with `recipe` attached; writes the front below `out`, with a picture.

        `inputs`: pipeline-call arguments; input i runs with seed i. `quality`: higher is better;
        mean PSNR in dB by default, and told apart by its name. The same search below the same
        `out` goes on.

        Raises:
            ValueError: no inputs, two denoisers, or `out` holds another search.
            ImportError: pymoo is not there.
        """
        if not inputs or len(denoisers(pipe)) != 1:
            raise ValueError("EvolutionSearch wants inputs and a pipeline with one denoiser")
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        recipe, quality = recipe or Recipe(()), quality or mean_psnr
        measure = getattr(quality, "__qualname__", type(quality).__qualname__)
        digest = work_digest(pipe, inputs, self, recipe, measure)
        if importlib.util.find_spec("pymoo") is None:
            raise ImportError("EvolutionSearch needs pymoo: pip install -e '.[search]'")
        with attached(recipe, pipe):
            trial = _Trial(self, pipe, list(inputs), folder, quality, digest)
            for genomes in self._generations(trial):
                print(f"{len(trial.known)} evaluated, generation of {len(genomes)}", flush=True)
            return trial.finish()

    def _generations(self, trial: _Trial) -> Iterator[np.ndarray]:
        """NSGA-II, generation by generation; each is evaluated when asked for."""
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.evaluator import Evaluator
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.pntx import PointCrossover
        from pymoo.problems.static import StaticProblem

        first = trial.first_population(self.population)
        problem = Problem(n_var=first.shape[1], n_obj=2, xl=0, xu=1, vtype=bool)
        make: Any = NSGA2  # annotated with its defaults' types
        algorithm = make(
            pop_size=self.population,
            sampling=first,
            crossover=PointCrossover(n_points=4, prob=self.crossover),
            mutation=step_mutation(trial.steps, self.mutation),
            eliminate_duplicates=True,
        )
        algorithm.setup(problem, termination=("n_gen", self.generations), seed=self.seed)
        while algorithm.has_next():
            asked = algorithm.ask()
            if asked is None:  # of few steps every genome has been asked for
                return
            genomes = asked.get("X").astype(bool)
            goals = np.array([trial.goals(genome) for genome in genomes])
            Evaluator().eval(StaticProblem(problem, F=goals), asked)
            algorithm.tell(infills=asked)
            yield genomes


class _Trial:
    """One search: the reference, the cost table, and every evaluation so far."""

    def __init__(
        self,
        search: EvolutionSearch,
        pipe: Any,
        inputs: list,
        folder: Path,
        quality: Quality,
        digest: str,
    ) -> None:
        self.search, self.pipe, self.inputs, self.folder = search, pipe, inputs, folder
        self.quality = quality
        self.denoiser = denoisers(pipe)[0]
        self.columns = searched_columns(self.denoiser, search.parts)
        self.drift = self._drift(digest)
        self.full = predicted_cost(
            from_steps(self.columns, self.steps, range(self.steps)), *self._costs
        )
        self.references: dict[int, Any] = {}
        self.known: dict[str, tuple[float, float]] = self._read_ledger()

    @property
    def steps(self) -> int:
        return len(self.drift.shares)

    @property
    def _costs(self) -> tuple[dict[str, float], float]:
        return self.drift.seconds, self.drift.rest

    def _drift(self, digest: str) -> Drift:
        """Measured once for a folder: the costs of a search that goes on must stay the same."""
        file = self.folder / "drift.npz"
        if not file.is_file():
            drift = measure_drift(self.pipe, self.inputs[0], self.columns)
            drift.save(file, digest)
        try:
            drift, found = Drift.load(file)
        except (BadZipFile, EOFError, LookupError, TypeError, ValueError):
            raise damaged(file, LEDGER) from None  # whose costs are of these seconds
        if found != digest:
            raise other_work(self.folder, "search")
        return drift

    # -- genomes -----------------------------------------------------------------------------

    def schedule(self, genome: np.ndarray) -> Schedule:
        """The legal schedule of a genome (steps x columns bits, True computes)."""
        letter = FORECAST if self.search.order else REUSE
        bits = genome.reshape(self.steps, len(self.columns))
        rows = tuple("".join(COMPUTE if bit else letter for bit in row) for row in bits)
        schedule = Schedule(self.columns, rows, order=self.search.order)
        return causal(without_dead(schedule, sole_readers(self.denoiser)))

    def first_population(self, count: int) -> np.ndarray:
        """Everything computed; all every n steps, as the paper begins; and drift's solutions.

        Those are for rising prices of a computed step, and take most of the places.
        """
        whole = np.ones((self.steps, len(self.columns)), dtype=bool)
        regular = itertools.islice(self._regular(), count // 3)
        first = {seed.tobytes(): seed for seed in (whole, *regular)}
        weights = (np.ones(self.steps), -np.diff([*self.drift.sigmas, 0.0]))
        drifted = {}
        for price in np.geomspace(1e-4, 0.3, 4 * count):
            for weight in weights:
                seed = self._seed(price, weight / weight.mean())
                drifted[seed.tobytes()] = seed
        by_work = sorted((s for k, s in drifted.items() if k not in first), key=np.sum)
        places = min(count - len(first), len(by_work))
        chosen = np.linspace(0, len(by_work) - 1, places).round().astype(int)
        return np.stack([s.ravel() for s in (*first.values(), *(by_work[i] for i in chosen))])

    def _regular(self) -> Iterator[np.ndarray]:
        """Columns computed every 2, 3, ... steps: the outer ones, then any inside of them."""
        inner = np.array([self._is_inner(column) for column in self.columns])
        for interval in range(2, self.steps):
            for thinned in (~inner, inner):
                if thinned.any():
                    bits = np.ones((self.steps, len(self.columns)), dtype=bool)
                    bits[np.ix_(np.arange(self.steps) % interval > 0, thinned)] = False
                    yield bits

    def _seed(self, price: float, weight: np.ndarray) -> np.ndarray:
        bits = np.ones((self.steps, len(self.columns)), dtype=bool)
        outer = [c for c in self.columns if not self._is_inner(c)]
        total = sum(self.drift.seconds[c] for c in outer)
        for j, column in enumerate(self.columns):
            if self._is_inner(column):
                continue  # computed wherever the outer one is; the search thins it out
            errors = forecast_errors(
                self.drift.products[column], self.drift.shares, self.search.order
            )
            share = self.drift.seconds[column] / total
            bits[:, j] = False
            bits[list(best_steps(errors, weight, price * share * len(outer))), j] = True
        return bits

    def _is_inner(self, column: str) -> bool:
        return any(is_inside(column, outer) for outer in self.columns)

    # -- evaluation --------------------------------------------------------------------------

    def goals(self, genome: np.ndarray) -> tuple[float, float]:
        """(cost as a share of the uncached run, minus quality), both to be small."""
        schedule = self.schedule(genome)
        key = " ".join(schedule.rows)
        if key not in self.known:
            value = self.measured(schedule, self.inputs[: self.search.screen])
            self.known[key] = (self.cost(schedule), -value)
            with (self.folder / LEDGER).open("a") as ledger:
                ledger.write(json.dumps({"rows": key, "goals": self.known[key]}) + "\n")
        return self.known[key]

    def cost(self, schedule: Schedule) -> float:
        """Predicted seconds of a run, as a share of the uncached one's."""
        return predicted_cost(schedule, *self._costs) / self.full

    def measured(self, schedule: Schedule, inputs: Sequence[dict[str, Any]]) -> float:
        """Mean quality over some inputs, run as a user would run the artifact, or `RUINED`."""
        references = [self._reference(i) for i in range(len(inputs))]
        outputs = references
        if not schedule.is_neutral():
            with attached(self._method(schedule), self.pipe):
                outputs = drawn(self.pipe, inputs)
        pairs = zip(outputs, references, strict=True)
        found = float(np.mean([self.quality(*pair) for pair in pairs]))
        return found if found > -np.inf else RUINED

    def _reference(self, i: int) -> Any:
        if i not in self.references:
            self.references[i] = pipeline_samples(self.pipe, self.inputs[i], i)
        return self.references[i]

    def _method(self, schedule: Schedule) -> EvolutionCache:
        return EvolutionCache(self._artifact(schedule).save(self.folder / TRIAL))

    def _artifact(self, schedule: Schedule) -> Artifact:
        return to_artifact(
            schedule,
            self.denoiser,
            method=EvolutionCache.name(),
            grid=self.drift.sigmas,
            guidance=self.drift.guided,
            inputs_sha256=inputs_digest(self.inputs),
            seed=self.search.seed,
        )

    def _read_ledger(self) -> dict[str, tuple[float, float]]:
        file = self.folder / LEDGER
        if not file.is_file():
            return {}
        whole, end, _ = file.read_bytes().rpartition(b"\n")
        # what follows was being written when the search was cut off; the next line goes there
        os.truncate(file, len(whole + end))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            return {row["rows"]: tuple(row["goals"]) for row in rows}
        except (ValueError, LookupError, TypeError):
            raise damaged(file) from None

    # -- the result --------------------------------------------------------------------------

    def finish(self) -> Front:
        """The front of everything evaluated, measured on all inputs, written with its picture."""
        order = self.search.order
        goals = list(self.known.values())
        kept = [
            Schedule(self.columns, tuple(rows.split(" ")), order=order)
            for rows, its in self.known.items()
            if not is_dominated(its, goals)
        ]
        full = [Candidate(s, 1 / self.cost(s), self.measured(s, self.inputs)) for s in kept]
        (self.folder / TRIAL).unlink(missing_ok=True)
        front = Front.of([c for c in full if c.quality > RUINED], self.folder)
        record = {"search": asdict(self.search), "evaluated": len(self.known)}
        front.write(self._artifact, record, [(1 / cost, -loss) for cost, loss in goals])
        return front


def searched_columns(denoiser: Any, parts: Parts) -> tuple[str, ...]:
    """The columns that a search of these parts acts on."""
    found: tuple[str, ...] = ()
    for part in parts.split("+"):
        if part == "output":
            found += (denoiser.slot,)
        elif part == "modules":
            found += module_columns(denoiser)
        else:
            columns = block_columns(denoiser)
            found += tuple(c for c in columns if not (is_unet(denoiser) and c.endswith("conv_in")))
    return found
