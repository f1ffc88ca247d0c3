"""The one training loop: Accelerate, EMA, cosine learning rate, checkpoints that survive kill -9.

A model brings `loss_of(model, step)`, a pure function of the weights and the step: it draws its own
batch and noise from the step number. So the data position is one integer, and a run that was killed
and resumed takes the same steps as one that was not. A loss that keeps something for a few steps
says how many (`cycle`), and checkpoints are written between them.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accel.checkpoints import Position, restore, save
from accel.compat import accelerate_state


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train. At least one of `steps` and `minutes` must be given.

    steps: stop after this many; minutes: stop after this much time in the loop (both counted from
    the start or the last warm restart); the learning rate follows whichever is nearer its end, so
    only a run limited by steps alone is repeatable to the bit. muon: the matrices that a model
    names (`matrices()`) are trained by Muon (orthogonalised momentum, Jordan 2024), its steps as
    long as AdamW's (Liu et al. 2025). graph: on CUDA the whole step, optimiser and average
    included, is recorded as one graph and replayed, so that a small network's kernels follow each
    other without waiting for Python; the loss (which is given no step then) takes all that differs
    from its `generator` there, which its `seed(step)` sets. Raises ValueError for settings that
    cannot train.
    """

    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.999
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None  # as well; for tests
    log_steps: int = 50
    cycle: int = 1  # steps; checkpoints are written after multiples of it
    muon: bool = False
    graph: bool = False

    def __post_init__(self):
        if self.graph and self.muon:
            raise ValueError("LoopSettings: torch's Muon cannot be recorded; muon or graph")
        if self.steps is None and self.minutes is None:
            raise ValueError("LoopSettings: give steps or minutes")
        if (self.steps is not None and self.steps < 1) or (
            self.minutes is not None and self.minutes <= 0
        ):
            raise ValueError(f"LoopSettings: steps={self.steps}, minutes={self.minutes} train none")


class Ema:
    """Exponential moving average of a model's weights; `min(decay, (1 + t) / (10 + t))` early on.

    Has the `state_dict` pair that Accelerate's checkpoints ask for.
    """

    def __init__(self, model: nn.Module, decay: float, updates: int = 0):
        self.decay = decay
        self.updates = updates
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        device = next(iter(self.weights.values())).device
        self._rate = torch.zeros((), device=device)  # where a recorded step reads it

    def update(self, model: nn.Module) -> None:
        self.advance()
        self.average(model)

    def advance(self) -> None:
        """Counts an update: what it needs from the host."""
        self.updates += 1
        self._rate.fill_(1 - min(self.decay, (1 + self.updates) / (10 + self.updates)))

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Makes it, on the device alone."""
        pairs = [(self.weights[name], value) for name, value in model.state_dict().items()]
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
        means = [mean for mean, _ in pairs if mean.is_floating_point()]
        values = [value.to(mean.dtype) for mean, value in pairs if mean.is_floating_point()]
        change = torch._foreach_sub(values, means)
        torch._foreach_mul_(change, self._rate)
        torch._foreach_add_(means, change)

    def state_dict(self) -> dict:
        return {"updates": torch.tensor(self.updates), **self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.updates = int(state["updates"])
        for name, mean in self.weights.items():
            mean.copy_(state[name])


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator on a device that depends on (seed, step) only."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def step_seed(seed: int, step: int) -> int:
    """What a generator is seeded with for a step."""
    return (seed << 40) + step


@contextmanager
def _own_state() -> Iterator[None]:
    """Accelerate's device and precision, which are those of a process, for one training alone."""
    shared = accelerate_state()
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


