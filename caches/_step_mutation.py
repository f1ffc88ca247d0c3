"""How schedule genomes mutate. pymoo is imported only when a search begins."""

from __future__ import annotations

from typing import Any

import numpy as np


def step_mutation(steps: int, share: float) -> Any:
    """A pymoo mutation of genomes of steps x columns bits.

    Half of the genomes have each bit flipped with probability `share`, as in the paper; in the
    other half each computed cell moves to the step before or after with probability 1/4, which
    keeps the work as it is and looks for a better place.
    """
    from pymoo.core.mutation import Mutation

    class StepMutation(Mutation):
        def _do(self, problem: Any, X: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            random = kwargs.get("random_state") or np.random.default_rng()
            return np.stack([self._one(genome.astype(bool), random) for genome in X])

        def _one(self, genome: np.ndarray, random: Any) -> np.ndarray:
            if random.random() < 0.5:
                return genome ^ (random.random(len(genome)) < share)
            bits = genome.reshape(steps, -1)
            return np.stack([self._moved(column, random) for column in bits.T], axis=1).ravel()

        def _moved(self, column: np.ndarray, random: Any) -> np.ndarray:
            places = np.flatnonzero(column)
            moves = np.where(
                random.random(len(places)) < 0.25, random.choice([-1, 1], len(places)), 0
            )
            found = np.zeros_like(column)
            found[np.clip(places + moves, 0, steps - 1)] = True
            return found

    return StepMutation()
