"""Trajectory distribution matching (Luo et al. 2025): a student that samples in a few steps.

Needs no data, only inputs to the pipeline. The student walks its own few steps from noise. At each,
what it predicts is noised again, and two networks say where that sample belongs: the teacher, with
guidance, and the *fake*, which is trained all along to denoise what the student makes. Their
difference is the gradient of the divergence between the two distributions. Guidance ends up in the
student, which runs without.

Where this leaves the paper (each measured on a ring of Gaussians, where the paper's own settings do
not converge): several updates of the fake for each of the student, a warm-up of the fake alone, no
importance weights.

A student that is to run under a recipe is trained under it, such as one with block-sparse
attention (Video-BLADE, Gu et al. 2025): so is the fake, which is a copy of it, and the teacher is
not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from accel.artifact import Artifact, Fingerprint, inputs_digest
from accel.clock import Clock, clock_of
from accel.device import forked_rng, on_device
from accel.loop import LoopSettings, fit
from accel.method import Recipe, Trainer, attached
from accel.resuming import require_same_work
from accel.settings import Settings
from samplers.distillation import Call, Draws, Pair, calls_of, compiled_blocks, instead, unguided
from samplers.few_step import few_step_scheduler
from samplers.host import check_step_call
from samplers.predictions import Process, renoise

STUDENT = "samplers.distilled:Distilled"  # the method that samples with what is trained here
SNR_LIMIT = 5.0  # of the fake's loss, as in Min-SNR
HUBER = 1e-3
EMA_DECAY = 0.998  # by step of the loop
LEAST_WEIGHT = 0.02  # of a sample's distance from the teacher, in the denominator
CLEANEST, APART = 0.02, 0.01  # shares of the horizon: least noise, and distance from the anchor
NO_RECIPE = Recipe(())
RUN = "tdm.json"  # in the folder of a training: what it was begun with

Network = Callable[[Tensor, Tensor], Tensor]  # x (n, ...), times (n,) -> output


def even_anchors(count: int, horizon: int = 1000) -> tuple[int, ...]:
    """`count` times, falling from horizon - 1: 899, 674, 449, 224 for 4 of 900."""
    return tuple(round(k * horizon / count) - 1 for k in range(count, 0, -1))


@dataclass(frozen=True)
class State:
    """One step of the student's walk: its input and what it predicted, each (n, ...)."""

    x: Tensor
    clean: Tensor
    noise: Tensor


@torch.no_grad()
def roll_out(
    student: Callable[[Tensor, Tensor, int], Tensor],
    process: Process,
    anchors: tuple[float, ...],
    x: Tensor,
    eta: float,
    generator: torch.Generator,
) -> list[State]:
    """The student's walk from noise x (n, ...) over all anchors."""
    states = []
    for index, anchor in enumerate(anchors):
        times = torch.full((len(x),), float(anchor), device=x.device)
        clean, noise = process.split(student(x, times, index), x, times)
        states.append(State(x, clean, noise))
        if index + 1 < len(anchors):
            following = torch.full((len(x),), float(anchors[index + 1]), device=x.device)
            x = hop(process, clean, noise, following, eta, generator)
    return states


def hop(
    process: Process,
    clean: Tensor,
    noise: Tensor,
    times: Tensor,
    eta: float,
    generator: torch.Generator,
) -> Tensor:
    """The sample (n, ...) at times (n,) that a prediction leads to: the few-step sampler's step."""
    alpha, s = process.levels(times, clean)
    if eta < 1:
        noise = eta * noise + (1 - eta**2) ** 0.5 * _noise(clean, generator)
    return alpha * clean + s * noise


def fake_loss(process: Process, output: Tensor, x: Tensor, clean: Tensor, times: Tensor) -> Tensor:
    """Error (scalar) of the fake's output for x (n, ...), made from `clean`, at times (n,).

    Weighted as its prediction type is trained: for noise, min(SNR, 5); for velocities 1 / s^2,
    which makes it their own squared error.
    """
    predicted, _ = process.split(output, x, times)
    alpha, s = process.levels(times, x)
    velocity = process.prediction in ("flow", "v_prediction")
    weight = 1 / s**2 if velocity else ((alpha / s) ** 2).clamp(max=SNR_LIMIT)
    return (weight * (predicted - clean).square()).mean()


