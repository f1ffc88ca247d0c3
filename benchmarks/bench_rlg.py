"""Guidance by a tuned model (RLG) on ``zoo:digits-sd``, and the tuning that it takes.

    python -m benchmarks.bench_rlg --tune [--out out/rlg]     # about ten minutes
    python -m benchmarks.bench_rlg [--samples 200] [--rounds 3]

``--tune`` follows the judge's gradient (``samplers.reward_tuning``) without guidance and writes the
tuning and its recipe to ``recipes/``. Measured is the referee, which the tuning never saw, without
guidance in 20 steps: the base (what everything is compared with), the tuned model (weight 1), and
what lies beyond. Controls: the tuning's own weights enlarged, which is not the same thing, and
guidance by the prompt, which costs as much.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accel
from accel.artifact import Artifact
from accel.measure import environment, load_average
from accel.method import Attached, Claim, Method, Recipe
from benchmarks.digits_study import SD, command_line, head, loaded, prompts, row, study_of
from benchmarks.distil import RECIPES, captions
from benchmarks.results_file import write
from samplers.distillation import HIGH
from samplers.reward_tuning import RewardTuning
from samplers.rlg import RLG

RECIPE = RECIPES / "digits-sd-rlg.yaml"
STEPS, GUIDANCE, SEED = 20, 1.0, 4000
WEIGHTS = (1.6, 1.0, 0.5, 2.0, 3.0)
ENLARGED = (1.6, 3.0)
BATCH, BATCHES = 24, 64
TRAINER = RewardTuning("judge", steps=10, updates=150, most=-0.01)


@dataclass(frozen=True)
class Guided(Method):
    """The pipeline as it is, called with guidance by the prompt."""

    SLOTS = ()

    scale: float

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return frozenset()

    def new_live(self, pipe: Any) -> Attached:
        return _Counted(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        pass

    def call_changes(self) -> dict[str, Any]:
        return {"guidance_scale": self.scale}


class _Counted(Attached):
    def has_effect(self) -> bool:
        return True


def tune(out: Path) -> None:
    """Train, and write the artifact with its recipe."""
    pipe = loaded(SD)
    calls = [{"prompt": c["prompt"]} for c in captions(BATCHES, BATCH)]
    artifact = TRAINER.fit(pipe, calls, str(out))
    recipe = Recipe((RLG(artifact.save(out / "digits-sd-rlg.safetensors")),))
    accel.write_recipe(
        RECIPE,
        recipe,
        name="digits-sd-rlg",
        description=f"{SD} guided by what a tuning to the judge has changed.",
    )


def rows(out: Path) -> dict[str, Recipe]:
    """What is measured; enlarged tunings are written below ``out``."""
    (method,) = accel.read_recipe(RECIPE).recipe.methods
    assert isinstance(method, RLG)
    assert method.artifact is not None
    made = {f"RLG({w:g})": Recipe((dataclasses.replace(method, weight=w),)) for w in WEIGHTS}
    tuned = Artifact.load(method.artifact)
    for factor in ENLARGED:
        larger = {k: factor * v if k.endswith(HIGH) else v for k, v in tuned.tensors.items()}
        ref = dataclasses.replace(tuned, tensors=larger).save(out / f"times-{factor:g}.safetensors")
        made[f"control: the tuning's weights times {factor:g}"] = Recipe((RLG(ref, weight=1.0),))
    made["control: guidance 3 by the prompt"] = Recipe((Guided(3.0),))
    return made


def calls(samples: int) -> list[dict[str, Any]]:
    """The captions of every study, without guidance."""
    return [{**call, "guidance_scale": GUIDANCE} for call in prompts(samples, STEPS)]


def main() -> None:
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--tune", action="store_true", help="only train")
    parser.add_argument("--out", type=Path, default=Path("out/rlg"))
    given = parser.parse_args()
    if given.tune:
        tune(given.out)
        return
    load = load_average()
    pipe = loaded(SD, given.device)
    bench = study_of(pipe, calls(given.samples), seed=SEED, model=SD, referee=given.referee)
    given.out.mkdir(parents=True, exist_ok=True)
    measured = {}
    for name, recipe in rows(given.out).items():
        result = bench.compare(recipe, rounds=given.rounds)
        measured[name] = row(recipe, result, str(RECIPES), str(given.out))
        print(name, *(measured[name][k] for k in ("speedup", "psnr", "judged")), flush=True)
    block = environment(given.device, load)
    write("rlg", given.device, {**head(bench, given.samples, block), "rows": measured})


if __name__ == "__main__":
    main()
