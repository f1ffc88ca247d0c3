"""The training of HarmoniCa's router inside ordinary pipeline calls (specification: router.py)."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from accel.clock import Run
from accel.denoiser import denoisers
from accel.files import write_atomically
from accel.measure import pipeline_samples
from accel.method import Attached, Claim, Method, attached
from caches._hookable import require_whole_feed_forwards
from caches._outputs import first_leaf, map_tensors
from caches._resuming import damaged, other_work

FIRST_LOGIT = 5.0  # of the first row, which always computes; and the bound of all
CHECKPOINT, CURVE = "checkpoint.pt", "curve.json"
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class _Walk(Method):
    """The soft router on a pipeline: modules blend, the denoiser's calls are answered by it."""

    watched: tuple[str, ...] = ()

    def neutral(self) -> Method:
        return self

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return frozenset({("block.skip", frozenset(self.watched))})

    def new_live(self, pipe: Any) -> Attached:
        return LiveWalk(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveWalk)
        (denoiser,) = denoisers(pipe)
        require_whole_feed_forwards(denoiser, "RouterTrainer")
        for place, column in enumerate(self.watched):
            module = denoiser.module.get_submodule(column.partition(".")[2])
            live.around_call(module, live.blending(place))
        live.around_denoiser(denoiser.slot, live.denoise)
        live.patch.around(pipe.scheduler, "step", live.step)


