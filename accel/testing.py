"""The conformance suite: what every method owes its host. Third parties run it on their methods.

.. code-block:: python

    import pytest
    from accel.testing import checks, conform

    @pytest.mark.parametrize("check", checks())
    def test_conformance(check):
        conform(check, MyMethod(strength=0.5), "dit")

Each check builds its own tiny random pipeline (``accel.tiny``) and raises ``AssertionError`` with
the attribute, module or value that differs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.method import (
    EXCLUSIVE_SLOTS,
    MAX_FIELDS,
    STACKING_SLOTS,
    Attached,
    Claim,
    Method,
    NoEffectWarning,
    Recipe,
    attached,
)
from accel.tiny import TINY_NAMES, TinyPipeline, tiny

if TYPE_CHECKING:
    import torch

__all__ = ["TINY_NAMES", "TinyPipeline", "checks", "conform", "host_state", "tiny"]

Check = Callable[[Method, TinyPipeline], None]
_CHECKS: dict[str, Check] = {}


def _check(fn: Check) -> Check:
    _CHECKS[fn.__name__] = fn
    return fn


def checks() -> tuple[str, ...]:
    """Names of all conformance checks."""
    return tuple(_CHECKS)


def conform(check: str, method: Method, pipeline: str) -> None:
    """Run one check of ``method`` on the tiny pipeline called ``pipeline``.

    Raises:
        AssertionError: the method breaks the contract.
    """
    host = tiny(pipeline)
    host.run()  # pipelines leave caches of their own behind at the first run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # tiny runs are short
        _CHECKS[check](method, host)


# -- the checks ------------------------------------------------------------------------------


@_check
def detach_restores_everything(method: Method, host: TinyPipeline) -> None:
    """Bit-equal output, and equal ``vars()`` of everything, after detach."""
    before, state = host.run(), host_state(host.pipe)
    with attached(method, host.pipe):
        host.run()
    assert_same_state(state, host_state(host.pipe))
    assert_equal(before, host.run(), "output after detach")


@_check
def attach_without_run_changes_nothing(method: Method, host: TinyPipeline) -> None:
    state = host_state(host.pipe)
    method.attach(host.pipe).detach()
    assert_same_state(state, host_state(host.pipe))


@_check
def any_detach_order(method: Method, host: TinyPipeline) -> None:
    """With a second method attached before and after; detached first-in-first-out and last."""
    before, state = host.run(), host_state(host.pipe)
    for first_out in (0, 1, 2):
        lives = [m.attach(host.pipe) for m in (_Spy(), method, _Spy())]
        host.run()
        lives.pop(first_out).detach()
        host.run()
        for live in lives:
            live.detach()
        assert_same_state(state, host_state(host.pipe))
    assert_equal(before, host.run(), "output after detaching in any order")


@_check
def neutral_is_bit_equal(method: Method, host: TinyPipeline) -> None:
    """Holds trivially where there is no neutral setting."""
    neutral = method.neutral()
    if neutral is None:
        return
    before = host.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)  # neutral settings are silent
        with attached(neutral, host.pipe) as live:
            assert_equal(before, host.run(), "output under the neutral setting")
    assert live.report()["effect"] == "none", "a neutral setting reports an effect"


@_check
def exception_leaves_nothing(method: Method, host: TinyPipeline) -> None:
    """A run cut off in the middle does not show in the next one, nor after detach."""
    state = host_state(host.pipe)
    with attached(method, host.pipe):
        expected = host.run()
        _run_cut_off(host)
        assert_equal(expected, host.run(), "run after an interrupted run")
    assert_same_state(state, host_state(host.pipe))


@_check
def runs_are_independent(method: Method, host: TinyPipeline) -> None:
    """The same call gives the same output twice, and after a run of another length."""
    with attached(method, host.pipe):
        first = host.run()
        assert_equal(first, host.run(), "second run")
        if "num_inference_steps" in host.inputs:
            host.run(num_inference_steps=host.inputs["num_inference_steps"] + 1)
            assert_equal(first, host.run(), "run after a longer run")


@_check
def pipelines_are_independent(method: Method, host: TinyPipeline) -> None:
    """Attaching to one pipeline does not change another of the same class."""
    other = tiny(host.name)
    before, state = other.run(), host_state(other.pipe)
    with attached(method, host.pipe):
        host.run()
        assert_equal(before, other.run(), "output of an untouched pipeline")
    assert_same_state(state, host_state(other.pipe))


@_check
def rng_is_untouched(method: Method, host: TinyPipeline) -> None:
    import torch

    before = torch.get_rng_state()
    with attached(method, host.pipe):
        host.run()
    assert_equal(before, torch.get_rng_state(), "global RNG state")


@_check
def unsupported_changes_nothing(method: Method, host: TinyPipeline) -> None:
    """A pipeline of a class nobody knows is refused with ``ValueError``, or works."""
    denoiser = next(getattr(host.pipe, s) for s in _slots(host))
    known = type(denoiser)
    own = {"forward": lambda self, *args, **kwargs: known.forward(self, *args, **kwargs)}
    denoiser.__class__ = type("NobodyKnowsThisModel", (known,), own)
    try:
        state = host_state(host.pipe)
        try:
            method.attach(host.pipe).detach()
        except ValueError as error:
            assert str(error), "the refusal says nothing"  # noqa: PT017 (this is the check)
        assert_same_state(state, host_state(host.pipe))
    finally:
        denoiser.__class__ = known


@_check
def collisions_are_refused(method: Method, host: TinyPipeline) -> None:
    """Attaching twice is refused where a claim is exclusive, naming the method; nothing changes."""
    exclusive = any(slot in EXCLUSIVE_SLOTS for slot, _ in method.claims(host.pipe))
    with attached(method, host.pipe):
        state = host_state(host.pipe)
        try:
            method.attach(host.pipe).detach()
        except ValueError as error:
            assert exclusive, f"refused without an exclusive claim: {error}"  # noqa: PT017
            assert method.name() in str(error), f"does not name the method: {error}"  # noqa: PT017
            assert_same_state(state, host_state(host.pipe))
        else:
            assert not exclusive, "two holders of one exclusive slot"


@_check
def is_a_frozen_value(method: Method, host: TinyPipeline) -> None:
    """Frozen, hashable, comparable, at most eight fields; settings round-trip as JSON."""
    cls = type(method)
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} is not frozen"  # type: ignore[attr-defined]
    assert len(dataclasses.fields(cls)) <= MAX_FIELDS, f"more than {MAX_FIELDS} settings"
    settings = json.loads(json.dumps(method.to_json()))["settings"]
    again = cls.from_settings(settings)
    assert again == method, f"{again} != {method} after a JSON round trip"
    assert hash(again) == hash(method), "equal values hash differently"
    assert again.digest() == method.digest(), "digest differs after a JSON round trip"
    assert inspect.getdoc(cls), f"{cls.__name__} has no docstring"


@_check
def claims_are_declared(method: Method, host: TinyPipeline) -> None:
    """Slots exist, are listed in ``SLOTS``, and paths resolve on the pipeline."""
    for slot, paths in method.claims(host.pipe):
        assert slot in EXCLUSIVE_SLOTS | STACKING_SLOTS, f"unknown slot {slot!r}"
        assert slot in method.SLOTS, f"{slot!r} is not in {type(method).__name__}.SLOTS"
        for path in paths:
            component, _, inner = path.partition(".")
            found = getattr(host.pipe, component, None)
            assert found is not None, f"claims {path!r}: no such component"
            if inner:
                found.get_submodule(inner)


@_check
def report_is_counted_json(method: Method, host: TinyPipeline) -> None:
    with attached(method, host.pipe) as live:
        assert live.report()["runs"] == [], "reports a run before the first one"
        host.run()
        report = live.report()
    assert json.loads(json.dumps(report)) == report, "the report is not plain JSON"
    (run,) = report["runs"]
    missing = {
        *("steps", "calls", "nfe", "branches", "computed", "reused", "skipped", "fallbacks"),
        *("bytes_device", "bytes_host", "syncs", "detail"),
    } - set(run)
    assert not missing, f"the report of a run lacks {sorted(missing)}"
    assert run["steps"] > 0, "no step was counted"
    assert run["calls"] > 0, "no denoiser call was counted"
    assert run["finished"], "the run was not seen to finish"
    assert report["effect"] in ("some", "none")


# -- what is compared ------------------------------------------------------------------------


def host_state(pipe: Any) -> dict[str, Any]:
    """``vars()`` of a pipeline, its schedulers and every submodule, with copies of all tensors."""
    state: dict[str, Any] = {"pipe": _snapshot(vars(pipe))}
    for name, component in pipe.components.items():
        state[f"{name} (identity)"] = id(component)
        if hasattr(component, "named_modules"):
            for path, module in component.named_modules():
                state[f"{name}.{path}"] = _snapshot(vars(module))
        elif hasattr(component, "__dict__"):
            state[name] = _snapshot(vars(component))
    return state


# Rewritten by every ordinary run; ``detach_restores_everything`` compares the output instead.
_RUN_STATE = frozenset({
    *("_step_index", "_begin_index", "num_inference_steps", "timesteps", "sigmas", "_timesteps"),
    *("prk_timesteps", "plms_timesteps", "cur_model_output", "counter", "cur_sample", "ets"),
    *("model_outputs", "lower_order_nums", "last_sample", "this_order", "timestep_list"),
    *("prev_derivative", "dt", "sample", "_num_timesteps", "_current_timestep", "_interrupt"),
    *("_guidance_scale", "_cross_attention_kwargs", "_joint_attention_kwargs"),
})  # fmt: skip


def _snapshot(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: _frozen(v) for k, v in attributes.items() if k not in _RUN_STATE}


def _frozen(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.detach().clone())
    if isinstance(value, types.MethodType):
        return ("method", value.__func__.__qualname__, id(value.__self__))
    if isinstance(value, torch.nn.Module):
        return ("module", id(value))
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (torch.device, torch.dtype)):
        return repr(value)
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return value
    return (type(value).__name__, id(value))


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises ``AssertionError`` naming the first attribute that differs."""
    for place in before.keys() | after.keys():
        assert place in after, f"{place} is gone"
        assert place in before, f"{place} is new"
        _assert_same(before[place], after[place], place)


