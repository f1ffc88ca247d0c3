"""Tune a model to a differentiable score, as a small change of its weights: what RLG extrapolates.

ReFL (Xu et al. 2023, arXiv 2304.05977): walk without gradients to a step drawn at random from the
last ones, predict the clean sample there, decode it, and follow the score's gradient through that
one prediction. ``keep`` holds the prediction near the base model's, as the KL penalty of
reinforcement learning does. Data-free. Memory: the gradient of one denoiser call and one decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.artifact import Artifact, Fingerprint, inputs_digest
from accel.clock import clock_of
from accel.device import forked_rng
from accel.loop import LoopSettings, fit, step_generator
from accel.method import Recipe, Trainer
from accel.resuming import require_same_work
from samplers.distillation import Call, Weights, unguided
from samplers.search.budget import Cost
from samplers.search.differentiate import forward
from samplers.search.leg import State
from samplers.search.levels import Levels
from samplers.search.player import Player
from samplers.search.verifiers.names import verifier_named

METHOD = "samplers.rlg:RLG"  # what samples with the result
RUN = "reward_tuning.json"
EMA_DECAY = 0.99
PLAIN = Recipe(())


@dataclass(frozen=True)
class RewardTuning(Trainer):
    """``verifier``: the name of one with a gradient. ``steps`` of the walk; it stops in the last
    ``late`` share. ``rank`` of the change. ``most``: scores above it are good enough."""

    verifier: str
    steps: int = 10
    late: float = 0.6
    rank: int = 8
    updates: int = 200
    lr: float = 1e-3
    keep: float = 1.0
    most: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.rank, self.updates) < 1 or self.lr <= 0 or self.keep < 0:
            raise ValueError(f"{self}: steps, rank, updates and lr above 0, keep 0 or more")
        if not 0 < self.late <= 1:
            raise ValueError(f"{self}: late in 0..1 above 0")

    def fit(
        self, pipe: Any, inputs: list[dict[str, Any]], out: str, student_recipe: Recipe = PLAIN
    ) -> Artifact:
        """Train below ``out``, going on where a killed run stopped.

        inputs: calls with a list of prompts each, made without guidance. The pipeline is float32
        and stays as it is.

        Raises:
            ValueError: no inputs or prompts, guided ones, half precision, an adapter, a verifier
                without a gradient, a recipe, or ``out`` holds a training that was begun otherwise.
        """
        if student_recipe != PLAIN:
            raise ValueError("RewardTuning tunes the model as it is; leave the recipe out")
        verifier = verifier_named(self.verifier, device=str(pipe.device))
        if not hasattr(verifier, "differentiable"):
            raise ValueError(f"RewardTuning: {self.verifier} has no gradient")
        if not inputs or not all(isinstance(call.get("prompt"), list) for call in inputs):
            raise ValueError("RewardTuning wants calls with lists of prompts")
        calls = [unguided(pipe, {**c, "num_inference_steps": self.steps}) for c in inputs]
        made = [Call.without_guidance(pipe, c) for c in calls]
        network = made[0].denoiser.module
        if next(network.parameters()).dtype != torch.float32:
            raise ValueError("RewardTuning trains in float32; load the pipeline so")
        with forked_rng():
            torch.manual_seed(self.seed)
            weights = Weights(network, self.rank)
        model = Fingerprint.of(network)
        record = {"trainer": repr(self), "inputs": inputs_digest(inputs), "model": model.digest()}
        require_same_work(Path(out) / RUN, record, "training")
        single = {**calls[0], "prompt": calls[0]["prompt"][0]}
        with Player(pipe, single) as player:
            levels = player.levels(PLAIN)
            if levels.sigma_space:
                raise ValueError(f"RewardTuning: {type(pipe.scheduler).__name__} scales its inputs")
            prompts = [c["prompt"] for c in calls]
            losses = _Losses(self, player, levels, list(zip(made, prompts, strict=True)), verifier)
            on_cpu = next(network.parameters()).device.type == "cpu"
            kept, _ = fit("reward", weights, losses, self._loop(), Path(out), cpu=on_cpu,
                          resume=True)  # fmt: skip
        return Artifact(
            method=METHOD,
            fingerprint=model,
            tensors={n: kept[f"values.{i}"].half() for i, n in enumerate(weights.names)},
            guidance=False,
            inputs_sha256=inputs_digest(inputs),
            seed=self.seed,
            settings={"trainer": repr(self)},
        )

    def _loop(self) -> LoopSettings:
        return LoopSettings(steps=self.updates, lr=self.lr, warmup=5, ema_decay=EMA_DECAY)


class _Losses:
    """Loss of an update: one walk, one prediction, its score."""

    def __init__(
        self, settings: RewardTuning, player: Player, levels: Levels, calls: list, verifier: Any
    ):
        self.settings, self.player, self.levels = settings, player, levels
        self.calls, self.verifier = calls, verifier
        self.clock = clock_of(player.pipe)
        self.times = player.pipe.scheduler.timesteps.clone()

    def __call__(self, model: Weights, step: int) -> Tensor:
        s, generator = self.settings, step_generator(self.settings.seed, step)
        call, prompts = self.calls[step % len(self.calls)]
        first = min(s.steps - 1, round((1 - s.late) * s.steps))
        stop = int(torch.randint(first, s.steps, (1,), generator=generator))
        device = next(model.parameters()).device
        x = torch.randn(call.shape, generator=generator).to(device)
        weights = model.merged()
        with self.clock.unheard():
            with torch.no_grad():
                for k in range(stop):
                    x = self._step(call, x, k, weights)
                base = call(x, self._times(x, stop))
            out = call(x, self._times(x, stop), weights)
        clean = self.levels.clean(out, x, stop)
        seeds = [0] * len(x)
        frames = forward(self.player, State(s.steps, clean), seeds, PLAIN, Cost())
        with torch.enable_grad():
            scores = self.verifier.differentiable(frames, prompts)
            score = (scores if s.most is None else scores.clamp(max=s.most)).mean()
        return s.keep * (out - base).square().mean() - score

    def _step(self, call: Call, x: Tensor, k: int, weights: dict[str, Tensor]) -> Tensor:
        clean = self.levels.clean(call(x, self._times(x, k), weights), x, k)
        return self.levels.follow(x, clean, k, eta=0.0, fresh=None)

    def _times(self, x: Tensor, k: int) -> Tensor:
        return self.times[k].to(x.device).expand(len(x))
