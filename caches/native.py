"""The feature caches that diffusers ships, with their defects turned into errors or mended.

FirstBlockCache (ParaAttention), TaylorSeer (arXiv 2503.06923) and MagCache (arXiv 2506.09045) run
unchanged as diffusers 0.42 has them, but as layers of our patch instead of its hooks. Different: a
model without hookable modules is refused; TaylorSeer's modules come from the table of denoisers
(its own patterns match nothing in DiT, PixArt, Wan, CogVideoX, LTX, and its "lite" ones give noise
on DiT); pipelines that name no guidance branch work (they raise there, or mix branches); state is
cleared when a run starts, the batch changes (guidance that ends early) or a call comes again (its
output was wrong); MagCache knows the run's true length and place. Left as it is: FirstBlockCache
decides on a mean over the batch, so samples depend on batch mates, and waits for the device.
Memory: two to three activations a branch; TaylorSeer (max_order + 1) for every cached module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accel import compat
from accel.artifact import Artifact, ArtifactRef, Fingerprint, inputs_digest
from accel.clock import Run
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method, attached
from caches._drawn import drawn
from caches._hookable import (
    block_claims,
    call_claim,
    last_projection,
    require_whole_feed_forwards,
)


def mean_ratios(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean of magnitude-ratio curves of equal length, position by position."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


@dataclass(frozen=True)
class FirstBlockCache(Method):
    """Skip the other blocks while the first block's residual changes by less than ``threshold``.

    threshold: relative mean absolute change; 0 never reuses. 0.05 to 0.2 are usual.
    """

    SLOTS = ("block.skip", "denoiser.call")
    PAPER = "ParaAttention (diffusers 0.42)"

    threshold: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"FirstBlockCache.threshold = {self.threshold}: must be 0 or more")

    def neutral(self) -> FirstBlockCache:
        return FirstBlockCache(threshold=0.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return block_claims(pipe, "FirstBlockCache")

    def new_live(self, pipe: Any) -> Attached:
        return _LiveHooks(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        from diffusers.hooks import FirstBlockCacheConfig

        assert isinstance(live, _LiveHooks)
        if self == self.neutral():
            return  # would only look on
        live.syncs_per_call = 1
        config = FirstBlockCacheConfig(threshold=self.threshold)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, "first-block cache", config)


@dataclass(frozen=True)
class TaylorSeer(Method):
    """Compute modules every ``interval`` steps, extrapolate their outputs in between.

    interval: 1 always computes. warmup: first steps computed in full. max_order: of the Taylor
    expansion. modules: which outputs are extrapolated; "lite" skips whole blocks and extrapolates
    the last projection only.
    """

    SLOTS = ("block.skip", "denoiser.call")
    PAPER = "arXiv 2503.06923 (diffusers 0.42)"

    interval: int = 3
    warmup: int = 3
    max_order: int = 1
    modules: Literal["attention", "attention+ff", "lite"] = "attention+ff"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("interval", 1), ("warmup", 1), ("max_order", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"TaylorSeer.{name} = {getattr(self, name)}: at least {least}")

    def neutral(self) -> TaylorSeer:
        return TaylorSeer(1, self.warmup, self.max_order, self.modules)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        if self.modules == "lite":
            return block_claims(pipe, "TaylorSeer(modules='lite')")
        paths = [f"{d.slot}.{p}" for d in denoisers(pipe) for p in self._paths(d)]
        return frozenset({("block.skip", frozenset(paths)), call_claim(pipe)})

    def _paths(self, denoiser: Denoiser) -> list[str]:
        paths: list[str] = []
        if self.modules == "attention+ff":
            require_whole_feed_forwards(denoiser, "TaylorSeer")
        for block in denoiser.blocks:
            paths += [p for p in (block.self_attn, block.self_attn_2, block.cross_attn) if p]
            paths += block.ff if self.modules == "attention+ff" else ()
        if not paths:
            raise ValueError(
                f"TaylorSeer finds no {self.modules} module in {denoiser.cls}; use a transformer"
            )
        return list(dict.fromkeys(paths))

    def new_live(self, pipe: Any) -> Attached:
        return _LiveHooks(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        import torch
        from diffusers.hooks import TaylorSeerCacheConfig

        assert isinstance(live, _LiveHooks)
        if self == self.neutral():
            return  # would only keep copies
        for denoiser in denoisers(pipe):
            lite = self.modules == "lite"
            cached = [last_projection(denoiser)] if lite else self._paths(denoiser)
            skipped = [p for p, _ in compat.hooked_blocks(denoiser.module)] if lite else []
            config = TaylorSeerCacheConfig(
                cache_interval=self.interval,
                disable_cache_before_step=self.warmup,
                max_order=self.max_order,
                taylor_factors_dtype=torch.float32,  # bf16 differences lose up to 8 bits
                cache_identifiers=[re.escape(path) for path in cached],
                skip_predict_identifiers=[re.escape(path) for path in skipped],
            )
            live.adopt(denoiser, "TaylorSeer", config)


@dataclass(frozen=True)
class MagCache(Method):
    """Skip all blocks while the predicted error of reusing the last residual stays small.

    threshold: on the accumulated error. max_skip: consecutive steps; 0 never skips. retention:
    share of first steps computed in full. The magnitude ratios, one a step, come from ``calibrate``
    (``artifact``) or are given (``ratios``); other step counts resample them.
    """

    SLOTS = ("block.skip", "denoiser.call")
    PAPER = "arXiv 2506.09045 (diffusers 0.42)"

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()
    artifact: ArtifactRef | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0 or self.max_skip < 0 or not 0 <= self.retention <= 1:
            raise ValueError(f"{self}: threshold, max_skip >= 0 and retention in [0, 1] wanted")
        if self.max_skip and bool(self.ratios) == (self.artifact is not None):
            raise ValueError(
                "MagCache needs either ratios=(...) or artifact=MagCache.calibrate(pipe, inputs)"
                ".save(path), and not both: they belong to a model"
            )

    def neutral(self) -> MagCache:
        return MagCache(self.threshold, 0, self.retention, self.ratios, self.artifact)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return block_claims(pipe, "MagCache")

    def new_live(self, pipe: Any) -> Attached:
        return _LiveMag(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveMag)
        live.ratios = self.ratios or (1.0,)
        artifact = Artifact.load(self.artifact) if self.artifact else None
        if artifact is not None:
            artifact.check_method(self.name())
            artifact.check_pipeline(pipe)
            live.ratios = tuple(artifact.tensors["ratios"].tolist())
            live.made_with = artifact.guidance
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, "MagCache", live.config(len(live.ratios)))

    @staticmethod
    def calibrate(pipe: Any, inputs: list[dict[str, Any]]) -> Artifact:
        """Measure the magnitude ratios: mean over ``inputs`` and guidance branches.

        ``inputs``: pipeline-call arguments; call n has noise of seed n.

        Raises:
            ValueError: ``inputs`` is empty or not JSON, the runs differ in length, or two denoisers
                share the steps (their ratios are not one curve).
        """
        if not inputs or len(denoisers(pipe)) != 1:
            raise ValueError("MagCache.calibrate wants inputs and a pipeline with one denoiser")
        digest = inputs_digest(inputs)
        with attached(_MagCalibration(), pipe) as live:
            assert isinstance(live, _LiveMagCalibration)
            drawn(pipe, inputs)
        if len({len(curve) for curve in live.curves}) != 1:
            raise ValueError("MagCache.calibrate: all inputs must have the same number of steps")
        import torch

        run = live.last_run
        return Artifact(
            method=MagCache.name(),
            fingerprint=Fingerprint.of(denoisers(pipe)[0].module),
            tensors={"ratios": torch.tensor(mean_ratios(live.curves))},
            match="architecture",
            grid=run.sigmas,
            guidance=run.guided,
            inputs_sha256=digest,
        )


class _MagCalibration(Method):
    """Only measures: computes everything and keeps the ratios."""

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return block_claims(pipe, "MagCache")

    def neutral(self) -> Method:
        return self

    def new_live(self, pipe: Any) -> Attached:
        return _LiveMagCalibration(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveMagCalibration)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, "MagCache", live.config(1))


# -- live state ------------------------------------------------------------------------------


class _LiveHooks(Attached):
    """Hooks of diffusers run as layers; state per guidance branch, cleared at run start."""

    syncs_per_call = 0

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.hooks: list[tuple[Any, Any]] = []
        # of the newest call, by denoiser and branch: its shape, and which one of the run it was
        self.newest: dict[tuple[str, str], tuple[Any, Any]] = {}
        self.peak = (0, 0)  # bytes on the device and the host

    def adopt(self, denoiser: Denoiser, technique: str, config: Any) -> None:
        """Take the hooks that ``technique`` would put on ``denoiser``.

        Raises:
            ValueError: it would put none, or the model has its own cache enabled.
        """
        apply = compat.lookup(technique)
        try:
            hooks = compat.adopt_hooks(lambda module: apply(module, config), denoiser.module)
        except ValueError as error:
            raise ValueError(
                f"{type(self.method).__name__} cannot go on {denoiser.cls}: {error}; "
                "if the model has a diffusers cache enabled, call disable_cache() first"
            ) from error
        if not hooks:
            raise ValueError(f"{technique} finds nothing to hook in {denoiser.cls}")
        self.hooks += hooks
        managers = compat.state_managers(hooks)
        for module, hook in hooks:
            self._around_hook(module, hook)

        def in_branch(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now = self.now
            assert now is not None
            if not now.first:
                self.count("syncs", self.syncs_per_call)
            run = self.clock.run
            if run is not None and run.position == len(run.timesteps) - 1:
                self._look_at_memory()  # some forget at the last call
            with compat.branch_context(managers, now.branch):
                self.place(managers)
                return call_next(*args, **kwargs)

        def once(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now = self.now
            assert now is not None
            key, before = (now.denoiser, now.branch), self.newest.get((now.denoiser, now.branch))
            self.newest[key] = shape, place = denoiser.sample(args, kwargs).shape, now[:4]
            if before is None or (before[0] == shape and before[1] != place):
                return call_next(*args, **kwargs)
            self._start_afresh()  # another batch; or asked again, because the output was wrong
            with compat.branch_context(managers, now.branch):  # which is forgotten too
                self.place(managers)
                return call_next(*args, **kwargs)

        self.around_call(denoiser.module, once)  # inside what asks again, wherever it was attached
        self.around_denoiser(denoiser.slot, in_branch)

    def _around_hook(self, module: Any, hook: Any) -> None:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            before = self.counts["computed"]

            def computed(*args: Any, **kwargs: Any) -> Any:
                self.counts["computed"] += 1
                return call_next(*args, **kwargs)

            output = compat.run_hook(hook, module, computed, *args, **kwargs)
            if self.counts["computed"] == before:
                self.counts["reused"] += 1
            return output

        self.around_call(module, layer)

    def place(self, managers: list[Any]) -> None:
        """Tell the states of a branch which call of the run this is."""

    def on_run(self, run: Run) -> None:
        self.newest.clear()
        self._clear()
        self.peak = (0, 0)

    def on_run_end(self, run: Run) -> None:
        self._look_at_memory()
        self._clear()

    def _start_afresh(self) -> None:
        """In mid-run: the next call of every branch computes everything."""
        self.detail["cleared"] = self.detail.get("cleared", 0) + 1
        self._look_at_memory()
        self._clear()

    def _look_at_memory(self) -> None:
        """States only grow, until they are cleared: to be called before that."""
        held = compat.state_bytes(compat.state_managers(self.hooks))
        self.peak = max(self.peak[0], held[0]), max(self.peak[1], held[1])

    def _clear(self) -> None:
        for module, hook in self.hooks:
            if hook._is_stateful:
                hook.reset_state(module)

    def memory(self) -> dict[str, int]:
        return dict(zip(("bytes_device", "bytes_host"), self.peak, strict=True))


class _LiveMag(_LiveHooks):
    """MagCache that is told the run's true length and first position."""

    ratios: tuple[float, ...] = (1.0,)

    def config(self, steps: int) -> Any:
        from diffusers.hooks import MagCacheConfig

        m = self.method
        assert isinstance(m, MagCache)
        return MagCacheConfig(m.threshold, m.max_skip, m.retention, steps, list(self.ratios))

    def on_run(self, run: Run) -> None:
        super().on_run(run)
        config = self.config(len(run.timesteps))
        for _, hook in self.hooks:
            hook.config = config
        if len(self.ratios) != len(run.timesteps):
            self.detail["ratios_resampled"] = [len(self.ratios), len(run.timesteps)]

    def place(self, managers: list[Any]) -> None:
        run = self.clock.run
        assert run is not None
        for manager in managers:
            manager.get_state().step_index = run.position


class _LiveMagCalibration(_LiveMag):
    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.curves: list[list[float]] = []

    def config(self, steps: int) -> Any:
        from diffusers.hooks import MagCacheConfig

        # one step more than there are: at the last one diffusers prints and clears the ratios
        return MagCacheConfig(num_inference_steps=steps + 1, calibrate=True)

    def on_run_end(self, run: Run) -> None:
        self.last_run = run
        for state in compat.branch_states(compat.state_managers(self.hooks)):
            self.curves.append(list(state.calibration_ratios))
        super().on_run_end(run)
