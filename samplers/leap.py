"""Linear proportional leap (Kim et al. 2025, On-device Sora): end a flow's path early, in one step.

The path of a rectified flow becomes straight: then what is left of it can be walked in one step,
x_0 = x - sigma v. Either after a fixed share of the steps, or as soon as the direction of v stops
changing: when its cosine with the last one has not improved for some steps. On digits-wan as many
steps spread evenly are nearer to the full run at every share (``benchmarks/README.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from accel.clock import Run
from accel.denoiser import denoisers
from accel.method import Attached, Claim, Method
from samplers.host import is_flow

Scope = Literal["full", "official"]


@dataclass(frozen=True)
class Leap(Method):
    """Walk the rest of a flow's path in one step.

    ``after``: share of the run's steps (0 to 1) to walk before; none: leap when v is steady.

    Steady is: from ``earliest`` (a share, too) on, ``patience`` steps without an improvement of the
    cosine by ``tolerance``. ``scope`` of the cosine: "full" takes all of v, of the least steady
    sample; "official" the rows of the first sample, channel and frame, as the authors' code does.
    Behind a cache that repeats v every step looks steady: there, use ``after``.
    """

    SLOTS = ("scheduler.modifier", "denoiser.call")
    PAPER = "arXiv 2503.23796"

    after: float | None = None
    earliest: float = 14 / 30
    tolerance: float = 1e-3
    patience: int = 3
    scope: Scope = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = [s for s in (self.after, self.earliest) if s is not None]
        if not all(0 <= s <= 1 for s in shares) or self.tolerance < 0 or self.patience < 1:
            raise ValueError(f"{self}: shares from 0 to 1, tolerance >= 0, patience >= 1 wanted")

    def neutral(self) -> Leap:
        return Leap(after=1.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        name, config = type(pipe).__name__, pipe.scheduler.config
        if not is_flow(pipe.scheduler):
            raise ValueError(f"Leap: {name} holds a diffusion model, whose path is not straight")
        if len(denoisers(pipe)) > 1:
            raise ValueError(f"Leap: {name} ends with another denoiser than it begins with")
        for setting in ("invert_sigmas", "stochastic_sampling"):
            if config.get(setting):
                raise ValueError(f"Leap: {name}'s scheduler has {setting}; leap is not defined")
        slot = frozenset({denoisers(pipe)[0].slot})
        return frozenset(
            {("scheduler.modifier", frozenset({"scheduler"})), ("denoiser.call", slot)}
        )

    def new_live(self, pipe: Any) -> Attached:
        return _LiveLeap(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveLeap)
        if self == self.neutral():
            return
        live.scheduler = pipe.scheduler
        live.patch.around(pipe.scheduler, "step", live.step)
        live.around_denoiser(denoisers(pipe)[0].slot, live.call)


class Steadiness:
    """Tells when a sequence of cosines has stopped to improve."""

    def __init__(self, earliest: int, tolerance: float, patience: int):
        self.earliest, self.tolerance = earliest, tolerance
        self.best, self.patience, self.left = 0.0, patience, patience

    def leaps(self, step: int, cosine: float) -> bool:
        """Whether to leap at this step (counted from 0), whose v has this cosine with the last."""
        if step < self.earliest:
            return False
        if cosine > self.best + self.tolerance:
            self.best, self.left = cosine, self.patience
        else:
            self.left -= 1
        return self.left <= 0


def cosine(v: Tensor, before: Tensor, scope: Scope) -> float:
    """Of two outputs (n, c, [f,] h, w); see ``Leap.scope``. One wait for the device."""
    if scope == "official":
        while v.ndim > 2:
            v, before = v[0], before[0]
        return float(torch.cosine_similarity(v.float(), before.float(), dim=-1).mean())
    pair = (x.float().flatten(1) for x in (v, before))
    return float(torch.cosine_similarity(*pair, dim=1).min())


class _LiveLeap(Attached):
    scheduler: Any

    def on_run(self, run: Run) -> None:
        method = self.method
        assert isinstance(method, Leap)
        self._outputs: dict[int, Any] = {}  # of the calls of one step
        self._before: Tensor | None = None
        self._leapt = False
        self._steadiness: Steadiness | None = None

    def on_run_end(self, run: Run) -> None:
        self._outputs, self._before = {}, None

    def call(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser: after the leap nothing asks for its output."""
        now = self.now
        assert now is not None
        if self._leapt and now.call in self._outputs:
            output = self._outputs[now.call]
            self.count("skipped")
            self.clock.answered(len(output[0]))
            return output
        self.count("computed")
        output = call_next(*args, **kwargs)
        self._outputs[now.call] = output
        return output

    def step(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scheduler.step(v, t, sample)``: walks the rest of the path in one step."""
        run = self.clock.run
        if run is None or not self._in_run:
            return call_next(*args, **kwargs)
        v = args[0] if args else kwargs["model_output"]
        sample = args[2] if len(args) > 2 else kwargs["sample"]
        landed = sample if self._leapt else None
        step, stage = divmod(run.position, run.order)
        if landed is None and stage == 0:  # behind it, v is not that of the step's sample
            if self._leaps(v, step, run):
                sigma = float(self.scheduler.sigmas[run.position])
                landed = (sample.float() - sigma * v.float()).to(sample.dtype)
                self._leapt = True
                self.detail["leapt_at"] = step
            self._before = v
        result = call_next(*args, **kwargs)  # keeps count of the steps
        if landed is None:
            return result
        if isinstance(result, tuple):
            return (landed, *result[1:])
        result.prev_sample = landed
        return result

    def _leaps(self, v: Tensor, step: int, run: Run) -> bool:
        method = self.method
        assert isinstance(method, Leap)
        done, steps = run.made(step)
        if done + 1 >= steps:
            return False  # the last step is one anyway
        if method.after is not None:
            return done + 1 >= _steps(method.after, steps)
        if self._steadiness is None:
            first = _steps(method.earliest, steps)
            self._steadiness = Steadiness(first, method.tolerance, method.patience)
        if self._before is None:
            return False
        self.count("syncs")
        return self._steadiness.leaps(done, cosine(v, self._before, method.scope))


def _steps(share: float, of: int) -> int:
    """A share of some steps, rounded up, but not for the last bits of a product of floats."""
    return math.ceil(share * of - 1e-9)
