"""cache-dit, the closest other project, as a recipe member: for comparison only, in no recipe file.

https://github.com/vipshop/cache-dit (Apache-2.0), version of the ``peers`` extra, through its own
``enable_cache`` and ``disable_cache``. It patches the pipeline *class*, so a second pipeline of the
class must not run meanwhile. On the transformer it puts its copy of DiT's forward in the place of
whatever was there, our layers included (they are put back when a run starts), and ``disable_cache``
leaves that copy, with a second name for an embedding. Both are taken off here, so that the
unmodified side is unmodified.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from accel.clock import Run
from accel.denoiser import denoisers
from accel.method import Attached, Claim, Method
from accel.settings import Settings


@dataclass(frozen=True)
class CacheDit(Method):
    """DBCache: ``cache`` holds fields of ``cache_dit.DBCacheConfig``; ``taylor_order`` 0 reuses
    residuals as they were, 1 and more forecasts them (its TaylorSeer calibrator)."""

    SLOTS = ("block.skip", "denoiser.call")
    PAPER = "cache-dit 1.5"

    cache: Settings = Settings()
    taylor_order: int = 0

    def claims(self, pipe: Any) -> frozenset[Claim]:
        paths = frozenset({"transformer"})
        return frozenset({("block.skip", paths), ("denoiser.call", paths)})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveCacheDit(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
        import cache_dit

        assert isinstance(live, _LiveCacheDit)
        live.remember(pipe)
        calibrator = None
        if self.taylor_order:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.taylor_order)
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(**self.cache),
            calibrator_config=calibrator,
        )
        for block in live.blocks:
            live.around_call(block, live.computed)


class _LiveCacheDit(Attached):
    """Counts the blocks that are really computed."""

    def remember(self, pipe: Any) -> None:
        (denoiser,) = denoisers(pipe)
        self.blocks = [denoiser.module.get_submodule(block.path) for block in denoiser.blocks]
        self._before = _names(pipe.transformer)

    def computed(self, call_next: Any, *args: Any, **kwargs: Any) -> Any:
        self.count("computed")
        return call_next(*args, **kwargs)

    def on_run_end(self, run: Run) -> None:
        self.count("reused", run.calls * len(self.blocks) - self.counts["computed"])

    def detach(self) -> None:
        import cache_dit

        if not self._attached:
            return
        super().detach()
        pipe: Any = self._pipe()
        cache_dit.disable_cache(pipe)
        vars(pipe.transformer).pop("forward", None)  # theirs, also where one of ours had been
        for path, names in _names(pipe.transformer).items():
            for name in names - self._before.get(path, names):
                delattr(pipe.transformer.get_submodule(path), name)


def _names(module: Any) -> dict[str, set[str]]:
    """What each submodule has, attributes and children, by its path."""
    return {
        path: set(vars(m)) | {name for name, _ in m.named_children()}
        for path, m in module.named_modules()
    }
