"""What each head loses at each density, by layer and noise level: measured on a few inputs.

The pipeline runs as it is, with dense attention. At every attention a few blocks of queries are
attended once more at a ladder of densities, with the same selection and pooled keys as the policy
has, from one set of logits. The error of a head is what its output, through its part of the
output projection, differs by, squared, relative to the whole layer's output. Takes as long as a
few plain runs; each input's figures are kept, so that a stopped calibration goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.artifact import Artifact, Fingerprint, inputs_digest, write_atomically
from accel.denoiser import denoisers
from accel.method import Method, attached
from sparse_attn._live import LiveSparse, Place, SparseAttention, attention_paths, with_text
from sparse_attn.block_map import keep_share
from sparse_attn.budgets import METHOD
from sparse_attn.estimators import block_scores, complement


@dataclass(frozen=True)
class CalibrationSettings:
    """How budgets are measured. ladder: densities, ascending, the last 1. stages: how many parts
    the steps are put together in. queries: blocks of queries that are tried at an attention.
    Raises ValueError for settings that measure nothing.
    """

    ladder: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    stages: int = 4
    queries: int = 4
    blocks: tuple[int, int] = (256, 64)
    pooled: bool = True
    dense: float = 0.0  # share of the first steps that is left out, as the policy leaves it dense

    def __post_init__(self) -> None:
        if list(self.ladder) != sorted(set(self.ladder)) or not 0 < self.ladder[0] < 1:
            raise ValueError(f"CalibrationSettings.ladder = {self.ladder}: ascending, above 0")
        if self.ladder[-1] != 1:
            raise ValueError("CalibrationSettings.ladder: its last density must be 1")
        if self.stages < 1 or self.queries < 1:
            raise ValueError("CalibrationSettings: stages and queries are at least 1")


def measured_budgets(
    pipe: Any,
    inputs: list[dict[str, Any]],
    settings: CalibrationSettings,
    parts: str | None = None,
) -> Artifact:
    """The artifact that `SubblockLSE(artifact=...)` reads.

    Args:
        parts: folder where the figures of each input are kept.

    Raises:
        ValueError: no inputs, or runs of different length.
    """
    if not inputs:
        raise ValueError("calibrate: give at least one input")
    key = _key(pipe, settings)
    curves, sigmas = [], None
    with attached(_Probe(dense=(settings.dense, 0.0), blocks=settings.blocks), pipe) as live:
        assert isinstance(live, LiveSparse)
        for i, arguments in enumerate(inputs):
            file = None if parts is None else Path(parts) / f"{key[:8]}-{_digest(arguments)}.json"
            found = _kept(file) or _measure(pipe, live, settings, arguments, i, file)
            if sigmas is not None and found["sigmas"] != sigmas:
                raise ValueError("calibrate: all inputs must have the same number of steps")
            sigmas = found["sigmas"]
            curves.append(found["errors"])
    assert sigmas is not None
    return _artifact(pipe, inputs, settings, curves, sigmas)


def _measure(
    pipe: Any,
    live: LiveSparse,
    settings: CalibrationSettings,
    arguments: dict[str, Any],
    seed: int,
    file: Path | None,
) -> dict[str, Any]:
    """One run: {"sigmas": by step, "errors": {slot: {step: {layer: (heads, ladder)}}}}."""
    live.tables = _Curves(pipe, settings)
    pipe(**{"generator": torch.Generator("cpu").manual_seed(seed), **arguments})
    found = {"sigmas": live.tables.sigmas, "errors": live.tables.means()}
    if not found["errors"]:
        raise ValueError("calibrate: no attention of this run could be sparse; see its report")
    if file is not None:
        write_atomically(file, json.dumps(found).encode())
    return found


def _kept(file: Path | None) -> dict[str, Any] | None:
    return json.loads(file.read_text("utf-8")) if file is not None and file.is_file() else None


def _key(pipe: Any, settings: CalibrationSettings) -> str:
    prints = [asdict(Fingerprint.of(d.module)) for d in denoisers(pipe)]
    text = json.dumps([prints, asdict(settings), type(pipe.scheduler).__name__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(arguments: dict[str, Any]) -> str:
    return inputs_digest([_plain(arguments)])[:12]


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As JSON: a generator is its seed."""
    seeded = isinstance(arguments.get("generator"), torch.Generator)
    more = {"generator": arguments["generator"].initial_seed()} if seeded else {}
    return {**arguments, **more}


