"""The language of the feature caches: what a step computes, reuses, forecasts or skips.

A schedule is a table of letters, a row a step, a column a part of the denoiser: an attention, a
feed-forward, a block, a stage of a UNet, or the whole network. It is a value (it prints, compares
and hashes), an artifact on disk, and a picture (`caches.heat_map`). It is found once, by a search,
by training or by hand; running it (`caches._executor`) decides nothing and waits for nothing.

Passes give an equal or a legal schedule: `causal` (nothing is read before it was computed),
`without_dead` (nothing is computed that nobody reads), `resampled` (another number of steps).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accel.artifact import Artifact, Fingerprint

if TYPE_CHECKING:
    from accel.denoiser import Denoiser

COMPUTE, REUSE, FORECAST, SKIP = "CRFS"
LETTERS = frozenset("CRFS")


@dataclass(frozen=True)
class Schedule:
    """What every step does with every column.

    columns: "component.path" of a module, or a component alone ("transformer"), which is all it
        returns. A column inside another acts only where the outer one computes.
    rows: one string a step of the grid, one letter a column: C computes, R repeats the last
        computed output, F extrapolates the last `order` + 1 of them, S (blocks only) passes the
        block's input on.
    branches: (guidance branch, its rows) where a branch has rows of its own.
    order: of the forecasts, in the noise share (`noise_share`); 0 repeats.

    Raises:
        ValueError: not a table, or another letter.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    branches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    order: int = 1

    def __post_init__(self) -> None:
        columns, names = self.columns, [name for name, _ in self.branches]
        if isinstance(columns, str) or not columns or len(set(columns)) != len(columns):
            raise ValueError(f"Schedule.columns = {columns!r}: wants some, each once, in a tuple")
        if len(set(names)) != len(names):
            raise ValueError(f"Schedule.branches name {names}: wants each once")
        if not self.rows or self.order < 0:
            raise ValueError(f"Schedule: {len(self.rows)} rows, order {self.order}")
        for rows in self.tables():
            if len(rows) != len(self.rows):
                raise ValueError(f"Schedule: branches of {len(rows)} and {len(self.rows)} steps")
            for row in rows:
                if len(row) != len(self.columns) or not set(row) <= LETTERS:
                    raise ValueError(
                        f"Schedule: row {row!r}; wants {len(self.columns)} letters of C, R, F, S"
                    )

    @property
    def steps(self) -> int:
        """Rows of the table."""
        return len(self.rows)

    def tables(self) -> Iterator[tuple[str, ...]]:
        """The rows of all branches together, then those of each that has its own."""
        yield self.rows
        for _, rows in self.branches:
            yield rows

    def of_branch(self, branch: str) -> tuple[str, ...]:
        """The rows of one guidance branch."""
        return dict(self.branches).get(branch, self.rows)

    def share(self, letter: str = COMPUTE) -> float:
        """Share of the cells with this letter, over all tables."""
        text = "".join("".join(rows) for rows in self.tables())
        return text.count(letter) / len(text)

    def is_neutral(self) -> bool:
        """Is everything computed?"""
        return self.share() == 1.0

    def with_tables(self, change) -> Schedule:
        """The schedule with `change(rows) -> rows` applied to every table."""
        branches = tuple((name, tuple(change(rows))) for name, rows in self.branches)
        return replace(self, rows=tuple(change(self.rows)), branches=branches)


def constant(columns: Sequence[str], steps: int, letter: str = COMPUTE) -> Schedule:
    """Every step the same, by default all computed."""
    return Schedule(tuple(columns), (letter * len(columns),) * steps)


def from_steps(columns: Sequence[str], steps: int, computed, otherwise=REUSE, order=1) -> Schedule:
    """All columns computed at some of the steps (ValueError: others), `otherwise` at the rest."""
    computed = set(computed)
    if outside := sorted(step for step in computed if not 0 <= step < steps):
        raise ValueError(f"{outside} are no steps of {steps}")
    letters = (COMPUTE if i in computed else otherwise for i in range(steps))
    return Schedule(tuple(columns), tuple(c * len(columns) for c in letters), order=order)


