"""What a calibration compares: a pipeline's samples of its inputs; and the grid of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accel.artifact import inputs_digest
from accel.clock import Event, sampling_grid
from accel.measure import mean_psnr, pipeline_samples
from accel.method import Recipe, attached

if TYPE_CHECKING:
    from torch import Tensor


def digest_of(inputs: Sequence[dict[str, Any]], method: str) -> str:
    """SHA-256 of a calibration's inputs, looked at before the work.

    Raises:
        ValueError: none, of several numbers of steps, or others than JSON values.
    """
    if len({str(x.get("num_inference_steps")) for x in inputs}) != 1:
        raise ValueError(f"{method} wants inputs, all of the same number of steps")
    return inputs_digest(list(inputs))


def drawn(pipe: Any, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The samples of every input; call n has noise of seed n."""
    return [pipeline_samples(pipe, x, i) for i, x in enumerate(inputs)]


def noise_levels(pipe: Any, steps: int, call: dict[str, Any] | None = None) -> tuple[float, ...]:
    """Those of a run of so many steps: as a call lays them, which is made, or the scheduler alone.

    Raises:
        ValueError: no call, and the scheduler alone cannot tell.
    """
    if call is None:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise ValueError(
                f"{type(pipe).__name__}: {error}; its noise levels depend on a call: give one"
            ) from error
        return sampling_grid(scheduler)[1][:: getattr(scheduler, "order", 1)]
    found: list[tuple[float, ...]] = []
    with attached(Recipe(()), pipe) as live:
        clock = live.clock

        def note(event: Event) -> None:
            if clock.run is not None:
                found.append(clock.run.step_sigmas)

        end = clock.subscribe(note)
        try:
            pipeline_samples(pipe, {**call, "num_inference_steps": steps}, 0)
        finally:
            end()
    return found[-1]


def fidelity(made: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Mean PSNR in dB, call by call."""
    return sum(map(mean_psnr, made, plain)) / len(plain)
