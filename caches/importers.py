"""Schedules of other projects, as ours.

Each function gives a `Schedule`; nothing is executed from the files. Formats: ECAD's JSON, a router
of HarmoniCa (a table of logits or scores), the step masks of cache-dit, and the key or interval
lists of DeepCache, FORA and Faster Diffusion. To run one, here DeepCache's:

    (denoiser,) = accel.denoiser.denoisers(pipe)
    columns = deep_columns(block_columns(denoiser))  # caches.interval, caches.schedule
    schedule = key_steps((0, 5, 10, 15), 20, columns)
    EvolutionCache.of(schedule, pipe, "mine.safetensors").attach(pipe)  # caches.evolution
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caches.schedule import COMPUTE, REUSE, Schedule, causal, from_steps

if TYPE_CHECKING:
    from accel.denoiser import Denoiser

# ECAD's component names -> modules of a diffusers block, in the order that blocks run them
ECAD_PARTS = {
    "attn1": "attn1",
    "attn2": "attn2",
    "ff": "ff",
    "full_attn": "attn",
    "full_ff": "ff",
    "full_ff_context": "ff_context",
    "single_attn": "attn",
    "single_proj_mlp": "proj_mlp",
    "single_proj_out": "proj_out",
}


def ecad(path: str | os.PathLike[str], denoiser: Denoiser) -> Schedule:
    """A schedule file of ECAD (`cache_schedule.schedule[step][block][component]` = recompute).

    Raises:
        ValueError: it is no such file, or not of a model with these blocks.
    """
    try:
        table = json.loads(Path(path).read_text("utf-8"))["cache_schedule"]["schedule"]
        steps = [
            {int(block): dict(parts) for block, parts in table[key].items()}
            for key in sorted(table, key=int)
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an ECAD schedule: {error}") from error
    blocks = [b.path for b in denoiser.blocks]
    columns: list[str] = []
    rows = []
    for step in steps:
        letters: dict[str, str] = {}
        for block in sorted(step):
            if not 0 <= block < len(blocks):
                raise ValueError(
                    f"{path}: it has a block {block}, {denoiser.cls} has {len(blocks)}"
                )
            for part, computed in step[block].items():
                if part not in ECAD_PARTS:
                    raise ValueError(f"{path}: unknown component {part!r}")
                column = f"{denoiser.slot}.{blocks[block]}.{ECAD_PARTS[part]}"
                letters[column] = COMPUTE if computed else REUSE
        columns = columns or list(letters)
        if set(columns) != set(letters):
            raise ValueError(f"{path}: its steps do not name the same components")
        rows.append("".join(letters[column] for column in columns))
    for column in columns:
        try:
            denoiser.module.get_submodule(column.partition(".")[2])
        except AttributeError as error:
            raise ValueError(f"{path}: {denoiser.cls} has no {column}") from error
    return causal(Schedule(tuple(columns), tuple(rows), order=0))


def harmonica(scores: Any, columns: Sequence[str], threshold: float = 0.1) -> Schedule:
    """A trained router of HarmoniCa: (steps, columns) logits, its last row the first step.

    Columns alternate attention and feed-forward, block by block, as `module_columns` has them for
    DiT. Raises ValueError for another shape.
    """
    if scores.ndim != 2 or scores.shape[1] != len(columns):
        raise ValueError(f"harmonica: a table of {tuple(scores.shape)} for {len(columns)} columns")
    bits = (scores.sigmoid() > threshold).flip(0).tolist()
    rows = ("".join(COMPUTE if bit else REUSE for bit in row) for row in bits)
    return causal(Schedule(tuple(columns), tuple(rows), order=0))


def step_mask(mask: str | Sequence[int], columns: Sequence[str]) -> Schedule:
    """A step mask as cache-dit writes it: "1" computes all columns, "0" repeats them.

    Raises ValueError for anything else.
    """
    bits = [{"0": 0, "1": 1}.get(bit, bit) if isinstance(bit, str) else bit for bit in mask]
    if not set(bits) <= {0, 1}:
        raise ValueError(f"step_mask: {mask!r}; wants ones and zeros")
    computed = [i for i, bit in enumerate(bits) if bit]
    return causal(from_steps(columns, len(bits), computed, order=0))


def intervals(counts: Sequence[int], columns: Sequence[str]) -> Schedule:
    """A list of steps to repeat after each computed one: (1, 2) is compute, 1, compute, 2.

    Raises ValueError for a number below zero.
    """
    if min(counts, default=0) < 0:
        raise ValueError(f"intervals: {list(counts)}; steps to repeat, 0 or more")
    mask = "".join("1" + "0" * count for count in counts)
    return step_mask(mask, columns)


def key_steps(keys: Sequence[int], steps: int, columns: Sequence[str]) -> Schedule:
    """The steps that compute, of a run of so many (DeepCache, FORA, Faster Diffusion).

    Raises ValueError where one is no step of so many.
    """
    return causal(from_steps(columns, steps, keys, order=0))


def per_column(keys: Mapping[str, Sequence[int]], steps: int) -> Schedule:
    """Steps that compute, column by column (pyramid attention broadcast and the like).

    Raises ValueError where one is no step of so many.
    """
    tables = [from_steps((column,), steps, its).rows for column, its in keys.items()]
    return causal(Schedule(tuple(keys), tuple(map("".join, zip(*tables, strict=True))), order=0))