# -- columns ---------------------------------------------------------------------------------


def module_columns(denoiser: Denoiser) -> tuple[str, ...]:
    """Attentions and feed-forwards of all blocks, in the order they run."""
    paths: list[str] = []
    for block in denoiser.blocks:
        inner = (block.self_attn, block.self_attn_2, block.cross_attn, *block.ff)
        paths += [path for path in inner if path]
    return tuple(f"{denoiser.slot}.{path}" for path in dict.fromkeys(paths))


def block_columns(denoiser: Denoiser) -> tuple[str, ...]:
    """The blocks of a transformer, or the stages of a UNet with its first convolution."""
    first = [f"{denoiser.slot}.conv_in"] if is_unet(denoiser) else []
    kinds = ("dit", "joint", "single", "unet.down", "unet.mid", "unet.up")
    return tuple(first + [f"{denoiser.slot}.{b.path}" for b in denoiser.blocks if b.kind in kinds])


def is_unet(denoiser: Denoiser) -> bool:
    """Has it stages that go down and up?"""
    return any(block.kind == "unet.up" for block in denoiser.blocks)


def is_inside(column: str, outer: str) -> bool:
    """Does `column` run only where `outer` computes?"""
    return column.startswith(outer + ".")


# -- passes ----------------------------------------------------------------------------------


def causal(schedule: Schedule) -> Schedule:
    """The schedule with C where a column would be read before it was ever computed.

    A column inside one that does not compute is not run, so it has nothing to read later.
    """
    outer = _outer_columns(schedule.columns)

    def change(rows: Sequence[str]) -> Iterator[str]:
        known: set[int] = set()
        for row in rows:
            letters = list(row)
            for j in sorted(range(len(outer)), key=lambda j: len(outer[j])):
                if any(letters[k] != COMPUTE for k in outer[j]):
                    continue
                if letters[j] in (REUSE, FORECAST) and j not in known:
                    letters[j] = COMPUTE
                if letters[j] == COMPUTE:
                    known.add(j)
            yield "".join(letters)

    return schedule.with_tables(change)


def without_dead(schedule: Schedule, readers: Mapping[str, Sequence[str]]) -> Schedule:
    """The schedule without computations whose result nobody reads; its outputs are the same.

    `readers`: for a column, the columns that read its output and are alone to do so (see
    `sole_readers`). What it computes is dead where none of them computes and where it is computed
    again before it is reused. Inside a column that does not compute, every letter becomes R.
    """
    columns, outer = schedule.columns, _outer_columns(schedule.columns)
    place = {column: j for j, column in enumerate(columns)}
    read_by = {place[c]: [place[r] for r in rs] for c, rs in readers.items() if c in place}

    def change(rows: Sequence[str]) -> list[str]:
        table = [list(row) for row in rows]
        for letters in table:
            for j in range(len(columns)):
                if any(letters[k] != COMPUTE for k in outer[j]):
                    letters[j] = REUSE
        for j, its in read_by.items():
            wanted = 0  # how many of the computed outputs before this step are still to be read
            for letters in reversed(table):
                unread = all(letters[k] != COMPUTE for k in its)
                if letters[j] == FORECAST and not unread:
                    wanted = max(wanted, schedule.order + 1)
                elif letters[j] == REUSE and not unread:
                    wanted = max(wanted, 1)
                elif letters[j] == COMPUTE:
                    if unread and not wanted:
                        letters[j] = REUSE
                    else:
                        wanted = max(wanted - 1, 0)
        return ["".join(letters) for letters in table]

    return schedule.with_tables(change)


