"""Time-Shift Sampler (Li et al. 2024) on any pipeline with a DDIM, DDPM or PNDM scheduler.

What the schedulers of ``samplers.shifted_time`` do, decided for every sample alone: the network is
told a time for each, which a scheduler by itself cannot do. So a sample does not depend on its
batch mates, and guidance by doubled batches is served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from accel.artifact import Artifact, fingerprints, inputs_digest
from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method, attached
from samplers.host import check_step_call, made_for


@dataclass(frozen=True)
class TimeShift(Method):
    """Tell the network the time that a sample's variance shows.

    ``window`` and ``cutoff`` in timesteps, ``variant`` as in ``samplers.shifted_time``;
    ``variance_model`` "signal" counts the data's own variance ``v0``; ``scheduler``: a diffusers
    class name, instead of the pipeline's own.

    Both have to be found for a model and a number of steps (``calibrate``): the paper's range from
    2 to 80 and from 200 to 900, and wrong ones are worse than none. On our model the variant
    "constant", half a window whatever a sample's variance, is nearer to real pictures than "paper".
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
        check_step_call(pipe, self._made_for(pipe))
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
        live.replaced = not isinstance(live.scheduler, type(pipe.scheduler))
        live.patch.swap(pipe, "scheduler", live.scheduler)
        for denoiser in denoisers(pipe):
            live.around_denoiser(denoiser.slot, live.tell(denoiser))

    @staticmethod
    def calibrate(
        pipe: Any,
        inputs: list[dict[str, Any]],
        seeds: list[int],
        score: Callable[[Any], float],
        candidates: tuple[TimeShift, ...],
    ) -> Artifact:
        """Choose among ``candidates`` for this model and this number of steps.

        ``score`` takes the outputs (n, ...) of all calls and is lower for better ones, such as a
        Frechet distance. The calls are scored in two halves, each on the same seeds without any
        shift; a candidate has to beat that in both, and the best of those wins. If there is none,
        the choice is no shift. The artifact holds the choice and every score.

        Args:
            inputs: arguments of pipeline calls, without generators and output type.
            seeds: one for each call.

        Raises:
            ValueError: fewer than two calls, as many seeds, no candidates, or another base
                scheduler in some of them.
        """
        import torch

        bases = {method.scheduler for method in candidates}
        if len(inputs) < 2 or len(inputs) != len(seeds) or len(bases) != 1:
            raise ValueError(
                "TimeShift.calibrate wants two calls or more, a seed for each, and candidates "
                f"with one scheduler; got {len(inputs)}, {len(seeds)} and {bases or 'none'}"
            )
        methods = (TimeShift(window=0, scheduler=bases.pop()), *candidates)
        calls = list(zip(inputs, seeds, strict=True))
        table = torch.tensor(
            [
                [score(_outputs(pipe, m, half)) for half in (calls[::2], calls[1::2])]
                for m in methods
            ]
        )
        better = (table < table[0]).all(dim=1)
        better[0] = True  # if nothing else
        chosen = int(table.sum(dim=1).where(better, torch.inf).argmin())
        return Artifact(
            method=TimeShift.name(),
            **fingerprints(pipe),
            tensors={"scores": table},
            inputs_sha256=inputs_digest(inputs),
            settings={
                "chosen": methods[chosen].to_json()["settings"],
                "scored": [m.to_json()["settings"] for m in methods],
                "seeds": seeds,
            },
        )

    @classmethod
    def calibrated(cls, artifact: Artifact, pipe: Any) -> TimeShift:
        """The choice in an artifact. Raises ValueError where it is not for the model of `pipe`."""
        artifact.check_pipeline(pipe)
        return cls.from_settings(artifact.settings["chosen"])

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
        return made_for(pipe.scheduler, known[wanted], **self._settings())


def _outputs(pipe: Any, method: TimeShift, calls: list[tuple[dict[str, Any], int]]) -> Any:
    """What all calls give under a method, (n, ...)."""
    import numpy as np
    import torch

    made = []
    with attached(method, pipe):
        for arguments, seed in calls:
            generator = torch.Generator().manual_seed(seed)
            made.append(pipe(**arguments, generator=generator, output_type="np")[0])
    return np.concatenate(made)


class _LiveTimeShift(Attached):
    scheduler: Any
    replaced = False  # another solver than the pipeline's, which is a change by itself

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
        if not isinstance(self.scheduler.shifts, int):
            self.count("syncs")  # it is on the device
        shifts = int(self.scheduler.shifts)
        self.count("changed", shifts + self.replaced)
        self.detail["shifted_steps"] = shifts