def _assert_same(a: Any, b: Any, place: str) -> None:
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            assert key in b, f"{place}: attribute {key!r} is gone"
            assert key in a, f"{place}: attribute {key!r} was left behind"
            _assert_same(a[key], b[key], f"{place}[{key!r}]")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b), f"{place}: length {len(b)}, was {len(a)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{place}: tensor values differ"
    else:
        assert a == b, f"{place}: {b!r}, was {a!r}"


def assert_equal(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Raises ``AssertionError`` unless two tensors are bit-equal."""
    import torch

    assert a.shape == b.shape, f"{what}: shape {tuple(b.shape)}, was {tuple(a.shape)}"
    if not torch.equal(a, b):
        worst = (a.double() - b.double()).abs().max().item()
        raise AssertionError(f"{what} differs by up to {worst:.3g}")


# -- tools -----------------------------------------------------------------------------------


class _Interrupted(Exception):
    pass


def _slots(host: TinyPipeline) -> list[str]:
    from accel.clock import denoiser_modules

    return [slot for slot, _ in denoiser_modules(host.pipe)]


def _run_cut_off(host: TinyPipeline) -> None:
    """A run that ends with an exception in its third denoiser call, or in its third step.

    A method may answer calls without the network.
    """
    from accel.patch import Patch

    calls: Counter[str] = Counter()

    def cut(what: str, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        calls[what] += 1
        output = call_next(*args, **kwargs)
        if calls[what] == 3:
            raise _Interrupted
        return output

    patch = Patch()
    for slot in _slots(host):
        patch.around_call(getattr(host.pipe, slot), functools.partial(cut, slot))
    patch.around(host.pipe.scheduler, "step", functools.partial(cut, "step"))
    try:
        host.run()
    except _Interrupted:
        pass
    else:
        raise AssertionError("the run was meant to be cut off")
    finally:
        patch.undo()


@dataclasses.dataclass(frozen=True)
class _Spy(Method):
    """A second method for the suite: counts denoiser and block calls, changes nothing."""

    SLOTS = ("denoiser.call",)

    def neutral(self) -> Method:
        return self

    def claims(self, pipe: Any) -> frozenset[Claim]:
        from accel.clock import denoiser_modules

        slots = frozenset(slot for slot, _ in denoiser_modules(pipe))
        return frozenset({("denoiser.call", slots)})

    def build(self, pipe: Any, live: Attached) -> None:
        from accel.clock import denoiser_modules

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            live.count("computed")
            return call_next(*args, **kwargs)

        for _, denoiser in denoiser_modules(pipe):
            for module in denoiser.modules():
                live.around_call(module, layer)


def spy() -> Recipe:
    """A recipe that counts every module call and changes nothing."""
    return Recipe((_Spy(),))


class GraphKeeper:
    """A backend of `torch.compile` that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable:
        self.graphs.append(graph)
        return graph.forward
