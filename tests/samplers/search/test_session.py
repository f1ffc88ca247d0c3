"""Journals, ledgers, observers and what ends a search."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import accel
from accel.testing import tiny
from samplers.search.budget import Budget
from samplers.search.conduct import SearchSettings
from samplers.search.journal import Journal
from samplers.search.leg import State
from samplers.search.particles import Particles
from samplers.search.random import Random
from samplers.search.verifiers.pixels import Brightness, Contrast, Darkness, Sharpness
from samplers.search.verifiers.protocol import RankEnsemble
from samplers.search.zero_order import ZeroOrder

CALL = {"prompt": "a red three on a dark background", "num_inference_steps": 3,
        "guidance_scale": 2.0}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return accel.load("zoo:digits-sd")


class Killed(Exception):
    pass


def killing(after):
    seen = []

    def observe(progress):
        seen.append(progress)
        if len(seen) == after:
            raise Killed

    return observe


CALLS = [CALL, {**CALL, "prompt": "a blue one on a white background"}]


UNGUIDED = [{**call, "guidance_scale": 1.0} for call in CALLS]  # half as dear


def run(pipe, folder, search=None, budget=None, verifier=None, **more):
    observe = more.pop("observe", None)
    journal = None if folder is None else str(folder)
    calls = more.pop("calls", CALLS)
    settings = SearchSettings(batch=3, journal=journal, **more)
    search, verifier = search or ZeroOrder(), verifier or Brightness()
    budget = budget or Budget(renders=13)
    return search.run(pipe, calls, verifier, budget, settings=settings, observe=observe)


def shown(result):
    """All that is to be the same."""
    text = json.dumps([{k: v for k, v in w.as_json().items() if k != "ledger"}
                       for w in result.winners])  # fmt: skip
    costs = [{p: (c.evaluations, c.decodes, c.verified) for p, c in w.ledger.by_purpose.items()}
             for w in result.winners]  # fmt: skip
    return text, costs, [w.frames.tobytes() for w in result.winners]


def test_killed_anywhere_it_ends_the_same_and_pays_nothing_twice(pipe, tmp_path, counting):
    more = {"calls": UNGUIDED, "budget": Budget(renders=9), "verifier": counting}
    whole = shown(run(pipe, tmp_path / "whole", **more))
    samples = counting.samples
    for after in (2, 8):  # in the first input and in the second, within a round
        folder = tmp_path / str(after)
        counting.samples = 0
        with pytest.raises(Killed):
            run(pipe, folder, observe=killing(after), **more)
        assert shown(run(pipe, folder, **more)) == whole
        assert counting.samples == samples, "a batch was scored twice"


def test_a_finished_search_is_only_read(pipe, tmp_path, counting):
    first = shown(run(pipe, tmp_path, verifier=counting))
    counting.samples = 0
    assert shown(run(pipe, tmp_path, verifier=counting)) == first
    assert counting.samples == 0
    assert not (tmp_path / "states").exists()


def test_a_line_cut_off_by_a_kill_is_dropped(pipe, tmp_path):
    first = shown(run(pipe, tmp_path))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:-20])
    assert shown(run(pipe, tmp_path)) == first


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"\x80\x04K\x01."])
def test_pictures_that_the_disk_lost_are_only_not_shown(pipe, tmp_path, data):
    first = shown(run(pipe, tmp_path))
    for path in (tmp_path / "pictures").glob("*.npy"):
        path.write_bytes(data)
    assert shown(run(pipe, tmp_path)) == first


@pytest.mark.parametrize("line", [b"[]", b"3", b"{}", b"not JSON"])
def test_a_damaged_journal_says_so(pipe, tmp_path, line):
    run(pipe, tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines()
    for damaged in ([line, *lines[1:]], [*lines, line]):
        path.write_bytes(b"\n".join(damaged) + b"\n")
        with pytest.raises(ValueError, match=r"is damaged|of another search"):
            run(pipe, tmp_path)


def test_more_budget_goes_on(pipe, tmp_path, counting):
    search = Random()
    run(pipe, tmp_path, search, Budget(renders=6), counting)
    counting.samples = 0
    more = run(pipe, tmp_path, search, Budget(renders=12), counting)
    assert [len(w.candidates) for w in more.winners] == [12, 12]
    assert counting.samples <= 2 * (6 + 1)  # what is new, and the winners alone


def test_the_journal_of_another_search_is_refused(pipe, tmp_path):
    run(pipe, tmp_path)
    with pytest.raises(ValueError, match="another search"):
        run(pipe, tmp_path, seed=1)
    with pytest.raises(ValueError, match="verifiers"):
        run(pipe, tmp_path, verifier=Contrast())


def other_grid(pipe):
    config = pipe.scheduler.config
    pipe.scheduler = type(pipe.scheduler).from_config(config, timestep_spacing="trailing")


def other_decoder(pipe):
    pipe.vae = tiny("dit", seed=3).pipe.vae


@pytest.mark.parametrize(("change", "what"), [(other_grid, "scheduler"), (other_decoder, "comp")])
def test_a_journal_of_another_sampler_or_autoencoder_is_refused(tmp_path, change, what):
    host = tiny("dit")
    more = {"calls": [{"class_labels": [1], "num_inference_steps": 2}], "budget": Budget(renders=2)}
    run(host.pipe, tmp_path, Random(), **more)
    assert run(host.pipe, tmp_path, Random(), **more).winners[0].candidates
    change(host.pipe)
    with pytest.raises(ValueError, match=rf"another search \(other {what}"):
        run(host.pipe, tmp_path, Random(), **more)


def test_observers_see_candidates_as_they_are_found(pipe):
    seen = []
    settings = SearchSettings(batch=4)
    result = Random().run(pipe, [CALL], Brightness(), Budget(renders=8), settings=settings,
                          observe=seen.append)  # fmt: skip
    assert [p.kind for p in seen] == ["candidates", "candidates", "winner"]
    found = [c for p in seen for c in p.candidates]
    assert [c.index for c in found] == list(range(8))
    assert all(c.picture.shape == (32, 32, 3) and c.picture.dtype == np.uint8 for c in found)
    assert [p.share for p in seen] == [0.5, 1.0, 1.0]
    assert seen[-1].best is result.winners[0].best
    assert {c.held_out.keys() == {"sharpness"} for c in found} == {True}


def test_a_baseline_at_equal_cost_has_other_draws(pipe):
    winner = run(pipe, None, baseline=True).winners[0]
    costs = winner.ledger.by_purpose
    assert costs["baseline"].evaluations == costs["render"].evaluations
    kinds = [{c.path[0].key for c in winner.candidates if c.purpose == p}
             for p in ("baseline", "render")]  # fmt: skip
    assert not kinds[0] & kinds[1]
    assert winner.best.purpose == "render"


def test_patience_ends_a_search_that_pays_with_the_held_out_score(pipe):
    winner = run(pipe, None, budget=Budget(renders=40), patience=1, held_out=(Darkness(),)).winners
    assert "losses to darkness" in winner[0].stopped
    assert len(winner[0].candidates) < 40


def test_what_cannot_be_scored_is_never_chosen(pipe):
    class Fussy(Brightness):
        def score(self, samples, prompts):
            scores = super().score(samples, prompts)
            return np.where(scores == scores.max(), np.nan, scores)

    winner = run(pipe, None, Random(), Budget(renders=6), Fussy()).winners[0]
    missing = [c for c in winner.candidates if c.score is None]
    assert len(missing) == 2  # the best of each batch of three
    assert winner.best.score is not None


def test_a_verifier_that_scores_nothing_is_an_error(pipe):
    class Blind(Brightness):
        def score(self, samples, prompts):
            return np.full(len(samples), np.nan)

    seen = []
    with pytest.raises(ValueError, match=r"scored nothing of .*; search another verifier"):
        run(pipe, None, Random(), Budget(renders=30), Blind(), observe=seen.append)
    assert sum(len(progress.candidates) for progress in seen) == 9, "the budget is not thrown away"
    with pytest.raises(ValueError, match=r"scored nothing of .*; search another verifier"):
        run(pipe, None, Random(), Budget(renders=30), Blind(), baseline=True)


def test_an_ensemble_ranks_inside_the_pool(pipe):
    both = RankEnsemble((Brightness(), Contrast()))
    winner = run(pipe, None, Random(), Budget(renders=6), both).winners[0]
    pool = [[c.scores["brightness"], c.scores["contrast"]] for c in winner.candidates]
    ranks = np.argsort(np.argsort(np.array(pool), 0), 0).mean(1)
    assert winner.best is winner.candidates[int(np.argmax(ranks))]
    assert winner.curve() == []


def test_a_held_out_verifier_is_not_searched_too(pipe):
    with pytest.raises(ValueError, match="held-out"):
        run(pipe, None, held_out=(Brightness(),))


def test_sharpness_is_held_out_where_nothing_else_is_said(pipe):
    assert run(pipe, None, Random(1), Budget(renders=1)).held_out == ("sharpness",)
    found = run(pipe, None, Random(1), Budget(renders=1), Sharpness())
    assert found.held_out == ("contrast",)


@pytest.mark.parametrize("call", [{"prompt": ["a", "b"]}, {"num_images_per_prompt": 2}])
def test_calls_of_several_samples_are_refused(pipe, call):
    with pytest.raises(ValueError, match="one sample"):
        Random().run(pipe, [CALL | call], Brightness(), Budget(renders=2))


def test_killed_at_any_line_of_the_journal_it_ends_the_same(pipe, tmp_path, counting, monkeypatch):
    """With states on their way and batches that the budget cuts: nothing looks cheaper later.

    The kill is after a batch's states and pictures are written, before its line is.
    """
    lines: list[int] = []
    put, stop = Journal.put, [0]

    def killed(journal, unit, row):
        lines.append(1)
        if len(lines) == stop[0]:
            raise Killed
        put(journal, unit, row)

    monkeypatch.setattr(Journal, "put", killed)
    more = {"search": Particles(3, at=(0.6,)), "budget": Budget(renders=4.4), "verifier": counting,
            "calls": UNGUIDED}  # fmt: skip
    whole = shown(run(pipe, tmp_path / "whole", **more))
    count, samples = len(lines), counting.samples
    for number in range(2, count + 1, 2):  # in the first input and in the second
        lines.clear()
        stop[0], counting.samples = number, 0
        with pytest.raises(Killed):
            run(pipe, tmp_path / str(number), **more)
        stop[0] = 0
        assert shown(run(pipe, tmp_path / str(number), **more)) == whole
        assert counting.samples - samples <= 3  # what was in flight


def test_what_was_rendered_alone_is_delivered_without_rendering_again(pipe, tmp_path):
    found = [run(pipe, tmp_path, Random(), Budget(renders=1)).winners[0] for _ in range(2)]
    assert [w.ledger.by_purpose["delivery"].evaluations for w in found] == [0, 0]
    (tmp_path / "journal.jsonl").write_bytes(
        b"".join((tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)[:3])
    )  # as killed before the delivery
    again = run(pipe, tmp_path, Random(), Budget(renders=1)).winners[0]
    assert again.ledger.by_purpose["delivery"].evaluations == 0
    assert np.array_equal(again.frames, found[0].frames)


def test_a_full_disk_is_told_as_such_where_states_are_kept(tmp_path, full_disk):
    journal = Journal(tmp_path, {"of": "this"})
    states = {"x": (State(1, torch.zeros(1, 64)), None)}
    with full_disk(), pytest.raises(OSError, match="File too large"):
        journal.keep_states(0, "unit", states)
    journal.keep_states(0, "unit", states)
    assert journal.state("x", "cpu")[0].sample.shape == (1, 64)
    journal.close()
