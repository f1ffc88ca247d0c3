"""The tables of ``bench_search``."""

from __future__ import annotations

from typing import Any

from benchmarks.spans import span


def search(result: dict[str, Any]) -> str:
    """Every algorithm against random search at equal evaluations, drafts, and the kills."""
    env, price = result["environment"], result["price"]
    where = f"{result['model']}, {result['protocol']['steps']} steps, {env['hardware']}"
    lines = [
        f"Every algorithm against random search at equal network evaluations ({where}, "
        f"{result['prompts']} prompts chosen for headroom; a render is {price:.0f} evaluations). "
        "Nines of certainty; difference to random search, paired by prompt, with its interval:",
        "",
        "| algorithm | cost (renders) | prompts | judge (searched) | over random | "
        "referee (held out) | over random |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, row in result["random"].items():
        cells = [f"{row[k]['estimate']:.2f} | -" for k in ("judge", "referee")]
        lines.append(f"| random search | {n} | {result['prompts']} | {' | '.join(cells)} |")
    for name, row in result["algorithms"].items():
        lines += [_row(name, n, point) for n, point in row["at"].items()]
    for name, row in result["drafts"].items():
        for point in (row["at_own_cost"], row["at_8"]):
            if point is not None:
                lines.append(_row(f"drafts: {name}", f"{point['renders']:.2f}", point))
    tables = [_drafts(result), _correctors(result["correctors"]), _kills(result["kills"])]
    parts = [lines, _on_top(result), *tables]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row(name: str, cost: str, point: dict[str, Any]) -> str:
    cells = [
        f"{point[k]['nines']['estimate']:.2f} | {span(point[k]['over_random'])}"
        for k in ("judge", "referee")
    ]
    return f"| {name} | {cost} | {point['prompts']} | {' | '.join(cells)} |"


def _on_top(result: dict[str, Any]) -> list[str]:
    """What an algorithm decodes and judges beside its evaluations; random search, every render."""
    if not result["algorithms"]:
        return []
    once = 100 / result["price"]
    rates = {"random search": (once, once)} | {
        name: (100 * row["decodes_per_evaluation"], 100 * row["verified_per_evaluation"])
        for name, row in result["algorithms"].items()
    }
    said = "; ".join(f"{k}: {made:.1f} and {seen:.1f}" for k, (made, seen) in rates.items())
    return [
        "Decoding and judging come on top of the evaluations. Decodes and samples judged for 100 "
        f"evaluations: {said}."
    ]


def _drafts(result: dict[str, Any]) -> list[str]:
    """How well drafts stand for renders."""
    if not result["drafts"]:
        return []
    first = next(iter(result["drafts"].values()))
    lines = [
        f"Draft and commit against best of {first['candidates']} renders of the same seeds "
        "(log-likelihood by the judge): rank correlation of draft and render, the share of prompts "
        "whose best draft is the best render, and the share of best-of-N's gain that rendering the "
        "best draft captures:",
        "",
        "| drafts | rank correlation | best is best | captured gain | price of a draft | cost |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["drafts"].items():
        shares = [span(row[k]) for k in ("rank", "top", "captured")]
        costs = f"{100 * row['price']:.0f} % of a render | {100 * row['cost']:.1f} % of best-of-N"
        lines.append(f"| {name} | {' | '.join(shares)} | {costs} |")
    return lines


def _correctors(row: dict[str, Any] | None) -> list[str]:
    """Populations under guidance, weighed and not."""
    if row is None:
        return []
    lines = [
        f"Correctors of guidance (8 particles, {row['prompts']} prompts, guidance 3; the control "
        "is the same without weights): mean nines of whole populations. A step's log-weights "
        f"spread by {row['spread']:.2f} before they are clamped, {row['effective']:.1f} of 8 are "
        f"effective on average, and {row['ancestors']:.1f} first noises are left at the end:",
        "",
        "| by | weighed | unweighed | difference |",
        "|---|---|---|---|",
    ]
    for who in ("judge", "referee"):
        cells = [span(row[who][k]) for k in ("weighed", "unweighed", "difference")]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return lines


def _kills(kills: dict[str, Any] | None) -> list[str]:
    if kills is None:
        return []
    return [
        f"Killed with `kill -9` at {kills['killed']} random moments of {kills['tried']} searches "
        f"and resumed: the same winner, frames and costs {kills['same']} times; at most "
        f"{kills['most_scored_twice']} samples were made twice (a batch has {kills['batch']})."
    ]