def student_target(
    clean: Tensor, teacher: Tensor, unconditional: Tensor | None, fake: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Where the student's prediction should go (n, ...), and how far the teacher is (n,).

    All are clean samples (n, ...): of the student, and as the others see it noised again.
    `unconditional`, the teacher's, is needed for guidance other than 1.
    """
    guided = teacher
    if unconditional is not None:
        guided = teacher + (guidance - 1) * (teacher - unconditional)
    distance = (clean - guided).abs().flatten(1).mean(dim=1)
    return clean + guided - fake, distance.clamp(min=LEAST_WEIGHT)


def student_loss(clean: Tensor, target: Tensor, distance: Tensor) -> Tensor:
    """Pseudo-Huber distance (scalar) of predictions (n, ...) from their targets over `distance`.

    Its gradient is the difference of the two networks, weighted. Only `clean` gets one.
    """
    error = ((clean - target.detach()).square() + HUBER**2).sqrt() - HUBER
    return (error.flatten(1).mean(dim=1) / distance.detach()).mean()


@dataclass(frozen=True)
class TDM(Trainer):
    """``anchors``: the student's times, falling, in the scheduler's units (flows: 1000 sigma).

    ``guidance`` of the teacher, which needs ``unconditional``: what those calls have instead, such
    as ``Settings(prompt="")``. ``rank`` of low-rank changes; none trains all weights. ``eta``: the
    noise the walk keeps (1: all of it). ``updates``: of the student; each follows ``fake_updates``
    of the fake, and ``warmup`` of those come before the first. ``separate``: a step's samples are
    noised up to its own anchor only. ``precision`` as Accelerate names it. ``minutes``: of
    training at most; the learning rate follows whichever of the two ends is nearer. ``compile``:
    the network's blocks, which takes a while at the start; not with a student's recipe.
    """

    anchors: tuple[float, ...]
    guidance: float = 1.0
    unconditional: Settings = Settings()
    rank: int | None = None
    eta: float = 1.0
    updates: int = 1000
    fake_updates: int = 5
    warmup: int = 200
    lr: float = 1e-4
    fake_lr: float = 5e-4
    separate: bool = True
    precision: Literal["no", "fp16", "bf16"] = "no"
    minutes: float | None = None
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = list(self.anchors) == sorted(set(self.anchors))[::-1]
        if not self.anchors or not falling or self.anchors[-1] <= 0:
            raise ValueError(f"TDM.anchors = {self.anchors!r}: falling times above 0")
        if self.guidance != 1 and not self.unconditional:
            raise ValueError(
                f"TDM.guidance = {self.guidance} needs unconditional, such as "
                "Settings(prompt='') or, for DiT, Settings(class_labels=1000)"
            )
        counts = {n: getattr(self, n) for n in ("updates", "fake_updates", "lr", "fake_lr")}
        if min(counts.values()) <= 0 or self.warmup < 0 or not 0 <= self.eta <= 1:
            raise ValueError(f"{self}: positive {', '.join(counts)}, and eta in [0, 1] wanted")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"TDM.minutes = {self.minutes}: above 0, or None")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"TDM.rank = {self.rank}: 1 or more, or None")

    def fit(
        self,
        pipe: Any,
        inputs: list[dict[str, Any]],
        out: str,
        student_recipe: Recipe = NO_RECIPE,
    ) -> Artifact:
        """Train below `out`, going on where a killed run stopped.

        `inputs`: pipeline calls, each a batch of the training; they are made without guidance
        (a ``guidance_scale`` of their own is what the network is told, as Flux's). The pipeline is
        float32 and stays as it is. The forwards of student and fake run `student_recipe`, of
        methods that keep nothing from step to step. The artifact is for ``Distilled``.

        Raises:
            ValueError: no inputs, guided ones, a pipeline in half precision, with an adapter, or
                whose scheduler no student can replace, anchors beyond its times, compiled blocks
                under a recipe, or `out` holds a training that was begun otherwise.
        """
        if self.compile and student_recipe.methods:
            raise ValueError("TDM.compile: compiled blocks have no gradients of a recipe's methods")
        scheduler = few_step_scheduler(pipe, self.anchors)
        check_step_call(pipe, scheduler)  # else the pipeline could not run the student
        process = Process.of(scheduler)
        if not inputs or self.anchors[0] > process.horizon:
            raise ValueError(
                f"TDM: {len(inputs)} inputs, anchors {self.anchors} of 0 to {process.horizon:g}"
            )
        without = [unguided(pipe, call) for call in inputs]
        calls = [Call.without_guidance(pipe, call) for call in without]
        bare: list[Call | None] = [None] * len(inputs)
        if self.guidance != 1:
            bare = calls_of(pipe, [instead(call, self.unconditional) for call in without])
        network = calls[0].denoiser.module
        if next(network.parameters()).dtype != torch.float32:
            raise ValueError("TDM trains in float32; load the pipeline so, and set precision")
        device = next(network.parameters()).device
        with forked_rng():
            torch.manual_seed(self.seed)
            pair = Pair(network, self.rank, self.fake_lr / self.lr)
        model = Fingerprint.of(network)
        record = {"trainer": repr(self), "recipe": student_recipe.to_json()}
        record |= {"inputs": inputs_digest(inputs), "model": model.digest()}
        require_same_work(Path(out) / RUN, record, "training")
        blocks = compiled_blocks(calls[0].denoiser) if self.compile else nullcontext()
        with attached(student_recipe, pipe), blocks, on_device(device):
            pairs = list(zip(calls, bare, strict=True))
            on = process.to(device)
            losses = _Losses(self, clock_of(pipe), on, pairs, bool(student_recipe.methods))
            averages, _ = fit(
                "tdm",
                pair,
                losses,
                self._loop(),
                Path(out),
                cpu=device.type == "cpu",
                precision=self.precision,
                resume=True,
            )
            clock_of(pipe).end()
        kept = {k.removeprefix("student.values."): v for k, v in averages.items()}
        names = pair.student.names
        return Artifact(
            method=STUDENT,
            fingerprint=model,
            tensors={name: kept[str(i)].half() for i, name in enumerate(names)},
            grid=tuple(float(t) for t in self.anchors),
            guidance=False,
            inputs_sha256=inputs_digest(inputs),
            seed=self.seed,
            settings={
                "eta": self.eta,
                "guidance": self.guidance,
                "call": {k: v for k, v in without[0].items() if k == "guidance_scale"},
                "trainer": repr(self),
            },
        )

    def _loop(self) -> LoopSettings:
        return LoopSettings(
            steps=(self.idle + self.updates) * self.cycle,
            minutes=self.minutes,
            lr=self.lr,
            betas=(0.0, 0.95),
            warmup=1,
            cycle=self.cycle,
            ema_decay=EMA_DECAY,
        )

    @property
    def cycle(self) -> int:
        """Steps of the loop for one update of the student."""
        return self.fake_updates + 1

    @property
    def idle(self) -> int:
        """Cycles before the first of them, in which the fake learns alone."""
        return -(-self.warmup // self.cycle)


class _Losses:
    """Loss of a step: `fake_updates` of the fake, then one of the student, on one walk."""

    def __init__(
        self, settings: TDM, clock: Clock, process: Process, calls: list, under_recipe: bool
    ):
        self.settings, self.clock, self.process = settings, clock, process
        self.calls, self.under_recipe = calls, under_recipe
        times = torch.tensor(settings.anchors, dtype=torch.float32)
        alpha, s = process.levels(times, times)
        sigmas = s if process.alphas is None else s / alpha.clamp(min=1e-6)
        self.grid = SimpleNamespace(timesteps=times, sigmas=sigmas)
        module = calls[0][0].denoiser.module
        # as the student's without gradients, so that compiled blocks serve both
        self.teacher = {name: p.detach() for name, p in module.named_parameters()}
        self._walk: tuple[int, list[State]] = (-1, [])

    def __call__(self, model: Pair, step: int) -> Tensor:
        cycle, at = divmod(step, self.settings.cycle)
        draws = Draws.of(self.settings.seed, step, next(model.parameters()).device)
        call, bare = self.calls[cycle % len(self.calls)]
        if self._walk[0] != cycle:
            self._walk = (cycle, self._roll_out(model, call, draws.noise))
        states = self._walk[1]
        if at < self.settings.fake_updates or cycle < self.settings.idle:
            return self._fake(model, call, states, draws)
        return self._student(model, call, bare, states, draws)

    def _roll_out(self, model: Pair, call: Call, generator: torch.Generator) -> list[State]:
        self.clock.end()
        self.clock.begin(self.grid)  # a walk, and what is learned on it, is a run
        x = torch.randn(call.shape, generator=generator, device=generator.device)
        weights = model.student.merged()

        def student(x: Tensor, times: Tensor, index: int) -> Tensor:
            return self._trained(call, weights, x, times, index)

        s = self.settings
        return roll_out(student, self.process, s.anchors, x, s.eta, generator)

    def _trained(
        self, call: Call, weights: Mapping[str, Tensor], x: Tensor, times: Tensor, index: int,
        branch: str = "cond",
    ) -> Tensor:  # fmt: skip
        """Output under the recipe, as in step `index` of the student."""
        with self.clock.at(index, branch=branch, sigma=float(self.grid.sigmas[index])):
            return call(x, times, weights)

    def _noised(self, clean: Tensor, noise: Tensor, steps: Tensor, draws: Draws):
        """Samples noised again from the ends of their steps (n,), and their times (n,).

        `steps` are the host's: what follows from them goes to the device without a wait.
        """
        s, process = self.settings, self.process
        ends = torch.tensor([*s.anchors[1:], 0.0])[steps]
        tops = torch.tensor(s.anchors)[steps] if s.separate else torch.tensor(s.anchors[:1])
        low = ends.clamp(min=CLEANEST * process.horizon)
        high = torch.maximum(tops - APART * process.horizon, low + 1)
        times = low + torch.rand(len(steps), generator=draws.host) * (high - low)
        times = times if process.alphas is None else times.floor()
        ends = torch.minimum(ends, times)
        ends, times = (t.to(clean.device, non_blocking=True) for t in (ends, times))
        x = hop(process, clean, noise, ends, s.eta, draws.noise)
        levels = process.levels(ends, x), process.levels(times, x)
        return renoise(x, *levels, _noise(x, draws.noise)), times

    def _fake(self, model: Pair, call: Call, states: list[State], draws: Draws) -> Tensor:
        count = call.shape[0]
        # the clock knows one step a forward
        drawn = 1 if self.under_recipe else count
        steps = torch.randint(len(states), (drawn,), generator=draws.host).expand(count)
        clean = torch.stack([state.clean for state in states])
        at = (steps.to(clean.device, non_blocking=True), torch.arange(count, device=clean.device))
        noise = torch.stack([state.noise for state in states])
        x, times = self._noised(clean[at], noise[at], steps, draws)
        out = self._trained(call, model.fake.merged(), x, times, int(steps[0]), "fake")
        return fake_loss(self.process, out, x, clean[at], times)

    def _student(
        self, model: Pair, call: Call, bare: Call | None, states: list[State], draws: Draws
    ) -> Tensor:
        index = int(torch.randint(len(states), (1,), generator=draws.host))
        start = states[index].x
        at = torch.full((len(start),), float(self.settings.anchors[index]), device=start.device)
        out = self._trained(call, model.student.merged(), start, at, index)
        clean, noise = self.process.split(out, start, at)
        with torch.no_grad():
            steps = torch.full((len(start),), index)
            x, times = self._noised(clean, noise, steps, draws)

            def seen(out: Tensor) -> Tensor:
                return self.process.split(out, x, times)[0]

            fake = seen(self._trained(call, model.fake.merged(), x, times, index, "fake"))
            with self.clock.unheard():
                teacher = seen(call(x, times, self.teacher))
                unconditional = None if bare is None else seen(bare(x, times, self.teacher))
            target, distance = student_target(
                clean, teacher, unconditional, fake, self.settings.guidance
            )
        return student_loss(clean, target, distance)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
