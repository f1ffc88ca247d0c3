"""What a calibration compares: a pipeline's samples of its inputs, plain and changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accel.artifact import inputs_digest
from accel.measure import mean_psnr, pipeline_samples

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


def fidelity(made: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Mean PSNR in dB, call by call."""
    return sum(map(mean_psnr, made, plain)) / len(plain)
