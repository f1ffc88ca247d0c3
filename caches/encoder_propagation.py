"""Faster Diffusion (NeurIPS 2024, arXiv 2312.09608): a UNet's encoder runs at key steps only.

Between them the decoder works on the features of the last key step with its own time embedding; the
sample enters the solver alone. Decoders of one interval do not depend on each other, so they may
run as one batch. The fidelity that is lost is paid back with a little of the first noise in the
second half of the run, scaled as the scheduler's samples are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from caches._executor import LiveSchedule, Scheduled
from caches._outputs import first_leaf, map_tensors
from caches.schedule import REUSE, Schedule, block_columns, from_steps, is_unet

PAPER_STEPS = 50  # the key steps are of a run of so many


@dataclass(frozen=True)
class EncoderPropagation(Scheduled, Method):
    """Run a UNet's encoder and middle at key steps, and its decoder at all.

    keys: key steps of a run of 50, carried over to other numbers as shares of it. every: instead
    of them, every so many steps; 0 takes the keys. noise: share of the first noise that is added
    below the share ``noise_below`` of the timesteps; 0 adds none. parallel: the decoders up to the
    next key step run as one batch, which needs as many times the memory.
    """

    SLOTS = ("block.skip", "denoiser.call", "scheduler.modifier")
    PAPER = "Faster Diffusion, arXiv 2312.09608"

    keys: tuple[int, ...] = (0, 1, 2, 3, 5, 10, 15, 25, 35)
    every: int = 0
    noise: float = 0.003
    noise_below: float = 0.5
    parallel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0 or (not self.every and 0 not in self.keys):
            raise ValueError(
                f"EncoderPropagation(keys={self.keys}, every={self.every}): the first step must be "
                "a key step"
            )
        if not all(0 <= key < PAPER_STEPS for key in self.keys):
            raise ValueError(
                f"EncoderPropagation.keys = {self.keys}: steps of a run of {PAPER_STEPS}"
            )
        if self.noise < 0 or not 0 <= self.noise_below <= 1:
            raise ValueError(f"{self}: noise >= 0 and noise_below in [0, 1] wanted")

    def neutral(self) -> EncoderPropagation:
        return EncoderPropagation(every=1, noise=0.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        claims = super().claims(pipe)
        return claims | {("scheduler.modifier", frozenset({"scheduler"}))} if self.noise else claims

    def new_live(self, pipe: Any) -> Attached:
        return _LiveEncoder(self, pipe)

    def columns(self, pipe: Any) -> tuple[str, ...]:
        return tuple(c for denoiser in denoisers(pipe) for c in encoder_columns(denoiser))

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveEncoder)
        super().build(pipe, live)
        live.parallel = self.parallel and self.every != 1
        if live.parallel:
            for denoiser in denoisers(pipe):
                live.around_denoiser(denoiser.slot, live.ahead(denoiser))
        if self.noise:
            live.follow(pipe.scheduler)

    def key_steps(self, steps: int) -> frozenset[int]:
        """Key steps of a run of so many."""
        if self.every:
            return frozenset(range(0, steps, self.every))
        return frozenset(min(round(k * steps / PAPER_STEPS), steps - 1) for k in self.keys)

    def plan(self, live: LiveSchedule, sigmas: tuple[float, ...]) -> Schedule:
        return from_steps(live.columns, len(sigmas), self.key_steps(len(sigmas)), REUSE, 0)


class _LiveEncoder(LiveSchedule):
    """Adds the decoders that ran ahead, and the first noise."""

    parallel = False

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.followed: list[Any] = []  # schedulers whose steps get noise

    def follow(self, scheduler: Any) -> None:
        """Act on the steps of a scheduler; which one the pipeline has may change."""
        if not any(known is scheduler for known in self.followed):
            self.followed.append(scheduler)
            self.patch.around(scheduler, "step", self.inject)

    def on_run(self, run: Run) -> None:
        super().on_run(run)
        if self.followed:
            self.follow(self.clock.scheduler)
        self.ready: dict[tuple[str, int], Any] = {}  # (branch, step) -> output
        self.first_noise: Any = None

    def on_run_end(self, run: Run) -> None:
        super().on_run_end(run)
        self.ready, self.first_noise = {}, None

    def ahead(self, denoiser: Denoiser) -> Callable:
        """The layer that computes an interval's decoders at its key step."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now, run = self.clock.now, self.clock.run
            assert now is not None
            assert run is not None
            rows = denoiser.batch_rows(args, kwargs)
            ready = self.ready.pop((now.branch, now.step), None)
            if ready is not None and len(first_leaf(ready)) == rows and now.stage == 0:
                return ready
            output = call_next(*args, **kwargs)
            steps = self._interval(now)
            if steps:
                times = [run.timesteps[step * run.order] for step in steps]
                self._run_ahead(denoiser, call_next, args, kwargs, (now.branch, steps, times))
            return output

        return layer

    def _interval(self, now: Any) -> list[int]:
        """Steps after this key step that the decoder may run ahead for; one-stage solvers only."""
        table, run = self.rows_of(now.branch), self.clock.run
        assert run is not None
        if run.order != 1 or REUSE in table[now.step]:
            return []
        steps = []
        for step in range(now.step + 1, run.steps):
            if REUSE not in table[step]:
                break
            steps.append(step)
        return steps

    def _run_ahead(
        self, denoiser: Denoiser, call: Callable, args: tuple, kwargs: dict, of: tuple
    ) -> None:
        import torch

        branch, steps, times = of
        rows = denoiser.batch_rows(args, kwargs)

        def repeated(value: Any) -> Any:
            return value.repeat(len(steps), *[1] * (value.ndim - 1)) if _has(value, rows) else value

        sample = denoiser.sample(args, kwargs)
        # Whole timesteps stay so: a UNet's embedding reads them as they come.
        given = denoiser.argument("timestep", args, kwargs)
        kind = given.dtype if torch.is_tensor(given) else torch.float32
        timestep = torch.tensor(times, dtype=kind, device=sample.device).repeat_interleave(rows)
        args, kwargs = map_tensors(repeated, args), map_tensors(repeated, kwargs)
        args, kwargs = denoiser.replace(args, kwargs, timestep=timestep)
        self.repeat_kept = len(steps)
        try:
            output = call(*args, **kwargs)
        finally:
            self.repeat_kept = 1
        for i, step in enumerate(steps):
            self.ready[branch, step] = map_tensors(
                lambda x, i=i: x[i * rows : (i + 1) * rows], output
            )

    def inject(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """The solver's step, from a sample with some of the first noise."""
        run, method = self.clock.run, self.method
        assert isinstance(method, EncoderPropagation)
        if run is None or run.begin > 0 or not self._in_run:
            return call_next(*args, **kwargs)
        by_name = "sample" in kwargs
        sample = kwargs["sample"] if by_name else args[2]
        scheduler = self.clock.scheduler
        scale = 1.0
        if float(scheduler.init_noise_sigma) > 1.001:  # samples are x (1 + sigma^2)^(1/2)
            scale = (1 + run.sigmas[run.position] ** 2) ** 0.5
        if self.first_noise is None:
            self.first_noise = sample / float(scheduler.init_noise_sigma)
        share = run.timesteps[run.position] / scheduler.config.num_train_timesteps
        if max(run.timesteps) < 2 <= len(run.timesteps):  # of no training: EDM's are log(sigma) / 4
            share = 1 - run.position / len(run.timesteps)
        if share < method.noise_below and self.first_noise.shape == sample.shape:
            self.count("changed")
            sample = sample + method.noise * scale * self.first_noise
        if by_name:
            return call_next(*args, **{**kwargs, "sample": sample})
        return call_next(*args[:2], sample, *args[3:], **kwargs)


def encoder_columns(denoiser: Denoiser) -> tuple[str, ...]:
    """The first convolution, the stages down and the middle of a UNet.

    Raises:
        ValueError: it is no UNet; transformers have no encoder and decoder.
    """
    if not is_unet(denoiser):
        raise ValueError(
            f"EncoderPropagation cannot go on {denoiser.cls}: it has no encoder and decoder; "
            "use IntervalCache"
        )
    return tuple(c for c in block_columns(denoiser) if ".up_blocks." not in c)


def _has(value: Any, rows: int) -> bool:
    return getattr(value, "ndim", 0) > 0 and len(value) == rows
