"""What a worker needs besides the tasks themselves; plain values, so that it travels, no torch."""

from __future__ import annotations

from dataclasses import dataclass

WORK_FOLDER = ".work"  # below the output folder: latents of unfinished tasks


@dataclass(frozen=True)
class WorkerSettings:
    """`out` is the output folder; remote code runs only if a person's flag said so, and commands of
    verifiers only in the tasks whose ids are in `trusted`: no folder can say that for itself.

    `number` tells workers apart; where there are several CUDA devices they are dealt out by it.
    """

    out: str
    trust_remote_code: bool = False
    number: int = 0
    trusted: frozenset[str] = frozenset()