def sole_readers(denoiser: Denoiser) -> dict[str, tuple[str, ...]]:
    """Columns that only some other columns read.

    In Flux's single blocks attention and first projection feed the second projection alone; the
    middle of a UNet feeds its first stage up alone.
    """
    slot, found = denoiser.slot, {}
    for block in denoiser.blocks:
        if block.kind == "single":
            first, last = block.ff
            found[f"{slot}.{block.self_attn}"] = found[f"{slot}.{first}"] = (f"{slot}.{last}",)
        if block.kind == "unet.mid":
            found[f"{slot}.{block.path}"] = (f"{slot}.up_blocks.0",)
    return found


def resampled(schedule: Schedule, of: Sequence[float], to: Sequence[float]) -> Schedule:
    """The schedule for another grid: noise levels `of` its rows, and `to` the wanted ones.

    A step computes a column where a row that it covers does: the rows up to its noise level that
    the step before did not cover. Between two rows it does what the column does most often where it
    does not compute, so that as much is computed as before; what is skipped has nothing to repeat,
    and is computed where one of the two rows does.

    Raises:
        ValueError: `of` has not one level a row.
    """
    if len(of) != schedule.steps:
        raise ValueError(f"resampled: {len(of)} noise levels of {schedule.steps} rows")
    places = [_place_on(of, sigma) for sigma in to]

    def change(rows: Sequence[str]) -> Iterator[str]:
        begin, idle = 0, [_idle_letter(rows, j) for j in range(len(schedule.columns))]
        for place in places:
            end = max(begin, min(len(rows), math.floor(place + 0.5) + 1))
            covered = rows[begin:end]
            around = rows[math.floor(place) : math.ceil(place) + 1]
            yield "".join(
                COMPUTE
                if any(row[j] == COMPUTE for row in covered)
                else (covered[-1][j] if covered else _between(around, j, idle[j]))
                for j in range(len(schedule.columns))
            )
            begin = end

    return schedule.with_tables(change)


