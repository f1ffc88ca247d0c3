"""A trial as the page shows it: pictures, times, counted work, and the map that fills up."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from apps.sheet import shown
from apps.web import markup
from apps.web.trials import Side, Trial

if TYPE_CHECKING:
    from apps.pairs import Pair

TITLES = ("Baseline", "Accelerated")
NOTHING_YET = markup.empty(
    "Nothing rendered yet",
    "Choose what to draw and how to accelerate it, then press Generate. You will see both results "
    "side by side, what each cost, and which parts of the network ran at every step.",
)
GONE = markup.empty(
    "Your last result is not shown any more",
    "The app was started again since, or many others came after it. Its pictures are kept if they "
    "were finished, and can be seen in the Compare tab. Press Generate to see everything again.",
)


def view(trial: Trial | None, ahead: int = 0) -> str:
    """The whole result area."""
    if trial is None:
        return NOTHING_YET
    pair = trial.pair if trial.finished and len(trial.sides) == 2 else None
    parts = [_status(trial, ahead), _notes(trial) if trial.over else "", _pictures(trial, pair)]
    if pair is not None:
        fresh = all(side.state == "done" for side in trial.sides)
        parts.append(figures(pair, work_share(trial), speed=fresh))
    parts.append(_map(trial))
    if pair is not None:
        parts.append(side_by_side_or_over(pair))
    parts += [_reports(trial)] if trial.over else []
    return f'<section class="ac-trial" data-state="{_state(trial)}">{"".join(parts)}</section>'


def figures(pair: Pair, work: float | None = None, *, speed: bool = False) -> str:
    """Work and fidelity of one pair; its speed only where both ran one after the other."""
    same = "identical" if pair.psnr is None else f"{pair.psnr:.1f} dB"
    found = [("Speed", f"{pair.speed_up:.2f}x")] if speed else []
    if work is not None:
        found.append(("Network that ran", f"{work:.0%}"))
    found += [("PSNR to baseline", same), ("SSIM", f"{pair.ssim:.3f}")]
    return markup.facts([(name, markup.text(value)) for name, value in found], "ac-figures")


def side_by_side_or_over(pair: Pair) -> str:
    """A slider for pictures, players in step for videos."""
    if pair.baseline.is_video:
        return ""  # the players stand above, in place of the pictures
    title = "<h2>Compare with the divider</h2>"
    return f'<div class="ac-over-each-other">{title}{markup.slider(pair)}</div>'


def work_share(trial: Trial) -> float | None:
    """Rows that ran through the parts of the network, accelerated over baseline."""
    counts = [sum(map(sum, side.rows)) for side in trial.sides]
    return counts[1] / counts[0] if len(counts) == 2 and counts[0] and trial.finished else None


def _state(trial: Trial) -> str:
    if trial.error:
        return "failed"
    if trial.finished:
        return "done"
    return "cancelled" if trial.cancelled else "running"


def _status(trial: Trial, ahead: int) -> str:
    if trial.error:
        return markup.notice(trial.error)
    if trial.finished:
        return ""
    if trial.cancelled:
        return markup.notice("Cancelled. What was finished is kept.", "info")
    if ahead:
        word = "task" if ahead == 1 else "tasks"
        return markup.notice(f"Waiting: {ahead} {word} ahead of yours.", "info")
    if trial.loading:
        return markup.notice(f"Loading {trial.model} ...", "info")
    return ""


def _pictures(trial: Trial, pair: Pair | None) -> str:
    if pair is not None and pair.baseline.is_video:
        below = "".join(_facts_of(side) for side in trial.sides)
        words = markup.difference(pair)
        shown_difference = markup.figure("Difference", words[0], _note(words[1]))
        return f'{markup.players(pair)}<div class="ac-pair">{below}{shown_difference}</div>'
    drawn = [_side(trial, side, title) for side, title in zip(trial.sides, TITLES, strict=False)]
    if pair is not None:
        image, words = markup.difference(pair)
        drawn.append(markup.figure("Difference", image, _note(words)))
    return f'<div class="ac-pair">{"".join(drawn)}</div>'


def _side(trial: Trial, side: Side, title: str) -> str:
    if side.rendered is not None:
        inside = markup.medium(side.rendered, f"{side.rendered.label}, {title.lower()}")
        return markup.figure(title, inside, _facts_of(side))
    return markup.figure(title, f'<div class="ac-wait">{_progress(trial, side)}</div>')


def _progress(trial: Trial, side: Side) -> str:
    if trial.over:
        return '<p class="ac-bar-text">not rendered</p>'
    if side.state == "running" and side.steps:
        return markup.bar(side.step, side.steps, f"step {side.step} of {side.steps}")
    words = {"waiting": "waiting", "running": "starting"}
    return markup.bar(side.step, side.steps or 1, words.get(side.state, side.state))


def _facts_of(side: Side) -> str:
    rendered = side.rendered
    if rendered is None:
        return ""
    counted = rendered.evaluations
    found = [
        ("Time", shown(rendered.seconds)),
        ("Network evaluations", "not counted" if counted is None else f"{counted:,}"),
    ]
    kept = _note("from an earlier run of the same job") if side.state == "kept" else ""
    return markup.facts([(name, markup.text(value)) for name, value in found]) + kept


def _map(trial: Trial) -> str:
    """The newest side's map: it fills up while it runs."""
    sides = [side for side in trial.sides if side.rows]
    if not sides:
        return ""
    full = max(max(row) for side in sides for row in side.rows)
    side = sides[-1] if len(trial.sides) == 1 or sides[-1] is trial.sides[1] else sides[0]
    title = TITLES[trial.sides.index(side)]
    steps = max(side.steps, len(side.rows))
    ran = sum(map(sum, side.rows)) / (max(full, 1) * len(side.rows) * len(side.rows[0]))
    words = f"{title}: {ran:.0%} of the network ran in {len(side.rows)} of {steps} steps"
    image = markup.heat_map(side.rows, steps, full, f"Map of what was computed. {words}")
    first, last = (_short(side.parts[i]) for i in (0, -1))
    return (
        f'<figure class="ac-heat"><figcaption>What was computed, step by step'
        f'<span class="ac-key"><i class="ac-c"></i>computed <i class="ac-r"></i>not computed '
        f'<i class="ac-a"></i>still to come</span></figcaption>{image}'
        f"<p>{markup.text(words)}. Steps from left to right; lines from {markup.text(first)} to "
        f"{markup.text(last)}.</p></figure>"
    )


def _short(part: str) -> str:
    path = part.partition(".")[2] or part
    return path.replace("transformer_blocks.", "block ").replace("_", " ").replace(".", " ")


def _reports(trial: Trial) -> str:
    found = []
    for side, title in zip(trial.sides, TITLES, strict=False):
        if side.rendered is None:
            continue
        content = side.rendered.content
        kept = {key: content.get(key) for key in ("report", "timings", "notes", "fallback")}
        kept["file"] = str(side.rendered.path)
        found.append(markup.details(f"Report of the {title.lower()} render", markup.data(kept)))
    return "".join(found)


def _notes(trial: Trial) -> str:
    """What is to be known of a render before it is looked at."""
    found = []
    for side, title in zip(trial.sides, TITLES, strict=False):
        content = {} if side.rendered is None else side.rendered.content
        notes = [re.sub(r"^\w+Warning: ", "", note) for note in content.get("notes") or []]
        if content.get("fallback"):
            reason = content["fallback"]["reason"]
            notes.append(f"the recipe gave {reason}, so this was rendered without it.")
        found += [markup.notice(f"{title}: {note}", "warning") for note in notes]
    return "".join(found)


def _note(words: str) -> str:
    return f'<p class="ac-note">{markup.text(words)}</p>'
