"""The arithmetic of the search study."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from accel.environment import hardware
from benchmarks import bench_search
from benchmarks.bench_search import SD, STUDIES, Bench, OtherRows, best_at
from benchmarks.results_file import as_text, read
from benchmarks.schema import checked
from benchmarks.search_report import JUDGE, MOST, REFEREE, expected_best, nines, reported
from benchmarks.search_tables import search
from samplers.search.budget import Ledger
from samplers.search.path import Draw, Run
from samplers.search.result import Candidate, Winner


def candidate(index, score, held, evaluations=0, purpose="render"):
    scores, out = {JUDGE: score}, {REFEREE: held}
    return Candidate(index, (Draw(index), Run()), purpose, score, scores, out, evaluations)


POOL = [(-2.0, -0.1), (-0.5, -3.0), (-0.01, -0.2)]


def test_nines():
    assert nines(math.log(0.9)) == pytest.approx(1)
    assert nines(math.log(0.999)) == pytest.approx(3)
    assert nines(0.0) == MOST
    assert nines(-math.inf) == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_random_search_is_the_mean_over_all_choices(count):
    expected = np.mean(
        [
            [nines(x) for x in max(some, key=lambda scores: scores[0])]
            for some in itertools.combinations(POOL, count)
        ],
        axis=0,
    )
    assert expected_best(POOL, count) == pytest.approx(expected)


def test_fractions_of_a_draw_lie_between():
    low, high = expected_best(POOL, 1), expected_best(POOL, 2)
    assert expected_best(POOL, 1.25) == pytest.approx(0.75 * low + 0.25 * high)


def test_the_best_for_a_cost_knows_nothing_dearer():
    found = [candidate(0, -1.0, -1.0, 20), candidate(1, -0.5, -1.0, 40),
             candidate(2, -0.1, -1.0, 60), candidate(3, -0.01, -1.0, 10, "draft")]  # fmt: skip
    winner = Winner(None, found[0].path, found[0], {}, found, Ledger(), {}, "finished")
    assert best_at(winner, 50) is found[1]
    assert best_at(winner, 60) is found[2]
    assert best_at(winner, 10) is None


def rows(prompts=("a", "b", "c"), pool=8):
    """What would be kept of three prompts: made up, but for its form."""
    rng = np.random.default_rng(0)

    def both():
        return [-float(x) for x in rng.exponential(0.1, 2)]

    name = {"search": "x:Y", "settings": {}}
    algorithm = {
        p: {"at": {"4": both(), **({"8": both()} if p != "c" else {})}, "evaluations": 160,
            "decodes": 8, "verified": 16}
        for p in prompts
    }  # fmt: skip
    drafts = {
        p: {"drafts": [both()[0] for _ in range(8)], "draft_evaluations": 48,
            "own": [*both(), 68.0], "at_8": [*both(), 146.0]}
        for p in prompts[:2]
    }  # fmt: skip
    corrected = {"scores": [both(), both()], "ancestors": 2, "spread": 0.1, "effective": 1.5}
    return {
        "environment": read("search_rows")["environment"],
        "protocol": read("search_rows")["protocol"],
        "model": "zoo:digits-sd",
        "prompts": list(prompts),
        "random": {p: {"scores": [both() for _ in range(pool)], "evaluations": 20 * pool}
                   for p in prompts},
        "algorithms": {"one": {"search": name, "methods": [], "rows": algorithm}},
        "drafts": {"cache": {"methods": [], "rows": drafts}},
        "correctors": {p: {"weighed": corrected, "unweighed": corrected} for p in prompts},
    }  # fmt: skip


def test_what_is_reported_is_reckoned_from_the_rows():
    kept = rows()
    checked("search_rows", as_text(kept))
    found = reported(kept, (4, 8), 8, None)
    checked("search", as_text(found))
    assert found["price"] == 20
    assert list(found["algorithms"]["one"]["at"]) == ["4"]  # of one prompt it has nothing at 8
    figures = found["algorithms"]["one"]["at"]["4"]["judge"]
    own = np.mean([nines(r["at"]["4"][0]) for r in kept["algorithms"]["one"]["rows"].values()])
    reference = np.mean([expected_best(r["scores"], 4)[0] for r in kept["random"].values()])
    assert figures["nines"]["estimate"] == pytest.approx(own, abs=1e-3)
    assert figures["over_random"]["estimate"] == pytest.approx(own - reference, abs=1e-3)
    assert found["drafts"]["cache"]["inputs"] == 2
    assert found["drafts"]["cache"]["price"] == pytest.approx(48 / 160)
    assert found["drafts"]["cache"]["at_own_cost"]["renders"] == pytest.approx(3.4)
    assert found["correctors"]["judge"]["difference"]["estimate"] == 0
    text = search(found)
    assert "| one | 4 | 3 |" in text
    assert "equal network evaluations" in text
    assert "random search: 5.0 and 5.0; one: 5.0 and 5.0." in text


def test_rows_of_other_hardware_or_protocol_are_refused(monkeypatch):
    kept = read("search_rows")
    elsewhere = {**kept, "environment": {**kept["environment"], "hardware": "abacus, 2 cores"}}
    monkeypatch.setattr(bench_search, "read", lambda name: elsewhere)
    with pytest.raises(OtherRows, match="measured on abacus"):
        Bench(STUDIES[SD])
    here = {**kept["environment"], "hardware": hardware("cpu")}
    other = {**kept, "environment": here, "protocol": {**kept["protocol"], "steps": 19}}
    monkeypatch.setattr(bench_search, "read", lambda name: other)
    with pytest.raises(OtherRows, match="another protocol"):
        Bench(STUDIES[SD])
    monkeypatch.setattr(bench_search, "hard_prompts", lambda pipe, study: kept["prompts"])
    assert Bench(STUDIES[SD], fresh=True).rows["algorithms"] == {}


def test_only_what_is_missing_is_measured(monkeypatch):
    kept = read("search_rows")
    here = {**kept, "environment": {**kept["environment"], "hardware": hardware("cpu")}}
    monkeypatch.setattr(bench_search, "read", lambda name: here)
    bench = Bench(STUDIES[SD])
    known = set(here["prompts"][:3])
    assert [n for n, _ in bench.missing(dict.fromkeys(known), 5)] == [3, 4]
    bench.deadline = 0.0
    assert not list(bench.missing({}, 5))


def test_what_is_not_measured_keeps_its_date(monkeypatch):
    kept, files = rows(), []
    before = {**kept["environment"], "hardware": hardware("cpu"), "commit": "before"}
    here = {**read("search_rows"), "environment": before, "algorithms": kept["algorithms"]}
    monkeypatch.setattr(bench_search, "read", lambda name: here)
    monkeypatch.setattr(bench_search, "write", lambda *given: files.append(given[-1]))
    bench = Bench(STUDIES[SD])
    bench.keep()
    assert files == []
    assert bench.rows["environment"] == before
    bench.added()
    bench.keep()
    assert bench.rows["environment"]["commit"] != "before"
    assert bench.rows["algorithms"]["one"]["environment"] == before
    bench.added(bench.rows["algorithms"]["one"])
    assert bench.rows["algorithms"]["one"]["environment"] == bench.rows["environment"]
    checked("search_rows", as_text(files[-1]))


def test_kills_of_older_code_go_when_all_is_measured_again(monkeypatch):
    kept, files = rows(pool=32), []
    kills = {"tried": 1, "killed": 1, "same": 1, "batch": 4, "most_scored_twice": 0, "rows": []}
    old = {"kills": kills, "environment": {"commit": "before"}}
    monkeypatch.setattr(bench_search, "read", lambda name: old if name == "search" else kept)
    monkeypatch.setattr(bench_search, "write", lambda *given: files.append(given[-1]))
    monkeypatch.setattr(bench_search, "draw", lambda *given: None)
    bench_search.report(STUDIES[SD])
    bench_search.report(STUDIES[SD], fresh=True)
    assert [f["kills"] for f in files] == [{**kills, "environment": old["environment"]}, None]
