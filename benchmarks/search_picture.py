"""Nines of certainty against cost: random search as a line, every algorithm as points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS

PAPER = "#faf9f6"
COLOURS = ("#146e46", "#2b6cb0", "#9a6b1f", "#b5476b", "#6b4fa1", "#c0561f", "#3f8f8f", "#777777")
COLOURS += ("#b8a01c", "#d0312d", "#39394f", "#8cae3c")


def picture_of(study: str) -> Path:
    """Where the picture of a study lies."""
    return RESULTS.parent / "pictures" / f"{study}.png"


def draw(source: Path, path: Path) -> None:
    """The picture of ``search.json``."""
    from matplotlib.figure import Figure

    found = json.loads(source.read_text("utf-8"))
    figure = Figure(figsize=(11, 4.6), dpi=120, facecolor=PAPER)
    for i, who in enumerate(("judge", "referee")):
        axes = figure.add_subplot(1, 2, i + 1, facecolor=PAPER)
        _panel(axes, found, who)
        axes.set(
            xlabel="cost (renders)",
            ylabel="nines of certainty" if i == 0 else "",
            title=f"{who}: {'searched' if i == 0 else 'held out'}",
            xscale="log",
        )
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.78, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def _panel(axes: Any, found: dict[str, Any], who: str) -> None:
    at = sorted(found["random"], key=int)
    line = [found["random"][n][who] for n in at]
    cost = [int(n) for n in at]
    axes.plot(cost, [x["estimate"] for x in line], color="#1c1c1e", label="random search")
    axes.fill_between(
        cost, [x["low"] for x in line], [x["high"] for x in line], color="#1c1c1e", alpha=0.1
    )
    for (name, row), colour in zip(found["algorithms"].items(), COLOURS, strict=False):
        assert len(found["algorithms"]) <= len(COLOURS)
        points = [(int(n), r[who]["nines"]["estimate"]) for n, r in row["at"].items()]
        axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, color=colour, label=name)
    for name, row in found["drafts"].items():
        points = [row["at_own_cost"], *([row["at_8"]] if row["at_8"] else [])]
        cost = [p["renders"] for p in points]
        axes.plot(cost, [p[who]["nines"]["estimate"] for p in points], "D", ms=5,
                  label=f"drafts: {name}")  # fmt: skip
