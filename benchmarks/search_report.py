"""What ``bench_search`` says of its rows: nines of certainty, paired with random search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from accel.metrics.statistics import bootstrap, paired_test
from samplers.search.draft_commit import compared

JUDGE, REFEREE = "digits-judge", "digits-judge-b"
MOST = 6.0  # nines: a float32 knows no more
DRAFTED = 8  # draws of draft-and-commit, and of the best-of-N it is compared with

Scores = Sequence[float]  # log-likelihoods by judge and referee


def nines(log_p: float) -> float:
    """-log10(1 - p), at most MOST."""
    return min(MOST, -math.log10(max(-math.expm1(min(log_p, 0.0)), 10**-MOST)))


def both_nines(scores: Scores) -> list[float]:
    """By judge and referee."""
    return [nines(x) for x in scores[:2]]


def expected_best(pool: Sequence[Scores], count: float) -> np.ndarray:
    """Nines (judge, referee) of the best by the judge of ``count`` of the pool, exactly.

    Fractions of a draw lie on the line between whole ones.
    """
    if count % 1:
        low = math.floor(count)
        share = count - low
        return (1 - share) * expected_best(pool, low) + share * expected_best(pool, low + 1)
    n, k = len(pool), int(count)
    order = sorted(pool, key=lambda scores: -scores[0])
    chance = [math.comb(n - 1 - j, k - 1) / math.comb(n, k) for j in range(n)]
    return np.array(chance) @ np.array([both_nines(s) for s in order])


def compared_row(own: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """(prompts, 2) nines of an algorithm and of random search at its cost."""
    row: dict[str, Any] = {"prompts": len(own)}
    for i, name in enumerate(("judge", "referee")):
        test = paired_test(own[:, i].tolist(), reference[:, i].tolist())
        row[name] = {
            "nines": bootstrap(own[:, i].tolist()).as_json(),
            "random": bootstrap(reference[:, i].tolist()).as_json(),
            "over_random": test.difference.as_json(),
            "p": test.as_json()["p"],
        }
    return row


def reported(
    rows: dict[str, Any], points: tuple[int, ...], pool: int, kills: dict[str, Any] | None
) -> dict[str, Any]:
    """``search.json``."""
    random = rows["random"]
    pools = {p: r["scores"] for p, r in random.items()}
    price = sum(r["evaluations"] for r in random.values()) / (pool * len(random))
    curve: dict[str, Any] = {}
    for n in (1, 2, *points, pool):
        found = np.array([expected_best(p, n) for p in pools.values()])
        names = enumerate(("judge", "referee"))
        curve[str(n)] = {k: bootstrap(found[:, i].tolist()).as_json() for i, k in names}
    return {
        "environment": rows["environment"],
        "protocol": rows["protocol"],
        "model": rows["model"],
        "prompts": len(random),
        "price": price,
        "random": curve,
        "algorithms": {
            name: _algorithm(row, pools) for name, row in rows["algorithms"].items() if row["rows"]
        },
        "drafts": {
            name: _draft(row, pools, price) for name, row in rows["drafts"].items() if row["rows"]
        },
        "correctors": _correctors(rows.get("correctors") or {}),
        "kills": kills,
    }


def _algorithm(row: dict[str, Any], pools: dict[str, Any]) -> dict[str, Any]:
    at: dict[str, Any] = {}
    points = sorted({p for r in row["rows"].values() for p in r["at"]}, key=int)
    for point in points:
        if not all(point in r["at"] for r in row["rows"].values()):
            continue  # of some prompts it has not finished anything for so little
        own = np.array([both_nines(r["at"][point]) for r in row["rows"].values()])
        reference = np.array([expected_best(pools[p], int(point)) for p in row["rows"]])
        at[point] = compared_row(own, reference)
    total = {k: sum(r[k] for r in row["rows"].values())
             for k in ("evaluations", "decodes", "verified")}  # fmt: skip
    return {
        "search": row["search"],
        "methods": row["methods"],
        "at": at,
        # judge and referee
        "verified_per_evaluation": round(total["verified"] / 2 / total["evaluations"], 4),
        "decodes_per_evaluation": round(total["decodes"] / total["evaluations"], 4),
    }


def _draft(row: dict[str, Any], pools: dict[str, Any], price: float) -> dict[str, Any]:
    found = row["rows"]
    renders = np.array([[s[0] for s in pools[p][:DRAFTED]] for p in found])
    made = np.array([r["drafts"] for r in found.values()])
    spent = sum(r["draft_evaluations"] for r in found.values())
    share = spent / (len(found) * DRAFTED * price)
    more = all("at_8" in r for r in found.values())
    return {
        "methods": row["methods"],
        **compared(made, renders, price=share).as_json(),
        "at_own_cost": _at_cost(found, "own", pools, price),
        "at_8": _at_cost(found, "at_8", pools, price) if more else None,
    }


def _at_cost(
    found: dict[str, Any], which: str, pools: dict[str, Any], price: float
) -> dict[str, Any]:
    """Against random search for what each took, commit included."""
    own = np.array([both_nines(r[which]) for r in found.values()])
    counts = [r[which][2] / price for r in found.values()]
    pairs = zip(found, counts, strict=True)
    reference = np.array([expected_best(pools[p], n) for p, n in pairs])
    return {"renders": float(np.mean(counts)), **compared_row(own, reference)}


def _correctors(rows: dict[str, Any]) -> dict[str, Any] | None:
    """Mean nines of whole populations, weighed and not, paired by prompt."""
    if not rows:
        return None
    sides = ("weighed", "unweighed")
    means = {
        side: np.array([np.mean([both_nines(s) for s in r[side]["scores"]], 0)
                        for r in rows.values()])
        for side in sides
    }  # fmt: skip
    found: dict[str, Any] = {"prompts": len(rows)}
    for i, name in enumerate(("judge", "referee")):
        a, b = (means[side][:, i].tolist() for side in sides)
        found[name] = {
            "weighed": bootstrap(a).as_json(),
            "unweighed": bootstrap(b).as_json(),
            "difference": paired_test(a, b).difference.as_json(),
        }
    for what in ("ancestors", "spread", "effective"):
        found[what] = float(np.mean([r["weighed"][what] for r in rows.values()]))
    return found