class _Curves:
    """Errors of one run, as they come."""

    def __init__(self, pipe: Any, settings: CalibrationSettings) -> None:
        self.settings = settings
        self.sigmas: dict[str, float] = {}  # JSON has no numbers as keys
        self.sums: dict[tuple[str, int, int], list[Tensor]] = defaultdict(list)
        self.weights = {d.slot: _output_weights(d) for d in denoisers(pipe)}

    def add(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> None:
        weight = self.weights[place.denoiser][place.layer]
        found = head_errors(q, k, v, place, self.settings, weight)
        self.sigmas[str(place.step)] = place.sigma
        self.sums[place.denoiser, place.step, place.layer].append(found)

    def means(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (slot, step, layer), errors in self.sums.items():
            by_step = found.setdefault(slot, {}).setdefault(str(step), {})
            by_step[str(layer)] = torch.stack(errors).mean(0).tolist()
        return found


def _output_weights(denoiser: Any) -> list[Tensor | None]:
    """The output projection of each attention, (out, heads * d); None where there is none."""
    found: list[Tensor | None] = []
    for path in attention_paths(denoiser):
        out = getattr(denoiser.module.get_submodule(path), "to_out", None)
        weight = None if out is None else getattr(out[0], "weight", None)
        usable = weight is not None and weight.is_floating_point()
        found.append(weight if usable else None)
    return found


def head_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    settings: CalibrationSettings,
    weight: Tensor | None,
) -> Tensor:
    """(heads, ladder): squared error of each head through its part of `weight`, over the squared
    output of the layer. q (b, h, s, d), k and v in order, on sampled blocks of queries."""
    h, s, d = q.shape[1:]
    repeat = h // k.shape[1]
    nq = -(-s // place.blocks[0])
    chosen = torch.linspace(0, nq - 1, min(settings.queries, nq)).long().to(q.device)
    rows = chosen[:, None] * place.blocks[0] + torch.arange(place.blocks[0], device=q.device)
    rows = rows.flatten()
    rows = rows[rows < s]
    owner = torch.searchsorted(chosen, rows // place.blocks[0])
    heads_k, heads_v = (x.float().repeat_interleave(repeat, dim=1) for x in (k, v))
    logits = q[:, :, rows].float() @ heads_k.transpose(-1, -2) / math.sqrt(d)
    right = logits.softmax(-1) @ heads_v
    metric = _metric(weight, h, d, q)
    whole = _squared(right, metric).sum()  # heads of a layer as if independent
    score = block_scores(q, k, v, place.blocks, settings.pooled)
    errors = []
    for density in settings.ladder[:-1]:
        keep = keep_share(score, density, "head")
        if place.text:
            keep = with_text(keep, math.prod(place.grid), place.blocks)
        mine = keep[:, :, chosen][:, :, owner]  # (b, h, rows, nk)
        tokens = mine.repeat_interleave(place.blocks[1], dim=-1)[..., : k.shape[2]]
        kept = logits.masked_fill(~tokens, -math.inf)
        values = heads_v
        if settings.pooled:
            pooled = complement(k, v, keep, place.blocks[1])
            pk, pv = (x.float().repeat_interleave(repeat, dim=1) for x in pooled[:2])
            more = q[:, :, rows].float() @ pk.transpose(-1, -2) / math.sqrt(d)
            more = more + pooled.bias[:, :, chosen][:, :, owner]
            kept, values = torch.cat([kept, more], -1), torch.cat([values, pv], 2)
        errors.append(_squared(kept.softmax(-1) @ values - right, metric) / whole)
    return torch.stack([*errors, torch.zeros_like(errors[0])], dim=-1)


def _metric(weight: Tensor | None, heads: int, width: int, like: Tensor) -> Tensor:
    """(h, d, d): what squared lengths of a head's output are after the projection."""
    if weight is None or weight.shape[-1] != heads * width:
        return torch.eye(width, device=like.device).expand(heads, width, width)
    part = weight.detach().to(like.device, torch.float32).unflatten(-1, (heads, width))
    return torch.einsum("ohd,ohe->hde", part, part)


def _squared(x: Tensor, metric: Tensor) -> Tensor:
    """(h,): summed over batch and queries."""
    return torch.einsum("bhnd,hde,bhne->h", x, metric, x)


def _artifact(
    pipe: Any,
    inputs: list[dict[str, Any]],
    settings: CalibrationSettings,
    curves: list[dict[str, Any]],
    sigmas: dict[str, float],
) -> Artifact:
    steps = sorted(map(int, sigmas))
    tensors = {"ladder": torch.tensor(settings.ladder, dtype=torch.float64)}
    for denoiser in denoisers(pipe):
        mine = [s for s in steps if str(s) in curves[0].get(denoiser.slot, {})]
        if not mine:
            raise ValueError(f"calibrate: {denoiser.slot} was not called; take more steps")
        stages = torch.tensor_split(torch.tensor(mine), min(settings.stages, len(mine)))
        errors, levels = [], []
        for stage in stages:
            picked = [c[denoiser.slot][str(s)] for c in curves for s in stage.tolist()]
            layers = sorted(map(int, picked[0]))
            errors.append([torch.tensor([p[str(n)] for p in picked]).mean(0) for n in layers])
            levels.append(sum(sigmas[str(s)] for s in stage.tolist()) / len(stage))
        tensors[f"{denoiser.slot}/errors"] = torch.stack([torch.stack(e) for e in errors]).double()
        tensors[f"{denoiser.slot}/sigmas"] = torch.tensor(levels, dtype=torch.float64)
    return Artifact(
        method=METHOD,
        fingerprint=Fingerprint.of(denoisers(pipe)[0].module),
        tensors=tensors,
        match="architecture",
        inputs_sha256=inputs_digest([_plain(x) for x in inputs]),
        settings=asdict(settings),
    )


@dataclass(frozen=True)
class _Probe(SparseAttention, Method):
    """Attends densely, through the processors, and measures on the way."""

    guard: bool = False

    def neutral(self) -> Method:
        return replace(self)

    def nominal(self) -> float:
        return 1.0

    def attends_densely(self) -> bool:
        return False

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        if live.tables is not None:
            live.tables.add(q, k, live.values, place)
        nq, nk = (-(-x.shape[2] // n) for x, n in zip((q, k), place.blocks, strict=True))
        return torch.ones(*q.shape[:2], nq, nk, dtype=torch.bool, device=q.device)
