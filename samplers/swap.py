"""Any stock diffusers scheduler, or one of ours, in place of the pipeline's own, with settings.

Settings carry over, noise levels and prediction type do or it is refused. Where a pipeline gives
a stochastic scheduler no generator (81 do not), each sample gets its own, seeded from its first
noise: the result depends on the seed alone, never on batch mates or the global generator. That
costs one wait for the device a run.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accel.clock import Run
from accel.method import Attached, Claim, Method
from accel.settings import Settings
from samplers.host import (
    check_step_call,
    check_steps_asked,
    is_flow,
    made_for,
    noise_scale,
    sample_generators,
    scales_initial_noise,
)

# What diffusers raises for settings that it does not check.
UNCHECKED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
OWN = {"FewStepScheduler": "samplers.few_step", "FewStepFlowScheduler": "samplers.few_step"}


@dataclass(frozen=True)
class SwapScheduler(Method):
    """``scheduler``: a diffusers class name, or FewStepScheduler, FewStepFlowScheduler;
    ``config``: settings over the pipeline's own; ``steps``: instead of the number a call asks for.

    ``SwapScheduler("DPMSolverMultistepScheduler", Settings(use_karras_sigmas=True), steps=15)``
    """

    SLOTS = ("scheduler",)
    PAPER = "diffusers 0.42"

    scheduler: str
    config: Settings = Settings()
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"SwapScheduler.steps = {self.steps}: at least 1")
        parameters = inspect.signature(_scheduler_class(self.scheduler).__init__).parameters
        unknown = sorted(set(self.config) - set(parameters))
        if unknown:
            near = difflib.get_close_matches(unknown[0], parameters, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.scheduler} has no setting {unknown[0]!r}{hint}")

    def claims(self, pipe: Any) -> frozenset[Claim]:
        new = self._made_for(pipe)
        kinds = {True: "flow-matching", False: "diffusion"}
        have, want = kinds[is_flow(pipe.scheduler)], kinds[is_flow(new)]
        if have != want:
            raise ValueError(
                f"{self.scheduler} as configured is a {want} sampler, {type(pipe).__name__} "
                f"holds a {have} model; choose one of its kind (multistep solvers: set "
                "prediction_type and use_flow_sigmas)"
            )
        check_step_call(pipe, new)
        if not scales_initial_noise(type(pipe)) and noise_scale(new) != 1:
            raise ValueError(
                f"{type(pipe).__name__} starts from unit noise whatever its scheduler asks for; "
                f"{self.scheduler} works in sigma space and would give garbage. Choose one with "
                "init_noise_sigma = 1 (DDIM, DDPM, PNDM, DPMSolverMultistep, UniPC)"
            )
        return frozenset({("scheduler", frozenset({"scheduler"}))})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveSwap(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveSwap)
        new = self._made_for(pipe)
        live.differs = type(new) is not type(pipe.scheduler) or _settings(new) != _settings(
            pipe.scheduler
        )
        live.names = {"scheduler": self.scheduler, "instead_of": type(pipe.scheduler).__name__}
        live.takes_generator = "generator" in inspect.signature(new.step).parameters
        live.patch.swap(pipe, "scheduler", new)
        live.patch.around(new, "step", live.step)
        if self.steps is not None:
            live.patch.around(new, "set_timesteps", live.set_timesteps)

    def _made_for(self, pipe: Any) -> Any:
        cls = _scheduler_class(self.scheduler)
        try:
            return made_for(pipe.scheduler, cls, **self.config)
        except UNCHECKED as error:
            said = f"{self.scheduler} cannot be made with {self.config}: {error}"
            raise ValueError(said) from error


class _LiveSwap(Attached):
    differs = True  # in class or configuration from the scheduler it replaces
    steps_asked: int | None = None  # by the call, where `steps` overrides another number
    takes_generator = False
    names: dict[str, str]

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self._generators: list[Any] | None = None

    def on_run(self, run: Run) -> None:
        self._generators = None
        self.detail.update(self.names)
        if self.steps_asked is not None:
            self.detail["steps_asked"] = self.steps_asked

    def set_timesteps(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scheduler.set_timesteps``: lays the grid with our number of steps.

        Raises:
            ValueError: the pipeline (or its caller) gives a grid of its own, or skips steps by
                the number asked for.
        """
        method = self.method
        assert isinstance(method, SwapScheduler)
        given = inspect.signature(call_next).bind(*args, **kwargs).arguments
        own = [k for k in ("timesteps", "sigmas") if given.get(k) is not None]
        if own:
            raise ValueError(
                f"SwapScheduler.steps = {method.steps} cannot apply: this call lays its own grid "
                f"({own[0]}=...); set num_inference_steps in the call instead"
            )
        asked = given.get("num_inference_steps")
        assert method.steps is not None  # else this is not around it
        check_steps_asked(self._pipe(), asked, method.steps)
        self.steps_asked = None if asked == method.steps else asked
        return call_next(**{**given, "num_inference_steps": method.steps})

    def step(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``scheduler.step``: counts, and gives every sample a generator if none came."""
        if self._in_run and (self.differs or self.steps_asked is not None):
            self.count("changed")
        if self.takes_generator and kwargs.get("generator") is None:
            given = inspect.signature(call_next).bind(*args, **kwargs).arguments
            kwargs["generator"] = self._own_generators(given["sample"])
        return call_next(*args, **kwargs)

    def _own_generators(self, sample: Any) -> list[Any]:
        if self._generators is None or len(self._generators) != len(sample):
            self.count("syncs")
            self._generators = sample_generators(sample)
        return self._generators


def _scheduler_class(name: str) -> Any:
    import diffusers

    module = importlib.import_module(OWN[name]) if name in OWN else diffusers
    cls = getattr(module, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and hasattr(cls, "set_timesteps")):
        known = [*OWN, *(n for n in dir(diffusers) if n.endswith("Scheduler"))]
        near = _near(name, known)
        hint = f"near: {', '.join(near)}" if near else "give the class name of one, as in diffusers"
        raise ValueError(f"diffusers has no scheduler {name!r}; {hint}")
    return cls


def _near(name: str, known: list[str]) -> list[str]:
    """Names of classes like one: that begin like it ("DPMSolver++", "euler"), or are spelled so."""
    start = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("scheduler")
    begin = [n for n in known if len(start) > 2 and n.lower().startswith(start)]
    spelled = difflib.get_close_matches(name, known, n=3)
    return list(dict.fromkeys([*spelled, *begin]))[:4]


def _settings(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