class LiveWalk(Attached):
    """One trajectory: soft modules, what they keep, and the outputs of the present step.

    scores: of every step, (columns,) in 0..1; threshold: above it an output is kept. `on_step` gets
    the step, the student's and the teacher's guided outputs; without it only the student runs.
    `last`: what the solver returned last.
    """

    scores: Sequence[Tensor] = ()
    threshold: float = 0.0
    last: Tensor
    on_step: Callable[[int, Tensor, Tensor], None] | None = None
    guidance: float = 1.0

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.kept: dict[tuple[str, int, int], Any] = {}  # by branch, solver stage and place
        self.teaching = False
        self.calls: list[tuple[Tensor, Tensor]] = []  # (student, teacher) of this step
        self.mix: Mix | None = None  # found in the first step of a run that is learned from

    def on_run(self, run: Run) -> None:
        self.kept.clear()
        self.calls.clear()
        self.mix = None  # the next run may have other rows
        self.sigmas = run.step_sigmas

    def blending(self, place: int) -> Callable:
        """The layer of one module."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            new = call_next(*args, **kwargs)
            if self.teaching:
                return new
            now = self.clock.now
            assert now is not None
            if not self.scores:
                return new
            score, key = self.scores[now.step][place], (now.branch, now.stage, place)
            kept = self.kept.get(key)
            blended = (
                new
                if kept is None
                else map_tensors(lambda a, b: score * a + (1 - score) * b, new, kept)
            )
            held = map_tensors(torch.Tensor.detach, blended)
            if kept is not None:
                keep = score.detach() > self.threshold
                held = map_tensors(lambda a, b: torch.where(keep, a, b), held, kept)
            self.kept[key] = held
            return blended

        return layer

    def denoise(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Teacher and student at the same place; the pipeline goes on with the student's output."""
        now = self.clock.now
        assert now is not None
        if self.on_step is None:
            return call_next(*args, **kwargs)
        self.teaching = True
        try:
            teacher = call_next(*args, **kwargs)
        finally:
            self.teaching = False
        with torch.set_grad_enabled(now.step > 0):
            student = call_next(*args, **kwargs)
        self.calls.append((first_leaf(student), first_leaf(teacher)))
        return map_tensors(torch.Tensor.detach, student)

    def step(self, call_next: Callable, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the solver gets tells how the pipeline guides; then the step is learned from."""
        run = self.clock.run
        if self.on_step is not None and run is not None and self.calls:
            students, teachers = ([pair[k] for pair in self.calls] for k in (0, 1))
            self.calls.clear()
            if self.mix is None:
                self.mix = Mix.of(students, model_output, self.guidance)
            step, channels = run.position // run.order, model_output.shape[1]
            with torch.enable_grad():
                student, teacher = (self.mix(side)[:, :channels] for side in (students, teachers))
                self.on_step(step, student, teacher)
        result = call_next(model_output, *args, **kwargs)
        self.last = first_leaf(result)
        return result


@dataclass(frozen=True)
class Mix:
    """How a pipeline guides: plain + scale (toward - plain), of two branches of a step's outputs.

    rows: of a branch; plain, toward: their places among all branches of the step, equal where
    nothing is guided.
    """

    rows: int
    plain: int
    toward: int
    scale: float

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided output of a step's calls, which hold one branch or several."""
        branches = [part for output in outputs for part in output.split(self.rows)]
        plain, toward = branches[self.plain], branches[self.toward]
        return plain + self.scale * (toward - plain) if self.plain != self.toward else plain

    @classmethod
    def of(cls, outputs: Sequence[Tensor], used: Tensor, scale: float) -> Mix:
        """The way that comes nearest to what the solver was called with, found by trying all.

        Some pipelines (DiT) give the solver the guided output twice. Near means 1e-3 of the largest
        value, or what the pipeline's own type loses: a rounding of the difference (at most twice
        the largest output m), of its product with the scale, and of the sum, which together are at
        most (3 |scale| + 1) eps m.

        Raises:
            ValueError: the pipeline guides in another way.
        """
        outputs = [o[:, : used.shape[1]].detach() for o in outputs]
        most = max(float(o.abs().max()) for o in outputs)
        lost = (3 * abs(scale) + 1) * torch.finfo(outputs[0].dtype).eps * most
        outputs, used = [o.float() for o in outputs], used.detach().float()
        near = max(1e-3 * float(used.abs().max()), lost)
        half = len(used) // 2
        sizes = [len(used), half] if half and torch.equal(used[:half], used[half:]) else [len(used)]
        best = None
        for rows in sizes:
            count = sum(-(-len(o) // rows) for o in outputs)
            for plain, toward in itertools.product(range(count), repeat=2):
                mix = cls(rows, plain, toward, scale)
                made, want = mix(outputs), used[:rows]
                if made.shape == want.shape:
                    apart = float((made - want).abs().max())
                    if apart <= near and (best is None or apart < best[0]):
                        best = apart, mix
        if best is None:
            raise ValueError(
                f"RouterTrainer: what the solver gets is not plain + {scale} (toward - plain) of "
                "two outputs of the step; this pipeline guides in another way"
            )
        return best[1]


class RouterTraining:
    """One training below one folder, resumable at every trajectory."""

    def __init__(
        self,
        trainer: Any,
        pipe: Any,
        inputs: list,
        out: str,
        columns: tuple[str, ...],
        digest: str,
    ) -> None:
        self.trainer, self.pipe, self.inputs, self.columns = trainer, pipe, inputs, columns
        self.digest = digest  # of what is trained
        self.folder = Path(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        scales = {(x.get("guidance_scale"), x.get("true_cfg_scale")) for x in inputs}
        if len(scales) != 1:
            raise ValueError(f"RouterTrainer: inputs of guidance_scale {scales}; want one")
        self.curve: list[tuple[int, float, float]] = []  # trajectory, loss, computed share
        self.trajectory = 0
        self.sigmas, self.guided = self._look_once()
        if len(self.sigmas) < 2:
            raise ValueError("RouterTrainer: a run of one step has nothing to repeat; ask for more")
        generator = torch.Generator().manual_seed(trainer.seed)
        rows = torch.randn(len(self.sigmas), len(columns), generator=generator)
        rows[0] = FIRST_LOGIT
        self.rows = [row.clone().requires_grad_(i > 0) for i, row in enumerate(rows)]
        self.weights = torch.ones(len(self.sigmas))
        self.optimizer = torch.optim.Adam(self.rows[1:], lr=trainer.lr)
        self._resume()

    def logits(self) -> Tensor:
        """(steps, columns)."""
        return torch.stack([row.detach() for row in self.rows])

    def run(self) -> None:
        """Trajectories until the wanted number of updates of every row."""
        trainer = self.trainer
        saved = time.monotonic()
        with frozen(self.pipe), attached(_Walk(self.columns), self.pipe) as live:
            assert isinstance(live, LiveWalk)
            live.threshold, live.guidance = trainer.threshold, self._guidance()
            while self.trajectory < trainer.updates:
                times, due = divmod(self.trajectory, trainer.refresh)
                if due == 0:  # a mean over refreshes: one sample may weigh 20 times another
                    self.weights = (times * self.weights + self._proxy(live)) / (times + 1)
                self._walk(live)
                self.trajectory += 1
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def _walk(self, live: LiveWalk) -> None:
        """One trajectory of the student, an update of every row (and solver stage)."""
        trainer, losses = self.trainer, []
        several = self.pipe.scheduler.order > 1
        live.scores = [row.sigmoid() for row in self.rows]

        def learn(step: int, student: Tensor, teacher: Tensor) -> None:
            if step == 0:
                return
            error = (student - teacher).square().mean()
            loss = self.weights[step] * error + trainer.beta * live.scores[step].sum()
            loss.backward(retain_graph=several)  # the scores of a step are those of all its stages
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                self.rows[step].clamp_(-FIRST_LOGIT, FIRST_LOGIT)
            losses.append(loss.detach())

        live.on_step = learn
        self._sample(live, self.trajectory)
        live.on_step = None
        every = max(1, trainer.updates // 20)
        if self.trajectory % every == 0 or self.trajectory + 1 == trainer.updates:
            share = float((self.logits().sigmoid() > trainer.threshold).float().mean())
            loss = float(torch.stack(losses).mean())
            self.curve.append((self.trajectory, loss, share))
            print(f"router: {self.trajectory} of {trainer.updates}, loss {loss:.3g}, "
                  f"computes {share:.0%}", flush=True)  # fmt: skip

    def _proxy(self, live: LiveWalk) -> Tensor:
        """(steps,) how much caching at a step changes the final sample of this trajectory."""
        soft = [row.detach().sigmoid() for row in self.rows]
        one = torch.ones_like(soft[0])
        weights = torch.ones(len(soft))

        def final(scores: list[Tensor]) -> Tensor:
            live.scores = scores
            self._sample(live, self.trajectory)
            return live.last

        cumulative = self.trainer.proxy == "cumulative"
        before = final([one] * len(soft) if cumulative else soft)
        for step in range(1, len(soft)):
            if cumulative:
                after = final(soft[: step + 1] + [one] * (len(soft) - step - 1))
            else:
                after = final([*soft[:step], one, *soft[step + 1 :]])
            change = (after - before).square()
            weights[step] = change.sum() if self.trainer.reduce == "sum" else change.mean()
            before = after if cumulative else before
        return weights

    def _sample(self, live: LiveWalk, trajectory: int) -> None:
        arguments = self.inputs[trajectory % len(self.inputs)]
        pipeline_samples(self.pipe, arguments, self.trainer.seed + trajectory)

    def _guidance(self) -> float:
        """The scale of the pipeline's own mixing; beside a true one the other is an input of it."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        for name in ("true_cfg_scale", "guidance_scale"):
            if name in known:
                return float(self.inputs[0].get(name, known[name].default))
        return 1.0

    def _look_once(self) -> tuple[tuple[float, ...], bool | None]:
        """The noise levels of a run, and whether it is guided."""
        with attached(_Walk(self.columns), self.pipe) as live:
            assert isinstance(live, LiveWalk)
            pipeline_samples(self.pipe, self.inputs[0], self.trainer.seed)
            return live.sigmas, live.guided

    # -- on disk -----------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "digest": self.digest,
            "trajectory": self.trajectory,
            "rows": self.logits(),
            "weights": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / CHECKPOINT, buffer.getvalue())
        (self.folder / CURVE).write_text(json.dumps(self.curve) + "\n")

    def _resume(self) -> None:
        file = self.folder / CHECKPOINT
        if not file.is_file():
            return
        try:
            state = torch.load(file, weights_only=True)
            digest = state["digest"]
        except (EOFError, LookupError, RuntimeError, TypeError, UnpicklingError):
            raise damaged(file) from None
        if digest != self.digest:
            raise other_work(self.folder, "training")
        with torch.no_grad():
            for row, saved in zip(self.rows, state["rows"], strict=True):
                row.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights, self.trajectory = state["weights"], state["trajectory"]
        self.curve = [tuple(point) for point in state["curve"]]


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """The denoiser's weights need no gradient meanwhile; autograd passes through."""
    (denoiser,) = denoisers(pipe)
    learning = [p for p in denoiser.module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
