"""What a denoiser returns in the guidance branches of one step, whatever the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accel.clock import Run, clock_of
from accel.patch import Patch


class Branches:
    """Listens to a pipeline's denoiser through its clock, outside everything attached."""

    def __init__(self, pipe: Any) -> None:
        self.patch = Patch()  # what a user of the clock has; nothing is in it
        self._name, self._clock = type(pipe).__name__, clock_of(pipe)
        self._outputs: dict[str, Tensor] = {}
        self._alone = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for the length of a ``with`` block."""
        self._clock.acquire(self)
        try:
            yield
        finally:
            self._clock.release(self)

    def run_began(self, run: Run) -> None:
        self._outputs = {}

    def run_ended(self, run: Run) -> None:
        pass

    def denoiser_layers(self, slot: str) -> list[Callable]:
        return [self._layer]

    def _layer(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        now = self._clock.now
        output = call_next(*args, **kwargs)
        if now is not None:
            own = output[0]  # (n, c, ...), or as many of one sample each
            self._outputs[now.branch] = torch.stack(own) if isinstance(own, list) else own
        return output

    def taken(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional output of the step just made, each as ``like`` (n, c, ...);
        twice the same where guidance is off.

        Raises:
            ValueError: which is which cannot be told.
        """
        found, self._outputs = self._outputs, {}
        rows, channels = like.shape[:2]
        self._alone = len(found) == 1 and len(next(iter(found.values()))) == rows
        if found.keys() >= {"uncond", "cond"}:
            pair = found["uncond"], found["cond"]
        elif len(found) == 1 and len(next(iter(found.values()))) in (rows, 2 * rows):
            (both,) = found.values()
            pair = both[:rows], both[-rows:]  # diffusers puts the unconditional half first
        else:
            raise ValueError(
                f"{self._name}: of the outputs {sorted(found)} of a step it is unknown which is "
                "unconditional"
            )
        return pair[0][:, :channels], pair[1][:, :channels]

    def check_guided(
        self, out: Tensor, heard: tuple[Tensor, Tensor], mix: tuple[float, float]
    ) -> None:
        """If a mix weighs guidance: that the step's output ``out`` is u + w (c - u) of what was
        ``heard`` of it. A mix with equal parts weighs both branches, whatever is made of them.

        Raises:
            ValueError: it is something else, or one branch alone was heard.
        """
        if mix[0] == mix[1]:
            return
        scale = mix[1] / sum(mix)
        u, c = (x.float() for x in heard)
        out = out[:, : u.shape[1]].float()
        # three operations, each rounded in the outputs' type
        eps = max(torch.finfo(x.dtype).eps for x in heard)
        bound = 3 * eps * (1 + 2 * abs(scale)) * max(float(u.abs().max()), float(c.abs().max()))
        guided = scale == 1 or not self._alone
        if not guided or float((u + scale * (c - u) - out).abs().max()) > bound:
            raise ValueError(
                f"{self._name}: its steps are not guided by u + {scale:g} (c - u) of two branches "
                "that can be told apart, which is what Correctors weigh; ask for plain guidance "
                "(with a negative prompt, not embedded, not rescaled)"
            )
