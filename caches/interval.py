"""Compute every few steps, reuse or extrapolate in between: the caches that need no training.

With `parts="modules"` and order 0 this is FORA (arXiv 2407.01425), with a higher order TaylorSeer
(arXiv 2503.06923); `parts="deep"` is DeepCache (arXiv 2312.00858) at the granularity of a UNet's
stages: everything below its finest level is reused; `parts="output"` calls the network only every
few steps and extrapolates what it returns, which costs nothing and turns the steps in between
into a multistep solver's. They are the seeds and the yardstick of the schedules that are searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from accel.denoiser import Denoiser, denoisers
from accel.method import Method
from caches._executor import LiveSchedule, Scheduled
from caches.schedule import (
    FORECAST,
    REUSE,
    Schedule,
    block_columns,
    from_steps,
    is_unet,
    module_columns,
)


@dataclass(frozen=True)
class IntervalCache(Scheduled, Method):
    """Compute parts of the denoiser every ``interval`` steps, repeat or extrapolate in between.

    interval: 1 computes always. warmup, tail: first and last steps that compute all. parts:
    "modules" (attentions and feed-forwards), "blocks" (of a transformer), "deep" (a UNet below its
    finest level) or "output" (the whole network). order: of the extrapolation; 0 repeats.
    """

    PAPER = "FORA, arXiv 2407.01425; DeepCache, arXiv 2312.00858"

    interval: int = 2
    warmup: int = 1
    tail: int = 0
    parts: Literal["modules", "blocks", "deep", "output"] = "modules"
    order: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("interval", 1), ("warmup", 1), ("tail", 0), ("order", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"IntervalCache.{name} = {getattr(self, name)}: at least {least}")

    def neutral(self) -> IntervalCache:
        return IntervalCache(1, self.warmup, self.tail, self.parts, self.order)

    def columns(self, pipe: Any) -> tuple[str, ...]:
        found = tuple(c for denoiser in denoisers(pipe) for c in self._columns(denoiser))
        if not found:
            raise ValueError(
                f"IntervalCache finds no attention or feed-forward in this {type(pipe).__name__}; "
                "use parts='deep' or 'output'"
            )
        return found

    def _columns(self, denoiser: Denoiser) -> tuple[str, ...]:
        if self.parts == "output":
            return (denoiser.slot,)
        if self.parts == "modules":
            return module_columns(denoiser)
        if is_unet(denoiser) != (self.parts == "deep"):
            other = "blocks" if self.parts == "deep" else "deep"
            raise ValueError(
                f"IntervalCache(parts={self.parts!r}) cannot go on {denoiser.cls}; "
                f"use parts={other!r}"
            )
        columns = block_columns(denoiser)
        return deep_columns(columns) if self.parts == "deep" else columns

    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        steps, last_of_warmup = len(sigmas), self.warmup - 1

        def computes(step: int) -> bool:
            after = step - last_of_warmup
            return after <= 0 or after % self.interval == 0 or step >= steps - self.tail

        computed = filter(computes, range(steps))
        letter = FORECAST if self.order else REUSE
        return from_steps(live.columns, steps, computed, letter, self.order)


def deep_columns(stages: tuple[str, ...]) -> tuple[str, ...]:
    """Of a UNet's stages those below the finest level.

    Raises:
        ValueError: it has one level only.
    """
    last = max((s for s in stages if ".up_blocks." in s), key=lambda s: int(s.rpartition(".")[2]))
    outermost = (".conv_in", ".down_blocks.0")
    found = tuple(s for s in stages if s != last and not s.endswith(outermost))
    if not any(".up_blocks." in s for s in found):
        raise ValueError("IntervalCache(parts='deep'): the UNet has one level; nothing lies deeper")
    return found
