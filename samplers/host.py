"""What a pipeline and its scheduler ask of each other, read from their sources."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

# Settings that say which noise levels a model was trained at.
LEVELS = frozenset(
    {"beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps"}
    | {"rescale_betas_zero_snr", "snr_shift_scale"}
)
LEAST_SIGNAL = 2.0**-24  # that diffusers' solvers put for none, which they would divide by


@cache
def step_keywords(pipeline_class: type) -> frozenset[str]:
    """Keywords that a pipeline class writes out in its calls of ``self.scheduler.step``.

    None are known of a class without source, such as one that was typed in.
    """
    found: set[str] = set()
    for call in (vars(c)["__call__"] for c in pipeline_class.__mro__ if "__call__" in vars(c)):
        tree = ast.parse(_source(call))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        steps = (c for c in calls if ast.unparse(c.func) == "self.scheduler.step")
        found |= {k.arg for call in steps for k in call.keywords if k.arg}
        if not any(ast.unparse(c.func) == "super().__call__" for c in calls):
            break  # what it inherits is never called
    return frozenset(found)


@cache
def scales_initial_noise(pipeline_class: type) -> bool:
    """Whether a pipeline's first latents have the scale that its scheduler asks for: its source
    multiplies them by ``init_noise_sigma``, or noises a picture by the scheduler itself."""
    signs = ("init_noise_sigma", "self.scheduler.add_noise(")
    return any(sign in _source(c) for c in pipeline_class.__mro__ for sign in signs)


def _source(found: Any) -> str:
    """Of a class or function; nothing of one that has none."""
    try:
        return textwrap.dedent(inspect.getsource(found))
    except (OSError, TypeError):
        return ""


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

    Nothing is clipped where the scheduler does not clip: other classes do by default. Without
    "_use_default_values": there a built and a reloaded scheduler would differ.
    """
    given = {"clip_sample": False, **with_shift(scheduler.config, cls)}
    known = inspect.signature(cls.__init__).parameters
    return {k: v for k, v in given.items() if k in known}


def with_shift(config: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A configuration with the shift of a flow under the name that a class has for it."""
    given, known = dict(config), inspect.signature(cls.__init__).parameters
    for name, other in (("shift", "flow_shift"), ("flow_shift", "shift")):
        if name in known and name not in given and other in given:
            given[name] = given.pop(other)
    return given


def made_for(scheduler: Any, cls: Any, **settings: Any) -> Any:
    """A scheduler of a class for the model of another one: its settings, and `settings` over them.

    A class that would lay other noise levels is given betas that make them the model's.

    Raises:
        ValueError: it cannot have these levels, or would take the network's output for another
            prediction, and `settings` do not say that this is wanted.
    """
    given = carried(scheduler, cls)
    new = cls.from_config(given, **settings)
    if is_flow(scheduler) or is_flow(new):
        return new
    name, instead_of = cls.__name__, type(scheduler).__name__
    kinds = [s.config.get("prediction_type", "epsilon") for s in (scheduler, new)]
    if kinds[0] != kinds[1] and "prediction_type" not in settings:
        raise ValueError(f"{name} knows no {kinds[0]}, which the model of {instead_of} predicts")
    if LEVELS & set(settings) or _same_levels(scheduler, new):
        return new
    takes_betas = "trained_betas" in inspect.signature(cls.__init__).parameters
    if takes_betas and hasattr(scheduler, "alphas_cumprod"):
        least = 0.0 if new.config.get("rescale_betas_zero_snr") else LEAST_SIGNAL
        given["trained_betas"] = _betas(scheduler.alphas_cumprod, least)
        new = cls.from_config(given, **settings)
    if not _same_levels(scheduler, new):
        raise ValueError(
            f"{name} has other noise levels than {instead_of}, at which the model was trained; "
            "choose a scheduler that can be given betas (DDIM, DPMSolverMultistep, UniPC)"
        )
    return new


def _same_levels(one: Any, other: Any) -> bool:
    """Up to what float32 loses in a product, and some signal for none. Or both know no levels."""
    a, b = (getattr(s, "alphas_cumprod", None) for s in (one, other))
    if a is None or b is None:
        return a is b
    close = {"rtol": 1e-3, "atol": 2 * LEAST_SIGNAL}
    return a.shape == b.shape and a.cpu().double().allclose(b.cpu().double(), **close)


def _betas(levels: Any, least: float) -> list[float]:
    """Betas whose cumulative product these levels (T,) are, none of them below `least`."""
    bar = levels.cpu().double().clamp(min=least)
    return [1 - float(bar[0]), *(1 - bar[1:] / bar[:-1]).tolist()]


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
