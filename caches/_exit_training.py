"""The training of exit heads inside ordinary pipeline calls (specification: early_exit.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.clock import Run
from accel.denoiser import Block, denoisers
from accel.files import write_atomically
from accel.loop import LoopSettings, fit
from accel.measure import pipeline_samples
from accel.method import Attached, Claim, Method, attached
from caches._exits import NAME, ExitHeads, exit_columns
from caches._gating import stacked_blocks
from caches._outputs import first_leaf, hidden_of, passed, with_hidden
from caches._resuming import other_work
from caches._router_training import frozen
from caches.schedule import noise_share

DIGEST = "digest.txt"  # of inputs and settings, in the folder of a training
WARMUP, EMA_DECAY = 10, 0.99
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class _Walk(Method):
    """Full runs, in which heads learn from what the network makes of the tokens at the exits."""

    exits: tuple[int, ...] = ()

    def neutral(self) -> Method:
        return self

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return frozenset({("block.skip", frozenset(exit_columns(pipe)))})

    def new_live(self, pipe: Any) -> Attached:
        return LiveWalk(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveWalk)
        (denoiser,) = denoisers(pipe)
        blocks = stacked_blocks(denoiser, NAME)
        for depth, block in enumerate(blocks, 1):
            layer = live.around_block(depth, block, depth == len(blocks))
            live.around_call(denoiser.module.get_submodule(block.path), layer)
        live.around_denoiser(denoiser.slot, live.denoise)


class LiveWalk(Attached):
    """One run: the tokens at the exits of the present call, and those given to the last layers."""

    learn: Callable[[LiveWalk, float, Tensor, Callable[[Tensor], Tensor]], None] | None = None
    given: Tensor | None = None
    sigmas: tuple[float, ...] = ()

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        assert isinstance(method, _Walk)
        self.exits = method.exits
        self.tokens: dict[int, Tensor] = {}

    def on_run(self, run: Run) -> None:
        self.sigmas = run.step_sigmas

    def around_block(self, depth: int, block: Block, is_last: bool) -> Callable:
        """The layer of one block: notes the tokens, or passes by with those given."""

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            if self.given is None:
                output = call_next(*args, **kwargs)
                if depth in self.exits:
                    self.tokens[depth] = hidden_of(block.output_layout, output)
                return output
            output = passed(block.output_layout, args, kwargs)
            return with_hidden(block.output_layout, output, self.given) if is_last else output

        return layer

    def denoise(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """The network's own output, from which the heads learn on the way."""
        now = self.clock.now
        assert now is not None
        output = call_next(*args, **kwargs)
        if self.learn is None:
            return output

        def last_layers(tokens: Tensor) -> Tensor:
            self.given = tokens
            try:
                return first_leaf(call_next(*args, **kwargs))
            finally:
                self.given = None

        share = noise_share(self.sigmas)[now.step]
        with torch.enable_grad():
            self.learn(self, share, first_leaf(output), last_layers)
        return output


def trained_heads(
    trainer: Any,
    pipe: Any,
    inputs: list[dict[str, Any]],
    out: Path,
    exits: tuple[int, ...],
    digest: str,
) -> tuple[ExitHeads, tuple[float, ...], bool | None]:
    """Heads for the exits, and of a run the noise levels and whether it was guided.

    One update a run, all its steps in it.

    digest: of what is trained, which `out` holds or will.
    """
    _check_same(out, digest)
    with attached(_Walk(exits), pipe) as live, frozen(pipe):
        assert isinstance(live, LiveWalk)
        pipeline_samples(pipe, inputs[0], trainer.seed)  # to see how wide the tokens are
        tokens = live.tokens[exits[0]]
        heads = ExitHeads(exits, tokens.shape[-1]).to(tokens.device)

        def loss_of(model: Any, step: int) -> Tensor:
            """Relative squared error of all exits, by step of a run; its gradient but the last
            call's is there already, as one call's graph is held at a time."""
            losses: list[Tensor] = []

            def learn(walk: LiveWalk, share: float, full: Tensor, last_layers: Callable) -> None:
                if losses:
                    losses[-1].backward()
                    losses[-1] = losses[-1].detach()
                made = [last_layers(model(x, d, share)) for d, x in walk.tokens.items()]
                errors = torch.stack([(m - full).square().mean() for m in made])
                losses.append(errors.mean() / full.square().mean() / len(walk.sigmas))

            live.learn = learn
            try:
                pipeline_samples(pipe, inputs[step % len(inputs)], trainer.seed + step)
            finally:
                live.learn = None
            return torch.stack(losses).sum()

        settings = LoopSettings(
            steps=trainer.updates,
            lr=trainer.lr,
            warmup=WARMUP,
            ema_decay=EMA_DECAY,
            checkpoint_seconds=CHECKPOINT_SECONDS,
        )
        on_cpu = tokens.device.type == "cpu"
        weights, _ = fit("exit heads", heads, loss_of, settings, out, cpu=on_cpu, resume=True)
        heads.load_state_dict(weights)
        return heads, live.sigmas, live.guided


def _check_same(out: Path, digest: str) -> None:
    """Raises ValueError where `out` holds another training."""
    file = out / DIGEST
    if file.is_file() and file.read_text() != digest:
        raise other_work(out, "training")
    write_atomically(file, digest.encode())