@_own_state()
def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Any, Any], Tensor],
    settings: LoopSettings,
    out: Path,
    *,
    cpu: bool = True,
    precision: str = "no",
    resume: bool = False,
    start: Position | None = None,
) -> tuple[dict[str, Tensor], Position]:
    """Trains `model` in place; returns its EMA weights and the final position.

    `out` receives `checkpoint-<step>` folders (the last two are kept). `resume` continues from the
    newest that can be read, or from the beginning where there is none. `precision` is Accelerate's
    name for mixed precision ("no", "bf16"). `start` is the position of a warm restart: the model
    already has its weights, the optimiser is new. Raises ValueError where there are checkpoints and
    none can be read, FloatingPointError when the loss is no longer finite; the
    checkpoints before that remain.
    """
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    groups = parameter_groups(model)
    made = _optimizers(model, groups, settings, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *made)
    position = start or Position()
    bare = accelerator.unwrap_model(model)
    ema = Ema(bare, settings.ema_decay, position.step)
    accelerator.register_for_checkpointing(ema)
    if resume:
        position = restore(name, accelerator, out) or position

    def take(step: int | None) -> Tensor:
        with accelerator.autocast():
            loss = loss_of(model, step)
        accelerator.backward(loss)
        for group in groups:
            accelerator.clip_grad_norm_(group["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.average(bare)
        return loss.detach()

    rated = [group for optimizer in optimizers for group in optimizer.param_groups]
    stepped = _Recorded(take, loss_of, rated, accelerator.device) if settings.graph else take
    report, saved = _Report(name, settings, position), time.monotonic()
    while _progress(settings, position) < 1:
        for group in rated:
            _set(group, "lr", group["rate"] * learning_rate(settings, position))
        ema.advance()
        loss = stepped(position.step)
        position.step += 1
        report.add(loss)
        every = settings.checkpoint_steps
        due = time.monotonic() - saved > settings.checkpoint_seconds
        due |= bool(every) and position.step % every == 0
        if due and position.step % settings.cycle == 0:
            report.require_finite()
            save(accelerator, position, out)
            saved = time.monotonic()
    report.require_finite()
    save(accelerator, position, out)
    return ema.weights, position


def _set(group: dict, name: str, value: float) -> None:
    """A number of an optimiser's group, in place where a recorded step reads it."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


class _Recorded:
    """A step that is recorded once and replayed; on a CPU it is taken as it is.

    The first steps are taken before that, on the stream that is recorded: they compile, choose
    algorithms and make the optimiser's state.
    """

    BEFORE = 3

    def __init__(
        self, take: Callable[[int | None], Tensor], loss_of: Any, groups: list[dict], device: Any
    ):
        self._take, self._loss_of = take, loss_of
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: Any = None
        self._loss = torch.empty(0)
        self._taken = 0
        for group in groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def __call__(self, step: int) -> Tensor:
        self._loss_of.seed(step)
        if self._stream is None:
            return self._take(None)
        self._taken += 1
        if self._taken <= self.BEFORE:
            return self._beside()
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return self._loss.clone()

    def _beside(self) -> Tensor:
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable")
            loss = self._take(None)
        now.wait_stream(self._stream)
        return loss

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._loss_of.generator)
        with torch.cuda.graph(graph, stream=self._stream):
            self._loss = self._take(None)
        print("the step is recorded", flush=True)
        return graph


def parameter_groups(model: nn.Module) -> list[dict]:
    """`model.parameter_groups()` where it has them, else one of all its parameters.

    A group is {"params": [...], "rate": its share of the learning rate}. Gradients are clipped in
    each alone, and a group without any in a step stays as it is.
    """
    own = getattr(model, "parameter_groups", None)
    return own() if own else [{"params": list(model.parameters()), "rate": 1.0}]


def _optimizers(model: Any, groups: list[dict], settings: LoopSettings, device: Any) -> list:
    """AdamW and, if it is wanted, Muon on the model's matrices."""
    own = {id(p) for p in model.matrices()} if settings.muon else set()

    def parts(matrices: bool) -> list[dict]:
        kept = [[p for p in g["params"] if (id(p) in own) == matrices] for g in groups]
        rated = zip(kept, groups, strict=True)
        return [{"params": params, "rate": g["rate"]} for params, g in rated if params]

    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    kind = {"fused": True, "capturable": device.type == "cuda"} if settings.graph else {}
    made: list = [torch.optim.AdamW(parts(False), betas=settings.betas, **kind, **common)]
    if own:
        made.append(torch.optim.Muon(parts(True), adjust_lr_fn="match_rms_adamw", **common))
    return made


class _Report:
    """Keeps the time, the curve and the reader of the log up to date; stops at a broken loss."""

    def __init__(self, name: str, settings: LoopSettings, position: Position):
        self.name, self.settings, self.position = name, settings, position
        self.first, self.earlier, self.start = position.step, position.seconds, time.monotonic()
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """One step was taken, with this loss."""
        position = self.position
        position.seconds = self.earlier + time.monotonic() - self.start
        self.losses.append(loss)
        if position.step % self.settings.log_steps:
            return
        mean = self.require_finite()
        self.losses.clear()
        position.curve.append((position.step, float(f"{mean:.5g}")))
        self._print(mean)

    def require_finite(self) -> float:
        """Mean loss since the last entry of the curve, 0 of none; waits for the device.

        Raises FloatingPointError where it is not finite: nothing is saved then.
        """
        mean = torch.stack(self.losses).mean().item() if self.losses else 0.0
        if not math.isfinite(mean):
            raise FloatingPointError(f"{self.name}: loss {mean} at step {self.position.step}")
        return mean

    def _print(self, loss: float) -> None:
        position, done = self.position, _progress(self.settings, self.position)
        rate = (position.step - self.first) / (position.seconds - self.earlier)
        left = (position.seconds - position.origin_seconds) * (1 - done) / done
        print(
            f"{self.name}: step {position.step} {100 * done:.1f} % loss {loss:.4f} "
            f"{rate:.2f} steps/s ETA {max(left, 0) / 60:.1f} min",
            flush=True,
        )


def learning_rate(settings: LoopSettings, position: Position) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    warmup = min(1.0, (position.step - position.origin_step + 1) / settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * _progress(settings, position)))
    return settings.lr * warmup * (0.02 + 0.98 * cosine)


def _progress(settings: LoopSettings, position: Position) -> float:
    """Share of the run that is done, 0 to 1."""
    steps = position.step - position.origin_step
    seconds = position.seconds - position.origin_seconds
    by_steps = steps / settings.steps if settings.steps else 0.0
    by_time = seconds / (60 * settings.minutes) if settings.minutes else 0.0
    return max(by_steps, by_time)
