"""Which 8-bit grids a layer's inputs get: one static scale, one for each group of steps, or rows'.

Chosen on held-out inputs: ranges of everything never clip what they were taken from, so that they
would look better than they are. What is chosen then gets the ranges of everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant._layers import Scheme
from quant._recording import LayerInputs
from quant._rounding import static_grid, through_static, through_token
from quant._stored import Grids


class Groups:
    """Calibrated timesteps, and the group of each: as many groups of neighbours as asked."""

    def __init__(self, times: list[float], groups: int) -> None:
        steps = len(times)
        self.times = torch.tensor(sorted(times, reverse=True))  # of several grids, too
        self.index = torch.arange(steps) * min(groups, steps) // steps
        self.of = dict(zip(self.times.tolist(), self.index.tolist(), strict=True))


def activations(
    asked: str, weight: Tensor, inputs: LayerInputs, groups: Groups
) -> tuple[Scheme, Grids]:
    """The scheme of one layer, or of a piece of one, and its static grids."""
    linear = weight.ndim == 2
    if asked == "whole":
        return "weight", None
    if asked == "token" and linear:
        return "token", None
    one = static_grids(inputs, groups.times, torch.zeros_like(groups.index))
    many = static_grids(inputs, groups.times, groups.index)
    if asked == "static":
        return "static", one
    if asked in ("groups", "token"):
        return "static", many
    fitted = inputs.fitted or inputs
    of_all = static_grids(fitted, groups.times, torch.zeros_like(groups.index))
    of_groups = static_grids(fitted, groups.times, groups.index)

    def by_group(time: float, x: Tensor) -> Tensor:
        group = groups.of[time]
        return through_static(x, of_groups[0][group], of_groups[1][group])

    through: dict[str, Callable[[float, Tensor], Tensor]] = {
        "one": lambda _, x: through_static(x, of_all[0][0], of_all[1][0]),
        "many": by_group,
    }
    if linear:
        through["token"] = lambda _, x: through_token(x)
    best = min(through, key=lambda k: output_error(weight, inputs, through[k]))
    if best == "token":
        return "token", None
    return "static", one if best == "one" else many


def output_error(
    weight: Tensor, inputs: LayerInputs, through: Callable[[float, Tensor], Tensor]
) -> float:
    """Of a layer's output when its held-out inputs go ``through`` a grid: the logarithm of squared
    errors, mean over calls, so that every noise level counts as much."""
    weight = weight if weight.ndim == 2 else weight.flatten(2).abs().sum(2)
    errors = []
    for when, x in inputs.rows:
        off = through(when, x) - x
        if x.shape[1] == weight.shape[1]:  # else a grouped convolution
            off = F.linear(off, weight)
        errors.append(off.pow(2).mean())
    if not errors:  # not in a call that was kept: nothing tells grids apart
        return 0.0
    return float(torch.stack(errors).clamp(min=1e-30).log().mean())


def static_grids(inputs: LayerInputs, times: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, from its timesteps and the next one either side."""
    known = [t for t in times.tolist() if t in inputs.low]
    low = torch.stack([inputs.low[t] for t in known])
    high = torch.stack([inputs.high[t] for t in known])
    group_of = dict(zip(times.tolist(), groups.tolist(), strict=True))
    own = torch.tensor([group_of[t] for t in known])
    lows, highs = [], []
    for group in range(int(groups.max()) + 1):
        inside: Any = (own == group).nonzero().flatten()
        if not len(inside):
            lows.append(low.min())
            highs.append(high.max())
            continue
        begin, end = max(int(inside[0]) - 1, 0), int(inside[-1]) + 2
        lows.append(low[begin:end].min())
        highs.append(high[begin:end].max())
    return static_grid(torch.stack(lows), torch.stack(highs))
