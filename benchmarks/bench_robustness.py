"""What happens to a cached pipeline in daily use: right, wrong or an error; ours and the peers'.

    python -m benchmarks.bench_robustness

On a tiny random Flux, which every cache here supports. "Right" compares bit for bit or within 1e-5:
a call after anything else with the same call on a fresh pipeline under the same cache; the disabled
pipeline, the untouched second pipeline, and solvers and tasks under a setting that never reuses,
with the pipeline as it is. cache-dit needs the ``peers`` extra.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from accel.method import Method, attached
from accel.patch import Patch
from accel.tiny import TinyPipeline, tiny
from benchmarks.bench_native import here
from benchmarks.results_file import write
from caches.interval import IntervalCache
from caches.native import FirstBlockCache, MagCache, TaylorSeer

STEPS = 6
TOLERANCE = 1e-5
FORK = multiprocessing.get_context("fork")
Cache = Callable[[Any, bool], AbstractContextManager[Any]]  # (pipeline, whether it reuses)


def _ours(bold: Method) -> Cache:
    def cache(pipe: Any, reuses: bool) -> AbstractContextManager[Any]:
        neutral = bold.neutral()
        assert neutral is not None
        return attached(bold if reuses else neutral, pipe)

    return cache


def _diffusers(bold: Any, careful: Any) -> Cache:
    @contextmanager
    def cache(pipe: Any, reuses: bool) -> Iterator[None]:
        pipe.transformer.enable_cache(bold() if reuses else careful())
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return cache


@contextmanager
def _cache_dit(pipe: Any, reuses: bool) -> Iterator[None]:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit

    threshold = 1.0 if reuses else 0.0
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=threshold
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def caches() -> dict[str, Cache]:
    """What is tried."""
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    ratios = [1.0] * STEPS
    return {
        "accel interval, modules": _ours(IntervalCache(2)),
        "accel interval, output": _ours(IntervalCache(2, parts="output", order=1)),
        "accel FirstBlockCache": _ours(FirstBlockCache(1.0)),
        "accel TaylorSeer": _ours(TaylorSeer(2, 1)),
        "accel MagCache": _ours(MagCache(1.0, ratios=tuple(ratios))),
        "diffusers FirstBlockCache": _diffusers(
            lambda: FirstBlockCacheConfig(threshold=1.0), lambda: FirstBlockCacheConfig(threshold=0)
        ),
        "diffusers TaylorSeer": _diffusers(
            lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
            lambda: TaylorSeerCacheConfig(cache_interval=1),
        ),
        "diffusers MagCache": _diffusers(
            lambda: MagCacheConfig(1.0, 3, 0.0, STEPS, ratios),
            lambda: MagCacheConfig(0.0, 0, 1.0, STEPS, ratios),
        ),
        "cache-dit DBCache": _cache_dit,
    }


def _run(host: TinyPipeline, **changes: Any) -> torch.Tensor:
    return host.run(**{"num_inference_steps": STEPS, **changes})


def _apart(work: Callable[[], Any]) -> Any:
    """The result of some work in a process of its own, forked from this one.

    A peer that changes classes must not meet what it left behind in another scenario.
    """
    receive, send = FORK.Pipe(duplex=False)

    def told() -> None:
        try:
            send.send((True, work()))
        except Exception as error:  # noqa: BLE001  # whatever a peer raises is the result
            name = str(error) if isinstance(error, Failed) else type(error).__name__
            send.send((False, name))

    process = FORK.Process(target=told)
    process.start()
    send.close()
    try:
        worked, value = receive.recv()
    except EOFError:
        worked, value = False, "killed"
    process.join()
    if not worked:
        raise Failed(value)
    return value


class Failed(Exception):
    """The name of what was raised apart."""


def _fresh(cache: Cache, seed: int = 0, **changes: Any) -> torch.Tensor:
    """What a call gives on a fresh pipeline in a fresh process."""

    def call() -> Any:
        host = tiny("flux", seed=seed)
        with cache(host.pipe, True):
            return _run(host, **changes).numpy()

    return torch.from_numpy(_apart(call))


def _after(cache: Cache, before: Callable[[TinyPipeline], Any], **changes: Any) -> bool:
    """Does a call after something else give what a fresh pipeline gives?"""
    host = tiny("flux")
    with cache(host.pipe, True):
        before(host)
        return _same(_run(host, **changes), _fresh(cache, **changes))


def _two_rows(host: TinyPipeline) -> dict[str, Any]:
    tensors = {k: v for k, v in host.inputs.items() if torch.is_tensor(v)}
    return {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in tensors.items()}


def _cut_off(host: TinyPipeline) -> None:
    """A run that ends with an exception in its third step."""
    calls = []

    def cut(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError
        return call_next(*args, **kwargs)

    patch = Patch()
    patch.around(host.pipe.scheduler, "step", cut)
    try:
        _run(host)
    except InterruptedError:
        return
    finally:
        patch.undo()


def _heun(cache: Cache) -> bool:
    from diffusers import FlowMatchHeunDiscreteScheduler

    class Heun(FlowMatchHeunDiscreteScheduler):
        """As Flux calls a scheduler."""

        def set_timesteps(self, steps=None, device=None, sigmas=None, mu=None):
            super().set_timesteps(len(sigmas) if steps is None else steps, device)

    host = tiny("flux")
    host.pipe.scheduler = Heun()
    plain = _run(host)
    with cache(host.pipe, False):
        same = _same(_run(host), plain)
    with cache(host.pipe, True):
        _run(host)  # must not fail
    return same


def _image_to_image(cache: Cache) -> bool:
    from diffusers import FluxImg2ImgPipeline

    def call(pipe: Any) -> torch.Tensor:
        inputs = {k: v for k, v in tiny("flux").inputs.items() if k != "num_inference_steps"}
        image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
        return pipe(
            image=image,
            strength=0.5,
            num_inference_steps=2 * STEPS,
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
            **inputs,
        )[0]

    pipe = FluxImg2ImgPipeline(**tiny("flux").pipe.components)
    plain = call(pipe)
    with cache(pipe, False):
        same = _same(call(pipe), plain)
    with cache(pipe, True):
        call(pipe)  # must not fail
    return same


def _second_pipeline(cache: Cache) -> bool:
    one, other = tiny("flux"), tiny("flux", seed=1)
    before = _run(other)
    with cache(one.pipe, True):
        _run(one)
        return _same(_run(other), before)


def _two_cached(cache: Cache) -> bool:
    one, other = tiny("flux"), tiny("flux", seed=1)
    with cache(one.pipe, True), cache(other.pipe, True):
        _run(one)
        return _same(_run(other), _fresh(cache, seed=1))


def _disabled(cache: Cache) -> bool:
    host = tiny("flux")
    before = _run(host)
    with cache(host.pipe, True):
        _run(host)
    return torch.equal(before, _run(host))


def _reuses(cache: Cache) -> bool:
    """Does it do anything here? Else all else would be right for nothing."""
    return not _same(_fresh(cache), _run(tiny("flux")))


SCENARIOS: dict[str, Callable[[Cache], bool]] = {
    "it does reuse": _reuses,
    "the same call twice": lambda c: _after(c, _run),
    "other size after a run": lambda c: _after(c, _run, height=24, width=16),
    "other number of steps after a run": lambda c: _after(c, _run, num_inference_steps=4),
    "larger batch after a run": lambda c: _after(c, _run, **_two_rows(tiny("flux"))),
    "after a run that was cut off": lambda c: _after(c, _cut_off),
    "cut off, then another size": lambda c: _after(c, _cut_off, height=24, width=16),
    "Heun's solver": _heun,
    "image to image": _image_to_image,
    "a second pipeline without it": _second_pipeline,
    "a second pipeline with it": _two_cached,
    "bit for bit after switching off": _disabled,
}


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def tried(cache: Cache, scenario: Callable[[Cache], bool]) -> str:
    """ "right", "wrong", or the error's name."""
    try:
        return "right" if _apart(lambda: scenario(cache)) else "wrong"
    except Failed as error:
        return str(error)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {
        name: {what: tried(cache, scenario) for what, scenario in SCENARIOS.items()}
        for name, cache in caches().items()
    }
    for name, row in rows.items():
        print(name, row, flush=True)
    write("robustness", "cpu", {"environment": here("cpu", None), "protocol": None, "rows": rows})


if __name__ == "__main__":
    main()
