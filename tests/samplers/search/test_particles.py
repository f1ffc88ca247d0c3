from __future__ import annotations

import numpy as np
import pytest

from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.particles import Particles
from samplers.search.path import Run
from samplers.search.verifiers.pixels import Brightness, Contrast
from samplers.search.verifiers.protocol import RankEnsemble


def run(host, call, search, renders=100.0, verifier=None):
    calls, settings = [{**call, "num_inference_steps": 8}], SearchSettings(seed=3)
    budget, verifier = Budget(renders=renders), verifier or Brightness()
    return search.run(host.pipe, calls, verifier, budget, settings=settings).winners[0]


def test_a_population_costs_its_particles_runs_and_reports_its_lineage(host, call):
    winner = run(host, call, Particles(6, strength=50.0, rounds=1))
    assert winner.ledger.spent().evaluations == 6 * 8 * 2
    (report,) = winner.report["populations"]
    assert len(report["stops"]) == 3
    assert len(report["effective"]) == 4
    assert sum(report["weights"]) == pytest.approx(1, abs=1e-4)
    assert set(report["ancestors"]) <= set(range(6))
    if any(report["resampled"]):
        assert len(set(report["ancestors"])) < 6
    renders = [c for c in winner.candidates if c.purpose == "render"]
    assert winner.best.score == max(c.score for c in renders)


def test_strength_steers(host, call):
    """Means over the final particles of several populations; the control has no strength."""

    def mean(strength):
        search = Particles(8, strength=strength, potential="difference", rounds=3)
        found = run(host, call, search)
        return np.mean([c.score for c in found.candidates if c.purpose == "render"])

    assert mean(3000.0) > mean(0.0)


def test_children_of_one_particle_differ(host, call):
    winner = run(host, call, Particles(6, strength=1e4, threshold=1.0, rounds=1))
    (report,) = winner.report["populations"]
    assert len(set(report["ancestors"])) < 6
    renders = [c for c in winner.candidates if c.purpose == "render"]
    assert len({c.score for c in renders}) == 6


def test_the_winner_is_made_again_from_its_path(host, call):
    winner = run(host, call, Particles(4, strength=100.0, rounds=1))
    assert sum(isinstance(m, Run) for m in winner.path) == 4
    assert winner.delivered["brightness"] == pytest.approx(winner.best.score, abs=2 / 255)


def test_scores_that_only_rank_are_refused(host, call):
    both = RankEnsemble((Brightness(), Contrast()))
    with pytest.raises(ValueError, match="absolute scale"):
        run(host, call, Particles(rounds=1), verifier=both)


@pytest.mark.parametrize(
    "bad", [{"particles": 1}, {"at": (0.3, 0.5)}, {"eta": 0.0}, {"at": (1.0,)}, {"strength": -1.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Particles"):
        Particles(**bad)
