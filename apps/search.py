"""A noise search as a job asks for it, run on a pipeline; what it leaves beside its output.

The request is data: algorithms come from a table, verifiers from ``verifiers/names.py``, and a job
file can start no command. The search of a render job runs in its worker before the denoise stage,
and hands on a path, from which the winner is rendered as any job is.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from samplers.search.budget import Budget

if TYPE_CHECKING:
    import accel
    from samplers.search.result import Progress, SearchResult

ALGORITHMS = {
    "random": "samplers.search.random:Random",
    "zero-order": "samplers.search.zero_order:ZeroOrder",
    "draft-commit": "samplers.search.draft_commit:DraftCommit",
    "paths": "samplers.search.paths:Paths",
    "particles": "samplers.search.particles:Particles",
    "evolution": "samplers.search.evolution:Evolution",
    "rollover": "samplers.search.rollover:Rollover",
    "gradient": "samplers.search.gradient:Gradient",
    "correctors": "samplers.search.correctors:Correctors",
}


class SearchRequest(BaseModel):
    """``search:`` of a job."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    algorithm: str = Field("random", description=", ".join(ALGORITHMS))
    settings: dict[str, Any] = Field(default_factory=dict, description="Of the algorithm")
    verifier: str = Field(description="Name of what scores; more is better")
    budget: str = Field("8 renders", description="'8 renders', '320 evaluations', '60 seconds'")
    held_out: list[str] | None = Field(
        None, description="Verifiers that are reported and never searched; null: one is chosen"
    )
    batch: int = Field(8, ge=1, le=1024, description="Candidates in one call")
    baseline: bool = Field(False, description="Search at random at equal cost, too")
    patience: int | None = Field(None, ge=1, description="Stop after so many held-out losses")

    @field_validator("algorithm")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALGORITHMS:
            raise ValueError(f"no algorithm {name!r}; known: {', '.join(ALGORITHMS)}")
        return name

    @field_validator("budget")
    @classmethod
    def _readable(cls, text: str) -> str:
        Budget.read(text)
        return text


def search_of(request: SearchRequest) -> Any:
    """The algorithm with its settings. Raises ``ValueError`` naming what is wrong with them."""
    module, _, name = ALGORITHMS[request.algorithm].partition(":")
    return getattr(importlib.import_module(module), name).from_settings(request.settings)


def check_request(request: SearchRequest, *, trusted: bool) -> None:
    """Raises ``ValueError`` for settings or verifiers that would fail later."""
    from samplers.search.verifiers.names import verifier_named

    search_of(request)
    if request.patience is not None and request.held_out == []:
        raise ValueError("search: patience watches a held-out verifier, and held_out names none")
    for name in (request.verifier, *(request.held_out or ())):
        verifier_named(name, trusted=trusted)


def run_search(
    request: SearchRequest,
    pipe: Any,
    inputs: dict[str, Any],
    recipe: accel.Recipe | None,
    *,
    seed: int,
    journal: Path,
    trusted: bool = False,
    observe: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search one call's noise; the winner is not rendered, its path is what counts."""
    import accel
    from samplers.search.conduct import SearchSettings
    from samplers.search.verifiers.names import verifier_named

    device = str(pipe.device)

    def named(text: str) -> Any:
        return verifier_named(text, device=device, trusted=trusted)

    held = request.held_out
    settings = SearchSettings(
        seed=seed,
        batch=request.batch,
        held_out=None if held is None else tuple(named(n) for n in held),
        journal=str(journal),
        baseline=request.baseline,
        patience=request.patience,
        deliver=False,
    )
    budget = Budget.read(request.budget)
    return search_of(request).run(
        pipe, [inputs], named(request.verifier), budget, recipe or accel.Recipe(()),
        settings=settings, observe=observe,
    )  # fmt: skip


def drafts(request: SearchRequest) -> bool:
    """Whether the recipe makes drafts only, and winners are rendered without it."""
    return search_of(request).DRAFTS


def story(result: SearchResult) -> dict[str, Any]:
    """What a sidecar keeps of a search: enough to make the winner again, and to judge the gain."""
    from samplers.search.path import path_json

    winner = result.winners[0]
    return {
        **result.search,
        "verifier": result.verifier,
        "held_out": list(result.held_out),
        "path": path_json(winner.path),
        "score": winner.best.scores,
        "held_out_score": winner.best.held_out,
        "gain": gains(result),
        "candidates": sum(c.purpose != "baseline" for c in winner.candidates),
        "ledger": winner.ledger.as_json(),
        "report": winner.report,
        "stopped": winner.stopped,
    }


def gains(result: SearchResult) -> dict[str, dict[str, float]]:
    """By verifier: of plain draws their mean, spread and count; the winner's score; the gain in
    units of the spread (is there anything to find?); the baseline's best, where one was asked for.
    """
    import numpy as np

    winner = result.winners[0]
    draws = winner.first_draws()
    baseline = [c for c in winner.candidates if c.purpose == "baseline"]
    found: dict[str, dict[str, float]] = {}
    for part in ("scores", "held_out"):
        for name, best in getattr(winner.best, part).items():
            values = [v for c in draws if (v := getattr(c, part).get(name)) is not None]
            if best is None:
                continue
            figures = {"winner": best, "draws": len(values)}
            if len(values) > 1:
                mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
                figures |= {"mean": mean, "spread": spread}
                figures |= {"gain_in_spreads": (best - mean) / spread} if spread > 0 else {}
            others = [v for c in baseline if (v := getattr(c, part).get(name)) is not None]
            if others and part == "scores":
                figures["baseline_best"] = max(others)
            found[name] = {k: round(v, 6) for k, v in figures.items()}
    return found


def write_record(folder: Path, stem: str, result: SearchResult) -> list[Path]:
    """``STEM.search.json`` (every candidate), a contact sheet and a plot; returns the files."""
    from accel.files import write_atomically
    from apps.search_pictures import candidates_png, curve_png

    record = json.dumps(result.as_json(), indent=1, sort_keys=True, allow_nan=False)
    files = {
        f"{stem}.search.json": record.encode() + b"\n",
        f"{stem}.candidates.png": candidates_png(result),
        f"{stem}.curve.png": curve_png(result),
    }
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]
