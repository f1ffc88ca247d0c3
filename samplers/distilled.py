"""A distilled student in place of the pipeline's denoiser: its weights, its sampler, its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from accel.artifact import Artifact, ArtifactRef
from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from samplers.distillation import merge
from samplers.few_step import few_step_scheduler
from samplers.host import check_step_call, check_steps_asked, sample_generators


@dataclass(frozen=True)
class Distilled(Method):
    """Sample in a few steps with a student's weights.

    ``artifact`` of a training (``samplers.tdm``); ``steps``: fewer than it was trained for.

    The number of steps is the student's, whatever a call asks for. Its guidance is built in: jobs
    and measurements are called without, and a call of your own with guidance is refused. Weights
    are written into the model that is there; what it held is kept in host memory for ``detach``,
    which gives it back: an adapter that is fused meanwhile is gone then.
    """

    SLOTS = ("scheduler", "weights")
    PAPER = "arXiv 2503.06674"

    artifact: ArtifactRef
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Distilled.steps = {self.steps}: at least 1")

    def call_changes(self) -> dict[str, Any]:
        artifact = Artifact.load(self.artifact)
        steps = self.steps or len(artifact.grid)
        return {**artifact.settings["call"], "num_inference_steps": steps}

    def claims(self, pipe: Any) -> frozenset[Claim]:
        slots = frozenset(d.slot for d in denoisers(pipe))
        if len(slots) > 1:
            raise ValueError(
                f"Distilled: {type(pipe).__name__} has {len(slots)} denoisers; a student is of one"
            )
        return frozenset({("scheduler", frozenset({"scheduler"})), ("weights", slots)})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveStudent(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveStudent)
        artifact = Artifact.load(self.artifact)
        artifact.check_method(self.name())
        live.denoiser = denoisers(pipe)[0]
        module = live.denoiser.module
        if any(p.is_meta for p in module.parameters()):
            raise ValueError(
                "Distilled: weights that come and go layer by layer (sequential offload) cannot be "
                "written; use enable_model_cpu_offload()"
            )
        artifact.check_model(module)
        live.steps = self.steps or len(artifact.grid)
        if live.steps > len(artifact.grid):
            raise ValueError(
                f"Distilled.steps = {live.steps}; {self.artifact.path} was trained for "
                f"{len(artifact.grid)}"
            )
        scheduler = few_step_scheduler(pipe, artifact.grid, artifact.settings["eta"])
        check_step_call(pipe, scheduler)
        live.guidance = artifact.settings["guidance"]
        live.noisy = artifact.settings["eta"] < 1
        live.patch.swap(pipe, "scheduler", scheduler)
        live.patch.around(scheduler, "set_timesteps", live.set_timesteps)
        live.patch.around(scheduler, "step", live.step)
        live.around_denoiser(live.denoiser.slot, live.call)
        own = {n.replace(".base_layer.", "."): p for n, p in module.named_parameters()}
        for name, value in merge(own, artifact.tensors):
            live.patch.write(own[name], value)


class _LiveStudent(Attached):
    denoiser: Denoiser
    steps: int
    guidance: float  # that is built in
    noisy: bool  # whether its steps take fresh noise
    rows = 0  # of denoiser calls since the last step
    asked: int | None = None
    generators: list[Any] | None = None  # where the pipeline gives none

    def on_run(self, run: Run) -> None:
        self.rows, self.generators = 0, None
        self.detail["steps_asked"] = self.asked

    def set_timesteps(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scheduler.set_timesteps``: the student's own steps.

        Raises ValueError for a call with timesteps of its own, or that skips some of more steps.
        """
        given = inspect.signature(call_next).bind(*args, **kwargs).arguments
        if given.pop("timesteps", None) is not None:
            raise ValueError(
                "Distilled samples at the times it was trained for; leave timesteps out of the call"
            )
        sigmas = given.pop("sigmas", None)  # some pipelines lay a grid whatever is asked of them
        self.asked = given.get("num_inference_steps")
        if self.asked is None and sigmas is not None:
            self.asked = len(sigmas)
        check_steps_asked(self._pipe(), self.asked, self.steps)
        return call_next(**{**given, "num_inference_steps": self.steps})

    def call(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around the denoiser: how many samples it is asked for.

        Raises ValueError for rows of no class, which only guidance has; DiT's scheduler sees them.
        """
        labels = self.denoiser.argument("class_labels", args, kwargs)
        if labels is not None and self.rows == 0 and self.now is not None and self.now.first:
            self.count("syncs")
            null = cast(Any, self.denoiser.module).config.num_embeds_ada_norm
            if bool((labels == null).any()):
                self._refuse_guidance()
        if self.now is None or self.now.call >= 0:  # else another method asks once more
            self.rows += self.denoiser.batch_rows(args, kwargs)
        self.count("changed")
        return call_next(*args, **kwargs)

    def step(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scheduler.step``: fresh noise follows from the sample where no generator comes.

        Raises ValueError under guidance.
        """
        sample = args[2] if len(args) > 2 else kwargs["sample"]
        if self._in_run and self.rows > len(sample):
            self._refuse_guidance()
        self.rows = 0
        if self.noisy and kwargs.get("generator") is None:
            if self.generators is None or len(self.generators) != len(sample):
                self.count("syncs")
                self.generators = sample_generators(sample)
            kwargs["generator"] = self.generators
        return call_next(*args, **kwargs)

    def _refuse_guidance(self) -> None:
        raise ValueError(
            f"Distilled has guidance of {self.guidance:g} built in; guided again it is too strong "
            "and costs twice as much. Call the pipeline with guidance_scale=1"
        )
