"""Time-Shift Sampler (Li et al. 2024) on any pipeline with a DDIM, DDPM or PNDM scheduler.

What the schedulers of ``samplers.shifted_time`` do, decided for every sample alone: the network is
told a time for each, which a scheduler by itself cannot do. So a sample does not depend on its
batch mates, and guidance by doubled batches is served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method


@dataclass(frozen=True)
class TimeShift(Method):
    """``window`` and ``cutoff`` in timesteps, ``variant`` as in ``samplers.shifted_time``;
    ``variance_model`` "signal" counts the data's own variance ``v0``; ``scheduler``: a diffusers
    class name, instead of the pipeline's own.

    Both have to be found for a model and a number of steps: the paper's range from 2 to 80 and from
    200 to 900, and wrong ones are worse than none.
    """

    SLOTS = ("scheduler", "denoiser.call")
    PAPER = "arXiv 2305.15583"

    window: int = 40
    cutoff: int = 200
    variant: Literal["paper", "pnm", "adm", "constant"] = "paper"
    variance_model: Literal["noise", "signal"] = "noise"
    v0: float | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        from samplers.shifted_time import ShiftedTime

        super().__post_init__()
        ShiftedTime.check(self._settings())

    def neutral(self) -> TimeShift | None:
        return None if self.scheduler else TimeShift(window=0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        self._made_for(pipe)
        reads = self.window and self.variant != "constant"  # the variance of samples
        if reads and self.variance_model == "noise" and hasattr(pipe, "vae"):
            raise ValueError(
                f"TimeShift: {type(pipe).__name__} samples latents, whose own variance is near "
                "that of noise, so variance does not tell time. Measure it (v0) over clean latents "
                "and set variance_model='signal'; above 0.8 that is refused, too"
            )
        slots = frozenset(d.slot for d in denoisers(pipe))
        return frozenset({("scheduler", frozenset({"scheduler"})), ("denoiser.call", slots)})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveTimeShift(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveTimeShift)
        live.scheduler = self._made_for(pipe)
        live.scheduler.reads_conditioning = True
        live.patch.swap(pipe, "scheduler", live.scheduler)
        for denoiser in denoisers(pipe):
            live.around_denoiser(denoiser.slot, live.tell(denoiser))

    def _settings(self) -> dict[str, Any]:
        names = ("window", "cutoff", "variant", "variance_model", "v0")
        return {name: getattr(self, name) for name in names} | {"per_sample": True}

    def _made_for(self, pipe: Any) -> Any:
        from samplers.shifted_time import SCHEDULERS

        wanted = self.scheduler or type(pipe.scheduler).__name__.removeprefix("TimeShift")
        known = {cls.__name__.removeprefix("TimeShift"): cls for cls in SCHEDULERS}
        if wanted not in known:
            raise ValueError(
                f"TimeShift: no shifted form of {wanted}; set scheduler to one of "
                f"{', '.join(known)}"
            )
        return known[wanted].from_config(pipe.scheduler.config, **self._settings())


class _LiveTimeShift(Attached):
    scheduler: Any

    def tell(self, denoiser: Denoiser) -> Callable:
        """A layer that tells a denoiser the time of each sample, where it is not the grid's."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            times = self.scheduler.conditioning
            if times is None:
                return call_next(*args, **kwargs)
            copies = denoiser.batch_rows(args, kwargs) // len(times)  # batched guidance: 2
            args, kwargs = denoiser.replace(args, kwargs, timestep=times.repeat(copies))
            return call_next(*args, **kwargs)

        return layer

    def on_run_end(self, run: Run) -> None:
        self.count("changed", self.scheduler.shifts)
        self.detail["shifted_steps"] = self.scheduler.shifts