def noise_share(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Where the noise levels lie between sample (0) and noise (1): the forecasts' variable.

    sigma / (1 + sigma) of variance-preserving levels sqrt((1 - a) / a); flow levels, which never
    exceed 1, are shares already. Outputs bend less over it than over steps or over log sigma.
    """
    flow = max(sigmas, default=0.0) <= 1.0
    return tuple(s if flow else s / (1 + s) for s in sigmas)


def extrapolation(known: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights of values known at some places whose polynomial is evaluated at `at`.

    One known value has weight 1. For order n this is Taylor's expansion with divided differences.
    Of values known at one place (PNDM visits a level twice) the first counts.
    """
    places = list(dict.fromkeys(known))
    weights = dict.fromkeys(places, 1.0)
    for x in places:
        weights[x] = math.prod((at - y) / (x - y) for y in places if y != x)
    return tuple(weights.pop(x, 0.0) for x in known)


def _outer_columns(columns: Sequence[str]) -> list[list[int]]:
    """For every column, those that contain it."""
    return [[k for k, outer in enumerate(columns) if is_inside(c, outer)] for c in columns]


def _place_on(grid: Sequence[float], sigma: float) -> float:
    """Fractional row of a noise level on a falling grid, linear in its logarithm."""
    tiny = 1e-6
    for i, (high, low) in enumerate(itertools.pairwise(grid)):
        if sigma >= low:
            top, bottom = math.log(max(high, tiny)), math.log(max(low, tiny))
            here = math.log(max(sigma, tiny))
            return i + min(max((top - here) / (top - bottom), 0.0), 1.0) if top > bottom else i
    return len(grid) - 1.0


def _between(around: Sequence[str], column: int, idle: str) -> str:
    """What a column that idles with this letter does between the rows around a noise level."""
    skipped = idle == SKIP and any(row[column] == COMPUTE for row in around)
    return COMPUTE if skipped else idle


def _idle_letter(rows: Sequence[str], column: int) -> str:
    """What a column does most often when it does not compute."""
    letters = [row[column] for row in rows if row[column] != COMPUTE]
    return max(sorted(set(letters)), key=letters.count) if letters else COMPUTE


# -- what it costs ---------------------------------------------------------------------------


def executed(schedule: Schedule, branch: str = "") -> Iterator[tuple[int, int, str]]:
    """(step, column, letter) of everything that is really asked for, in order.

    Columns inside one that does not compute are not asked.
    """
    outer = _outer_columns(schedule.columns)
    for i, row in enumerate(schedule.of_branch(branch)):
        for j, letter in enumerate(row):
            if all(row[k] == COMPUTE for k in outer[j]):
                yield i, j, letter


def predicted_cost(schedule: Schedule, cost: Mapping[str, float], rest: float) -> float:
    """Cost of one branch's run from a table of what a column costs when computed once.

    A column's cost holds that of the columns inside it; `rest` is what a step costs outside of all
    columns. Unit: that of the table (seconds, operations).
    """
    outer = _outer_columns(schedule.columns)
    own = [cost[column] for column in schedule.columns]
    for j, around in enumerate(outer):
        if around:
            nearest = max(around, key=lambda k: len(schedule.columns[k]))
            own[nearest] -= cost[schedule.columns[j]]
    computed = sum(own[j] for _, j, letter in executed(schedule) if letter == COMPUTE)
    return rest * schedule.steps + computed


def sources(schedule: Schedule, branch: str = "") -> Iterator[tuple[int, int, list[int]]]:
    """(step, column, computed steps that are read) of everything repeated or forecast, in order."""
    computed: dict[int, list[int]] = {}
    for i, j, letter in executed(schedule, branch):
        past = computed.setdefault(j, [])
        if letter == COMPUTE:
            past.append(i)
        elif letter in (REUSE, FORECAST):
            yield i, j, past[-(schedule.order + 1 if letter == FORECAST else 1) :]


def last_reads(schedule: Schedule, branch: str = "") -> dict[tuple[int, int], int]:
    """(step, column) of every computed output that is read later -> the step that reads it last."""
    return {(k, j): i for i, j, steps in sources(schedule, branch) for k in steps}


def peak_memory(schedule: Schedule, sizes: Mapping[str, int], branch: str = "") -> int:
    """Most bytes kept at once for one branch, where an output of a column has `sizes` bytes."""
    reads, peak = last_reads(schedule, branch), 0
    for step in range(schedule.steps):
        held = [sizes[schedule.columns[j]] for (i, j), end in reads.items() if i <= step < end]
        peak = max(peak, sum(held))
    return peak


# -- on disk ---------------------------------------------------------------------------------


def to_artifact(
    schedule: Schedule, denoiser: Denoiser, *, method: str, grid: Sequence[float], **more: Any
) -> Artifact:
    """The schedule with the model and the noise levels (a row each) it holds for.

    `more`: further fields of the artifact, such as `guidance`, `inputs_sha256`, `seed`.
    """
    import torch

    tables = [torch.tensor([list(row.encode()) for row in t]) for t in schedule.tables()]
    settings = {
        "columns": list(schedule.columns),
        "branches": [name for name, _ in schedule.branches],
        "order": schedule.order,
        **more.pop("settings", {}),
    }
    return Artifact(
        method=method,
        fingerprint=Fingerprint.of(denoiser.module),
        tensors={"actions": torch.stack(tables).to(torch.uint8)},  # (tables, steps, columns)
        match="architecture",
        grid=tuple(grid),
        settings=settings,
        **more,
    )


def of_artifact(artifact: Artifact) -> Schedule:
    """The inverse of `to_artifact`. Raises ValueError where the artifact holds no schedule."""
    try:
        actions, settings = artifact.tensors["actions"], artifact.settings
        tables = [tuple(bytes(row).decode("ascii") for row in t) for t in actions.tolist()]
        names, columns, order = settings["branches"], settings["columns"], settings["order"]
        branches = tuple(zip(names, tables[1:], strict=True))
        schedule = Schedule(tuple(columns), tables[0], branches, order)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"artifact of {artifact.method} holds no schedule: {error}") from error
    if len(artifact.grid) != schedule.steps:
        raise ValueError(
            f"artifact of {artifact.method}: {schedule.steps} rows for {len(artifact.grid)} levels"
        )
    return schedule
