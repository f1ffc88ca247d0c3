"""What the benchmark of caches measures: curves, and controls of equal work."""

from __future__ import annotations

import pytest
import torch

import accel
from accel.artifact import Artifact
from benchmarks import bench_caches
from benchmarks.cache_tables import PEERS
from benchmarks.density_rows import density
from benchmarks.digits_study import MODEL, SD
from caches.evolution import EvolutionCache
from caches.schedule import of_artifact


@pytest.fixture(scope="module")
def pipe():
    found = accel.load(MODEL)
    found.set_progress_bar_config(disable=True)
    return found


def _schedule(method):
    return of_artifact(Artifact.load(method.artifact))


def test_controls_compute_as_much_as_what_they_control(pipe, tmp_path):
    rows = dict(bench_caches.searched(pipe, 50, tmp_path))
    for quality in bench_caches.QUALITIES:
        method = rows[f"evolution: {quality} dB asked"]
        control = rows[f"control: random steps, as many as evolution at {quality} dB"]
        assert isinstance(method, EvolutionCache)
        ours, random = _schedule(method), _schedule(control)
        assert ours != random
        assert ours.share() == random.share()
        assert ours.rows[0] == random.rows[0] == "C"


def test_exits_are_controlled_by_their_own_depths(pipe, tmp_path):
    rows = dict(bench_caches.exits(pipe, 20, tmp_path))
    assert not list(bench_caches.exits(pipe, 7, tmp_path))
    for rest in ("skip", "residual", "forecast", "heads"):
        ours = _schedule(rows[f"early exit, {rest}: 30 dB asked"])
        random = _schedule(rows[f"control: random steps, as many as early exit, {rest}: 30 dB"])
        assert sorted(ours.rows) == sorted(random.rows)
        assert ours.rows != random.rows
        assert ours.rows[:2] == random.rows[:2]
    for method in rows.values():
        method.attach(pipe).detach()
    shares = [_schedule(rows[f"early exit, forecast: {q} dB asked"]).share() for q in (40, 35, 30)]
    assert shares == sorted(shares, reverse=True)


def test_cells_are_controlled_by_tokens_from_anywhere_and_by_no_blocks(pipe, tmp_path):
    rows = dict(density(pipe, 20, tmp_path, (0.25, 0.5), 0.25))
    at = "first 25% of the steps"
    ours, means = rows[f"token density, drawn: {at}"](), rows[f"token density, mean: {at}"]()
    anywhere = rows[f"control: tokens drawn anywhere, {at}"]()
    of, control, grid = ours.sparse((2, 3, 5), 7), anywhere.sparse((2, 3, 5), 7), (2, 3, 5)
    assert control.members.shape == of.members.shape
    assert not torch.equal(control.members, anywhere.sparse(grid, 8).members)
    place = [torch.tensor([t // 15, t % 15 // 5, t % 5]) for t in range(30)]
    chosen = control.members[:, 0].tolist()
    for token, source in enumerate(control.source.tolist()):
        far = [int((place[token] - place[other]).square().sum()) for other in chosen]
        assert far[source] == min(far)
    schedule = _schedule(rows[f"control: middle blocks left out, {at}"]())
    assert schedule.rows == ("CSSSSC",) * 5 + ("CCCCCC",) * 15
    for method in (ours, means, anywhere):
        method.attach(pipe).detach()


def test_bolder_settings_compute_less(pipe, tmp_path):
    rows = dict(bench_caches.searched(pipe, 50, tmp_path))
    shares = [_schedule(rows[f"evolution: {q} dB asked"]).share() for q in (40, 35, 30, 25)]
    assert shares == sorted(shares, reverse=True)


def test_every_row_has_a_curve_and_a_setting(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_caches, "_magnitudes", lambda *a: bench_caches.ArtifactRef("a", "b"))
    labels = [label for label, _ in bench_caches.transformer_rows(pipe, 50, tmp_path)]
    assert len(set(labels)) == len(labels)
    assert all(": " in label for label in labels)
    assert {p for p in PEERS if any(label.startswith(p) for label in labels)} == set(PEERS)


def test_unet_rows_go_on_the_unet(tmp_path):
    pipe = accel.load(SD)
    for label, method in bench_caches.unet_rows(pipe, 50, tmp_path):
        method.attach(pipe).detach()
        assert ": " in label
