"""Gradients of a score with respect to the first noise, through any pipeline.

A pipeline's call is wrapped in ``no_grad``; where it prepares its latents, gradients are turned on
again, so that its own loop, decoder and post-processing are differentiated as they are. Denoiser
calls and the decoder are checkpointed one by one: memory holds the activations of one of them and a
sample a step. Backward computes each again: a gradient costs ``PRICE`` times its forward pass.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from accel.clock import denoiser_modules
from accel.method import Recipe
from accel.patch import Patch
from samplers.search.budget import Cost
from samplers.search.calls import as_bytes
from samplers.search.leg import Leg, State
from samplers.search.noise import packed_bytes, shift_to, uphill
from samplers.search.path import Path, digest
from samplers.search.player import Player, seed_of

PRICE = 4  # forward, forward again, and a backward pass of twice a forward's work
OUTSIDE = frozenset({"scheduler", "weights", "scheduler.modifier", "initial_latents"})

Score = Callable[[Tensor], Tensor]  # samples (n, [f,] c, h, w) in 0..1 -> (n,)


def check_recipe(recipe: Recipe, pipe: Any) -> None:
    """Raises ``ValueError`` for a method that acts inside the denoiser.

    Its state would be another one when the call is computed again.
    """
    for method in recipe.methods:
        inside = sorted({slot for slot, _ in method.claims(pipe)} - OUTSIDE)
        if inside:
            raise ValueError(
                f"gradients cannot pass {method.name()}, which acts on {inside[0]}; draft with a "
                "few-step student (samplers.distilled) or fewer steps (samplers.swap)"
            )


def uphill_of(
    player: Player,
    paths: Sequence[Path],
    recipe: Recipe,
    score: Score,
    cosine: float,
    floor: float,
    cost: Cost,
) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Finished samples of first noises, uint8, and the shift of each draw to where its noise is
    after a step of ``cosine`` up the score's gradient, within ``floor`` of the draw."""
    ends = [p[:-1] for p in paths]
    player.reach([*ends, *(p[:1] for p in ends)], recipe, cost)
    frames: list[Tensor] = []

    def work(some: list[Path], own: Cost) -> list[tuple[str, float]]:
        noises = [player.states[digest(p)].sample for p in some]
        made, gradient = climb(player, noises, [seed_of(p) for p in some], recipe, score, own)
        shifts = []
        for path, x, g in zip(some, noises, gradient, strict=True):
            first = player.states[digest(path[:1])].sample
            target = uphill(x, g[None], first, cosine=cosine, floor=floor)
            data, scale = shift_to(first, target)
            shifts.append((packed_bytes(data), scale))
        frames.append(made)
        return shifts

    shifts = player.in_parts(ends, work, cost)
    made = torch.cat(frames)
    player.broken = ~made.flatten(1).isfinite().all(1).cpu().numpy()
    return as_bytes(made), shifts


def climb(
    player: Player, noises: Sequence[Tensor], seeds: list[int], recipe: Recipe, score: Score,
    cost: Cost,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Samples (n, [f,] c, h, w) in 0..1 from first noises (1, ...), and each score's gradient (n,
    ...) there, float32. Counts ``PRICE`` evaluations for each of the forward pass.

    Raises:
        ValueError: the pipeline gives no gradient.
    """
    before, began = cost.evaluations, time.perf_counter()
    first = torch.cat(list(noises)).detach().clone().requires_grad_()
    frames = forward(player, State(0, first), seeds, recipe, cost)
    forward_seconds = time.perf_counter() - began
    if not frames.requires_grad:
        raise ValueError(f"search: {type(player.pipe).__name__} loses the gradient on its way")
    with torch.enable_grad():
        values = score(frames)
    (gradient,) = torch.autograd.grad(values.sum(), first)
    if hasattr(getattr(player.pipe, "vae", None), "clear_cache"):
        player.pipe.vae.clear_cache()  # video decoders keep frames, and with them the graph
    cost.evaluations += (PRICE - 1) * (cost.evaluations - before)
    cost.seconds += time.perf_counter() - began - forward_seconds
    return frames.detach(), gradient.float()


def forward(player: Player, state: State, seeds: list[int], recipe: Recipe, cost: Cost) -> Tensor:
    """What the pipeline makes of a state, (n, [f,] c, h, w) in 0..1, with the gradient to it."""
    with _differentiated(player.pipe):
        output = player.call_once(Leg(state), recipe, seeds, cost, output_type="pt")
    if not torch.is_tensor(output):
        raise ValueError(
            f"search: {type(player.pipe).__name__} returns no tensors to differentiate"
        )
    return output


@contextmanager
def _differentiated(pipe: Any) -> Iterator[None]:
    """Gradients on behind ``prepare_latents``; one denoiser call, one decode kept at a time."""
    patch, was = Patch(), torch.is_grad_enabled()

    def on(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        torch.set_grad_enabled(True)  # the pipeline's own no_grad puts it back at its end
        return call_next(*args, **kwargs)

    for _, module in denoiser_modules(pipe):
        patch.around_call(module, _again)
    if hasattr(getattr(pipe, "vae", None), "decode"):
        patch.around(pipe.vae, "decode", _again)
    if hasattr(pipe, "prepare_latents"):
        patch.around(pipe, "prepare_latents", on)
    try:
        yield
    finally:
        patch.undo()
        torch.set_grad_enabled(was)


def _again(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
    """A layer: keep nothing of a call but what went in, and compute it again for its gradient."""
    if not torch.is_grad_enabled():
        return call_next(*args, **kwargs)
    call = functools.partial(call_next, *args, **kwargs)
    return checkpoint(call, use_reentrant=False, preserve_rng_state=False)
