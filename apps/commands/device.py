"""`--device` and `--dtype`, with one meaning in every command that computes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from apps.commands.say import fail

AUTO = "auto"  # the first GPU where there is one, else the CPU


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


NumberType = Annotated[Dtype, typer.Option("--dtype", help="Number type of the model.")]
Kind = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]


def kind_of_device(wanted: str, *, here: bool = True) -> str:
    """Which of "cpu" and "cuda", among whose devices workers share out; exit code 2 for others, and
    for one that is not ``here``, where it must be."""
    if wanted not in (AUTO, "cpu", "cuda"):
        raise fail(f"--device {wanted}: must be cpu, cuda or auto")
    if wanted == "cpu" or (wanted == "cuda" and not here):
        return wanted
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise fail("--device cuda: no CUDA device is available here")
    return "cuda" if available else "cpu"


def plain_pipeline(model: str, device: str, dtype: Dtype) -> Any:
    """A model on one device, silent and without its own recipe.

    Raises:
        ValueError: a device that is not here, which is told before anything is loaded; what
            `accel.load` raises.
    """
    import torch

    import accel
    from accel.loading import quiet_loading

    with quiet_loading():
        pipe = accel.load(model, device=one_device(device), dtype=getattr(torch, dtype.value))
    for live in reversed(accel.live_on(pipe)):
        live.detach()  # a folder's own recipe would be under everything that is looked at
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_device(wanted: str) -> str:
    """A device by the name that torch has for it."""
    return kind_of_device(AUTO) if wanted == AUTO else wanted
