"""Weights in few bits, part by part, so that each part's output stays what it was.

The paper's temporal-information-aware reconstruction (what depends on the timestep is one part,
rounded for its own outputs at all timesteps, without data) and block reconstruction (arXiv
2102.05426): inputs from the part quantised so far, outputs of the unquantised model as the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from quant._program import Program
from quant._recording import Call, inputs_and_outputs, inputs_of
from quant._rounding import (
    WARMUP,
    beta_at,
    first_rounding,
    gptq,
    rounding_loss,
    soft_codes,
    soft_weight,
)

LAMBDA = 0.01
TRAVEL = 20.0  # learning rate times iterations: the original's 1e-3 in 20,000
TIMES = 8  # of one TIAR minibatch

Weights = Mapping[str, Tensor]


class Rounding:
    """AdaRound variables of some layers, by name of the weight."""

    def __init__(self, weights: Weights, scales: Weights, bits: Mapping[str, int]) -> None:
        self.weights, self.scales, self.bits = dict(weights), dict(scales), dict(bits)
        self.v = {n: first_rounding(w, scales[n]).requires_grad_() for n, w in weights.items()}

    def soft(self) -> dict[str, Tensor]:
        return {
            n: soft_weight(w, self.scales[n], self.v[n], self.bits[n])
            for n, w in self.weights.items()
        }

    def codes(self) -> dict[str, Tensor]:
        return {
            n: soft_codes(w, self.scales[n], v.detach(), self.bits[n], hard=True)
            for (n, w), v in zip(self.weights.items(), self.v.values(), strict=True)
        }

    def fit(self, error: Callable[[dict[str, Tensor], int], Tensor], steps: int) -> list[float]:
        """Minimise ``error(soft weights, step)`` and the rounding loss; the errors on the way."""
        optimiser = torch.optim.Adam(self.v.values(), lr=TRAVEL / steps)
        seen = []
        for step in range(steps):
            with torch.enable_grad():
                loss = error(self.soft(), step)
                seen.append(float(loss.detach()))
                if step >= WARMUP * steps:
                    beta = beta_at(step, steps)
                    loss = loss + LAMBDA * sum(rounding_loss(v, beta) for v in self.v.values())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return seen


def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    path: str,
    rounding: Rounding,
    calls: list[Call],
    steps: int,
) -> list[float]:
    """Round the layers of the part at ``path`` for its outputs; ``rounding`` names start there."""
    given = inputs_and_outputs(student, path, calls)
    wanted = inputs_and_outputs(teacher, path, calls)
    part = student.get_submodule(path)
    own = dict(part.named_parameters())
    order = torch.Generator().manual_seed(0)

    def error(soft: dict[str, Tensor], step: int) -> Tensor:
        i = int(torch.randint(len(given), (1,), generator=order))
        args, kwargs, _ = given[i]
        output = functional_call(part, _in_types_of(own, soft), args, dict(kwargs))
        return distance(output, wanted[i][2])

    return rounding.fit(error, steps)


def reconstruct_temporal(
    plan: Program,
    sources: Mapping[str, Tensor],
    times: list[Tensor],
    rounding: Rounding,
    everything: Weights,
    steps: int,
) -> list[float]:
    """TIAR: sum over embeddings of their squared errors, at random timesteps of the grid."""
    with torch.no_grad():
        wanted = plan.play(everything.__getitem__, sources, times)
    order = torch.Generator().manual_seed(0)

    def error(soft: dict[str, Tensor], step: int) -> Tensor:
        chosen = torch.randperm(len(times), generator=order)[:TIMES].tolist()
        weights = {**everything, **_in_types_of(everything, soft)}
        made = plan.play(weights.__getitem__, sources, [times[i] for i in chosen])
        total = torch.zeros(())
        for i, outputs in zip(chosen, made, strict=True):
            for path, tensors in outputs.items():
                for a, b in zip(tensors, wanted[i][path], strict=True):
                    total = total + (a.float() - b.float()).pow(2).sum(-1).mean()
        return total / len(chosen)

    return rounding.fit(error, steps)


def distance(output: Any, wanted: Any) -> Tensor:
    """Squared error summed over channels, mean over everything else; over all tensors."""
    pairs = zip(_tensors(output), _tensors(wanted), strict=True)
    total = torch.zeros(())
    for a, b in pairs:
        total = total + (a.float() - b.float()).pow(2).sum(1 if a.ndim > 3 else -1).mean()
    return total


def _in_types_of(own: Weights, soft: Weights) -> dict[str, Tensor]:
    """Weights as the model computes with them, which may be in half precision."""
    return {name: weight.to(own[name].dtype) for name, weight in soft.items()}


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_flatten(output)[0]
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def rounded_by_gptq(
    student: nn.Module, path: str, scale: Tensor, bits: int, calls: list[Call]
) -> Tensor:
    """Codes of one layer, linear or an ungrouped convolution over images, from the inputs that the
    model quantised so far gives it.

    Raises:
        ValueError: these are not finite.
    """
    layer: Any = student.get_submodule(path)
    columns = layer.weight[0].numel()
    hessian = layer.weight.new_zeros(columns, columns, dtype=torch.float64)
    for given in inputs_of(student, path, calls):
        x = given.float()
        if x.ndim == 4:
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            x = x.transpose(1, 2)  # (b, places, c * k * k)
        rows = x.reshape(-1, columns).double()
        hessian += rows.t() @ rows
    if not bool(hessian.isfinite().all()):
        raise ValueError(
            f"inputs of {path} are not finite: the model computes NaN or infinity in "
            f"{layer.weight.dtype} on these inputs; look at its weights, or calibrate in float32"
        )
    of_each = scale.expand_as(layer.weight).flatten(1) if scale.ndim > 1 else scale
    return gptq(layer.weight.flatten(1), of_each, bits, hessian).view_as(layer.weight)
