"""The judge of the embedded models: how probable is it that a sample shows what was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST = 1e-12  # of a probability, so that its logarithm is a number


@dataclass(frozen=True)
class DigitsJudge:
    """Log-likelihood of the attributes that a caption names, by a shipped judge.

    "digits-judge" may be searched; "digits-judge-b", of another architecture and trained on other
    scans, is the referee: hold it out.
    """

    judge: str = "digits-judge"

    @property
    def name(self) -> str:
        return self.judge

    @property
    def range(self) -> tuple[float, float]:
        return 4 * float(np.log(LEAST)), 0.0

    @property
    def fingerprint(self) -> str:
        from accel import zoo
        from accel.metrics.protocol import file_sha256

        return f"{self.judge}:{file_sha256(zoo.path(self.judge) / 'model.safetensors')[:16]}"

    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """NaN where a prompt names nothing that the judge knows."""
        from accel.zoo.judge import judge
        from accel.zoo.world import named

        probabilities = judge(self.judge).probabilities(samples)
        scores = np.full(len(samples), np.nan)
        for i, prompt in enumerate(prompts):
            asked = {k: v for k, v in named(prompt).items() if k in probabilities}
            if asked:
                scores[i] = sum(
                    np.log(max(probabilities[k][i, v], LEAST)) for k, v in asked.items()
                )
        return scores

    def differentiable(self, samples: Any, prompts: Sequence[str]) -> Any:
        """The same from tensors (n, [f,] 3, h, w) in 0..1, with their gradient; not bounded below.

        Raises:
            ValueError: a prompt names nothing that the judge knows.
        """
        import torch

        from accel.zoo.judge import judge
        from accel.zoo.world import named

        x = 2 * samples - 1
        network = judge(self.judge)
        logits = network.video_logits(x.transpose(1, 2)) if x.ndim == 5 else network(x)
        sure = {k: v.log_softmax(-1) for k, v in logits.items()}
        scores = []
        for i, prompt in enumerate(prompts):
            asked = [sure[k][i, v] for k, v in named(prompt).items() if k in sure]
            if not asked:
                raise ValueError(f"{self.judge} knows nothing that {prompt!r} names")
            scores.append(torch.stack(asked).sum())
        return torch.stack(scores)
