"""Pipeline calls for one sample and for several of the same, and what they return as bytes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.search.leg import call_parameters

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
_LISTED = ("prompt", "negative_prompt", "class_labels", "prompt_embeds")
_OWN = ("latents", "generator")  # what a search gives to calls itself
# of a call's arguments, those with a row for every prompt
_ROWS = re.compile(
    r"(negative_)?prompt(_\d)?|(\w+_)?prompt_(embeds|attention_mask|embeds_mask)(_\d)?"
)


def check_single(call: dict[str, Any]) -> None:
    """Raises ``ValueError`` for a call that makes several samples, or whose noise is given."""
    given = [name for name in _OWN if call.get(name) is not None]
    if given:
        raise ValueError(f"search draws the noise of its calls; leave {' and '.join(given)} out")
    counts = [call.get(k) or 1 for k in (*PER_PROMPT, "batch_size")]
    counts += [len(call[k]) for k in _LISTED if isinstance(call.get(k), list | Tensor)]
    if any(n != 1 for n in counts):
        raise ValueError("search wants calls that make one sample each; split this one")


def expanded(
    pipe: Any, call: dict[str, Any], count: int, *, listed: bool = False
) -> dict[str, Any]:
    """The call for ``count`` samples of the same.

    By as many rows where it has embeddings (few pipelines repeat those), or if ``listed``; else by
    the pipeline's own count.

    Raises:
        ValueError: it is not known how.
    """
    takes = call_parameters(pipe)
    if count == 1:
        return dict(call)
    if "class_labels" in call:
        return {**call, "class_labels": list(call["class_labels"]) * count}
    counted = next((k for k in PER_PROMPT if k in takes), None)
    embedded = call.get("prompt_embeds") is not None
    if counted is not None and not listed and not embedded:
        return {**call, counted: count}
    if "batch_size" in takes and not embedded:
        return {**call, "batch_size": count}
    if embedded or isinstance(call.get("prompt"), str | list):
        return {k: _repeated(v, count) if _ROWS.fullmatch(k) else v for k, v in call.items()}
    raise ValueError(f"search cannot batch {type(pipe).__name__}; use batch=1")


def _repeated(value: Any, count: int) -> Any:
    """Texts, lists and tensors of one row (1, ...), as so many; anything else as it is."""
    if isinstance(value, str):
        return [value] * count
    if isinstance(value, list) and len(value) == 1:
        return value * count
    if isinstance(value, Tensor) and len(value) == 1:
        return value.repeat(count, *(1,) * (value.ndim - 1))
    return value


def shown(output: Any) -> list[tuple[np.ndarray, bool]]:
    """Samples of what a pipeline returns, uint8, each with whether some of it is not finite."""
    array = _as_array(output)
    broken = [not np.isfinite(sample).all() for sample in array]
    return list(zip(as_bytes(array), broken, strict=True))


def as_bytes(output: Any) -> np.ndarray:
    """What a pipeline returns, as (n, h, w, c) or (n, frames, h, w, c) uint8."""
    array = _as_array(output)
    if array.dtype == np.uint8:
        return array
    return (np.nan_to_num(array, posinf=1, neginf=0) * 255).round().clip(0, 255).astype("uint8")


def _as_array(output: Any) -> np.ndarray:
    if torch.is_tensor(output):
        output = output.movedim(1 if output.ndim == 4 else 2, -1).float().cpu().numpy()
    if isinstance(output, list):
        output = [np.asarray(x) for x in output]
    return np.asarray(output)
