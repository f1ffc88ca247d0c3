"""Calls of pipelines on this thread's stack: nothing else tells whose a denoiser call is."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FrameType
from typing import Any

from accel import compat
from accel.methods import packages


def calls_of(pipe: Any) -> tuple[FrameType | None, Any]:
    """The call of ``pipe`` that this thread is inside, if it is; and the pipeline whose call is the
    innermost one, if that is another (called from a callback, or by who shares the modules).
    """
    own, other = _code(type(pipe).__call__), None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is own and frame.f_locals.get("self") is pipe:
            break
        if other is None and code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if caller is not pipe and isinstance(caller, _pipeline_class()):
                other = caller
        frame = frame.f_back
    return frame, other


def caller_level(pipe: Any) -> int:
    """The ``stacklevel`` with which a warning of the function that asks points at who called the
    pipeline; outside a call of it, at the first code that is not of a library below.
    """
    call, _ = calls_of(pipe)
    ours = {"accel", "contextlib", "diffusers", "torch", *packages()}
    outside, level = call is None, 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if outside and frame.f_globals.get("__name__", "").partition(".")[0] not in ours:
            return level
        outside |= frame is call
        frame, level = frame.f_back, level + 1
    return level


@functools.lru_cache(maxsize=64)
def _code(call: Any) -> Any:
    return getattr(inspect.unwrap(call), "__code__", None)


@functools.cache
def _pipeline_class() -> type:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline


def guidance_asked(call: FrameType, denoisers: tuple[tuple[str, Any], ...]) -> float | None:
    """The scale of classifier-free guidance in a call; ``None`` if it does not say.

    Where a network is told a scale itself (Flux, LCM), ``guidance_scale`` is that one, and no
    second branch is computed for it.
    """
    given = call.f_locals
    if "true_cfg_scale" in given:
        scale = 1.0 if given.get("do_true_cfg") is False else given["true_cfg_scale"]
    elif any(_is_told_guidance(module) for _, module in denoisers):
        scale = 1.0
    else:
        scale = given.get("guidance_scale")
    return scale if isinstance(scale, (int, float)) else None


def _is_told_guidance(module: Any) -> bool:
    config = getattr(compat.compiled_entry(module), "config", None)
    return getattr(config, "time_cond_proj_dim", None) is not None
