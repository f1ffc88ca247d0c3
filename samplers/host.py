"""What a pipeline and its scheduler ask of each other, read from their sources."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from functools import cache
from typing import Any


@cache
def step_keywords(pipeline_class: type) -> frozenset[str]:
    """Keywords that a pipeline class writes out in its calls of ``self.scheduler.step``.

    None are known of a class without source, such as one that was typed in.
    """
    try:
        source = textwrap.dedent(inspect.getsource(pipeline_class.__call__))  # type: ignore
    except OSError:
        return frozenset()
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    steps = (c for c in calls if ast.unparse(c.func) == "self.scheduler.step")
    return frozenset(k.arg for call in steps for k in call.keywords if k.arg)


@cache
def scales_initial_noise(pipeline_class: type) -> bool:
    """Whether a pipeline's source multiplies its first latents by ``init_noise_sigma``."""
    classes = [c for c in pipeline_class.__mro__ if c.__module__.startswith("diffusers.pipelines")]
    return any("init_noise_sigma" in inspect.getsource(c) for c in classes)


def check_step_call(pipe: Any, scheduler: Any) -> None:
    """Raises ValueError where the pipeline's call of ``scheduler.step`` would fail."""
    accepted = inspect.signature(type(scheduler).step).parameters
    refused = sorted(step_keywords(type(pipe)) - set(accepted))
    if refused:
        raise ValueError(
            f"{type(pipe).__name__} calls its scheduler with {refused[0]}=..., which "
            f"{type(scheduler).__name__}.step does not take; choose one that does"
        )


def check_steps_asked(pipe: Any, asked: Any, steps: int) -> None:
    """Raises ValueError where a pipeline reckons with the steps it was asked for, not those laid.

    With a ``strength`` it skips a share of the number it was asked for: of 20 steps instead of 50,
    all would be skipped.
    """
    reckons = "strength" in inspect.signature(type(pipe).__call__).parameters
    if reckons and asked != steps:
        raise ValueError(
            f"{type(pipe).__name__} skips steps by the number it is asked for ({asked}), but "
            f"{steps} are made; call it with num_inference_steps={steps}"
        )


def noise_scale(scheduler: Any) -> float:
    """Standard deviation of the noise a scheduler wants to start from (flow: 1)."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def carried(scheduler: Any, cls: type) -> dict[str, Any]:
    """The settings of a scheduler that another class knows, whichever way a flow names its shift.

    Without "_use_default_values": there a built and a reloaded scheduler would differ.
    """
    given = dict(scheduler.config)
    if "flow_shift" in given:  # what multistep solvers call it
        given["shift"] = given["flow_shift"]
    elif "shift" in given:
        given["flow_shift"] = given["shift"]
    known = inspect.signature(cls.__init__).parameters
    return {k: v for k, v in given.items() if k in known}


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler integrates a flow (velocity) rather than a diffusion."""
    config = scheduler.config
    return (
        any(base.__name__.startswith("FlowM") for base in type(scheduler).__mro__)
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def refuse(scheduler: Any, name: str, remedy: str) -> None:
    """Raises ValueError about a setting of the stock scheduler that ours extends."""
    raise ValueError(f"{type(scheduler).__name__}: {name} = {scheduler.config[name]!r}; {remedy}")


def sample_seed(sample: Any) -> int:
    """A seed from the bytes of one sample (any shape): same noise, same seed."""
    import torch

    data = sample.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1


def sample_generators(sample: Any) -> list[Any]:
    """A generator for each sample (n, ...), seeded from its content. Waits for the device."""
    import torch

    return [torch.Generator("cpu").manual_seed(sample_seed(row)) for row in sample]
