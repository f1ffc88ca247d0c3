"""What the sample loses where a layer, at a noise level, keeps only a share of its blocks.

A few inputs are run, and three things are measured of each, every one where it can be seen:

- how a layer's own output suffers at a ladder of densities: with dense attention on, a few blocks
  of queries are attended once more at each, with the policy's selection and pooled keys;
- how far that reaches: at one step of each stage the denoiser is called again and again, each time
  with another layer sparse, and its outputs compared;
- what it does to the sample: the run is repeated, each time with another stage sparse.

Their product is what budgets are made of: the mean squared error of the sample, by stage, layer and
density. At last the inputs are run with whole allocations of a few densities, whose quality tells
how these errors sum up, and how far inputs lie apart. An input takes as long as about two runs, one
more for each stage and each density that is checked; what was measured is kept, so that a stopped
calibration goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from accel.artifact import Artifact, Fingerprint, fingerprints, inputs_digest
from accel.denoiser import Denoiser, denoisers
from accel.files import write_atomically
from accel.measure import pipeline_samples
from accel.method import Attached, Method, attached
from sparse_attn._live import (
    LiveSparse,
    Place,
    SparseAttention,
    attention_paths,
    first_of,
    with_text,
)
from sparse_attn.block_map import Scope, keep_share
from sparse_attn.budgets import METHOD, Allocation, Budgets, decibels, stage_ends
from sparse_attn.estimators import block_scores, complement, weighed
from sparse_attn.kernels.reference import Pooled

LEAST = 1e-12  # squared error of samples that are alike


@dataclass(frozen=True)
class CalibrationSettings:
    """How budgets are measured.

    ladder: densities, ascending, the last 1. tried: the one of them at which layers and stages are
    tried. stages: how many parts the steps are put together in. queries: blocks of queries that are
    attended again at an attention. checked: densities at which whole allocations are run. blocks,
    pooled, dense, allocate: as the policy will have them. Raises ValueError for settings that
    measure nothing.
    """

    ladder: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    tried: float = 0.2
    stages: int = 4
    queries: int = 4
    checked: tuple[float, ...] = (0.15, 0.3, 0.5)
    blocks: tuple[int, int] = (256, 64)
    pooled: bool = True
    dense: float = 0.2  # share of the first steps that is left out, as the policy leaves it dense
    allocate: Scope = "head"

    def __post_init__(self) -> None:
        if list(self.ladder) != sorted(set(self.ladder)) or not 0 < self.ladder[0] < 1:
            raise ValueError(f"CalibrationSettings.ladder = {self.ladder}: ascending, above 0")
        if self.ladder[-1] != 1:
            raise ValueError("CalibrationSettings.ladder: its last density must be 1")
        if self.tried not in self.ladder[:-1]:
            raise ValueError(f"CalibrationSettings.tried = {self.tried} is not on the ladder")
        if not self.checked or not all(self.ladder[0] <= x < 1 for x in self.checked):
            raise ValueError(f"CalibrationSettings.checked = {self.checked}: within the ladder")
        if self.stages < 1 or self.queries < 1:
            raise ValueError("CalibrationSettings: stages and queries are at least 1")
        if self.allocate not in get_args(Scope):
            raise ValueError(
                f"CalibrationSettings.allocate = {self.allocate!r}: one of {get_args(Scope)}"
            )


def measured_budgets(
    pipe: Any,
    inputs: list[dict[str, Any]],
    settings: CalibrationSettings,
    parts: str | None = None,
) -> Artifact:
    """The artifact that `SubblockLSE(artifact=...)` reads.

    Args:
        inputs: of one sample each, or a batch; noise is that of their generators' seeds, else of
            their place in the list.
        parts: folder where the figures of each input are kept.

    Raises:
        ValueError: no inputs, runs at different noise levels, or a sample that is not finite.
    """
    if not inputs:
        raise ValueError("calibrate: give at least one input")
    key = _key(pipe, settings)
    found = []
    probe = _Probe((settings.dense, 0.0), settings.blocks, pooled=settings.pooled)
    with attached(probe, pipe) as live:
        assert isinstance(live, _LiveProbe)
        live.settings = settings
        for i, arguments in enumerate(inputs):
            name = f"{key[:8]}-{_digest(arguments, i)}.json"
            file = None if parts is None else Path(parts) / name
            found.append(_kept(file) or _measure(pipe, live, arguments, i, file))
            if _grid(found[0]) != _grid(found[-1]):
                raise ValueError("calibrate: all inputs must have the same noise levels")
        tensors = _tensors(pipe, settings, found)
        every = _digest({"inputs": [_plain(x) for x in inputs]}, 0)
        file = None if parts is None else Path(parts) / f"{key[:8]}-{every}-checks.json"
        checks = _kept(file) or _check(pipe, live, inputs, tensors, file)
    tensors |= {name: torch.tensor(x, dtype=torch.float64) for name, x in checks.items()}
    guided = {figures.get("guided") for of_input in found for figures in of_input.values()}
    return Artifact(
        method=METHOD,
        **fingerprints(pipe),
        tensors=tensors,
        match="architecture",
        guidance=guided.pop() if len(guided) == 1 else None,
        inputs_sha256=inputs_digest([_plain(x) for x in inputs]),
        settings=asdict(settings),
    )


def _check(
    pipe: Any,
    live: _LiveProbe,
    inputs: list[dict[str, Any]],
    tensors: dict[str, Tensor],
    file: Path | None,
) -> dict[str, list]:
    """What whole allocations do to the inputs, in dB: {"summed": (checked,), "seen": (inputs,
    checked)}."""
    arrays = {name: x.numpy() for name, x in tensors.items()}
    slots = [d.slot for d in denoisers(pipe)]
    budgets = Budgets.of(arrays, slots, live.settings.allocate)
    allocations = [budgets.at_density(density) for density in live.settings.checked]
    seen: list[list[float]] = []
    for i, arguments in enumerate(inputs):
        plain = _sample(pipe, arguments, i)
        seen.append([])
        for live.allocation in allocations:
            seen[-1].append(_decibels(_sample(pipe, arguments, i), plain))
        live.allocation = None
    found = {"summed": [a.quality for a in allocations], "seen": seen}
    if file is not None:
        write_atomically(file, json.dumps(found).encode())
    return found


def _decibels(sample: Tensor, plain: Tensor) -> float:
    return decibels(max(LEAST, _squared_error(sample, plain)))


def _squared_error(sample: Tensor, plain: Tensor) -> float:
    error = float((sample - plain).square().mean())
    if not math.isfinite(error):
        raise ValueError(
            "calibrate: a sample has values that are not finite; run the pipeline in a dtype "
            "with a wider range, such as bfloat16 or float32"
        )
    return error


def _measure(
    pipe: Any, live: _LiveProbe, arguments: dict[str, Any], at: int, file: Path | None
) -> dict[str, Any]:
    """By slot: what `_LiveProbe.end` says, and "losses" of stages."""
    live.begin()
    plain = _sample(pipe, arguments, at)
    found: dict[str, dict[str, Any]] = dict(live.end())
    if not found:
        raise ValueError("calibrate: no attention of this run could be sparse; see its report")
    for slot, figures in found.items():
        figures |= {"losses": [], "guided": live.guided}
        for stage in live.stages(slot):
            live.sparse_steps = {(slot, step) for step in stage}
            sample = _sample(pipe, arguments, at)
            figures["losses"].append(_squared_error(sample, plain))
    live.sparse_steps = set()
    if file is not None:
        write_atomically(file, json.dumps(found).encode())
    return found


def _grid(found: dict[str, Any]) -> dict[str, Any]:
    return {slot: figures["sigmas"] for slot, figures in found.items()}


def _sample(pipe: Any, arguments: dict[str, Any], at: int) -> Tensor:
    seed = _plain(arguments).get("generator", at)
    return pipeline_samples(pipe, arguments, seed)


def _kept(file: Path | None) -> dict[str, Any] | None:
    """``None`` if there are no figures, or their file was damaged: then they are made again."""
    try:
        return json.loads(file.read_bytes()) if file is not None and file.is_file() else None
    except ValueError:
        return None


def _key(pipe: Any, settings: CalibrationSettings) -> str:
    prints = [asdict(Fingerprint.of(d.module)) for d in denoisers(pipe)]
    config = getattr(pipe.scheduler, "config", {})
    levels = {name: str(value) for name, value in config.items() if not name.startswith("_")}
    what = [prints, asdict(settings), type(pipe.scheduler).__name__, levels]
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(arguments: dict[str, Any], at: int) -> str:
    return inputs_digest([{"generator": at, **_plain(arguments)}])[:12]


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As JSON: a generator is its seed."""
    seeded = isinstance(arguments.get("generator"), torch.Generator)
    more = {"generator": arguments["generator"].initial_seed()} if seeded else {}
    return {**arguments, **more}


@dataclass(frozen=True)
class _Probe(SparseAttention, Method):
    """Attends densely, through the processors, but where it is told to try a density."""

    guard: bool = False
    pooled: bool = True

    def neutral(self) -> Method:
        return replace(self)

    def new_live(self, pipe: Any) -> Attached:
        return _LiveProbe(self, pipe)

    def nominal(self) -> float:
        return 1.0

    def attends_densely(self) -> bool:
        return False

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        assert isinstance(live, _LiveProbe)
        if live.tries(place):
            share, gains = live.asks(place)
            scores = block_scores(q, k, live.values, place.blocks, self.pooled)
            return keep_share(weighed(scores, gains), share, live.settings.allocate)
        live.saw(q, k, place)
        nq, nk = (-(-x.shape[2] // n) for x, n in zip((q, k), place.blocks, strict=True))
        return torch.ones(*q.shape[:2], nq, nk, dtype=torch.bool, device=q.device)

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        return complement(k, v, keep, place.blocks[1]) if self.pooled else None


class _LiveProbe(LiveSparse):
    """Measures a run, then is sparse where it is asked to be."""

    def __init__(self, method: _Probe, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.settings = CalibrationSettings()
        self.weights = {d.slot: _output_weights(d) for d in denoisers(pipe)}
        self.sparse_steps: set[tuple[str, int]] = set()
        self.allocation: Allocation | None = None  # what is checked
        self._layer: int | None = None  # the one that is tried
        self._measuring = False
        self._steps: dict[str, dict[int, float]] = {}  # slot -> step -> sigma
        self._seen: dict[tuple[str, int, int], list[tuple[Tensor, Tensor]]] = {}
        self._reach: dict[tuple[str, int], list[Tensor]] = {}

    def begin(self) -> None:
        """The next run is measured."""
        self._measuring, self.sparse_steps = True, set()
        self._steps = defaultdict(dict)
        self._seen, self._reach = defaultdict(list), defaultdict(list)

    def saw(self, q: Tensor, k: Tensor, place: Place) -> None:
        """An attention of the run, as it is without us."""
        if not self._measuring or self._layer is not None:
            return
        weight = self.weights[place.denoiser][place.layer]
        found = layer_errors(q, k, self.values, place, self.settings, weight)
        self._seen[place.denoiser, place.step, place.layer].append(found)
        self._steps[place.denoiser][place.step] = place.sigma

    def tries(self, place: Place) -> bool:
        if self._layer is not None:
            return place.layer == self._layer
        if self.allocation is not None:
            return True
        return (place.denoiser, place.step) in self.sparse_steps

    def asks(self, place: Place) -> tuple[float, Tensor]:
        """Share of blocks and gains of heads, where something is tried."""
        if self.allocation is not None:
            at = (place.denoiser, place.layer, place.sigma)
            return self.allocation.of(*at, self.values.device)
        found = self._seen[place.denoiser, place.step, place.layer]
        return self.settings.tried, _geometric_mean(torch.stack([gains for _, gains in found]))

    def _around_denoiser(
        self, denoiser: Denoiser, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """A call of the measured run is made again with one layer sparse, for each layer."""
        call = super()._around_denoiser
        out = call(denoiser, call_next, *args, **kwargs)
        now = self.now
        assert now is not None
        seen = self._measuring and now.step in self._steps[denoiser.slot]
        if seen and self._is_probed(denoiser.slot, now.step):
            right = _tensor(out).float()
            for layer in range(len(attention_paths(denoiser))):
                self._layer = layer
                try:
                    again = _tensor(call(denoiser, call_next, *args, **kwargs)).float()
                finally:
                    self._layer = None
                off = (again - right).square().mean() / right.square().mean()
                self._reach[denoiser.slot, now.step].append(off)
        return out

    def _is_probed(self, slot: str, step: int) -> bool:
        """One in as many as make the stages: which step of a stage does not matter much. Of every
        denoiser the first, too, which may be the only one that it is called at."""
        if (slot, step) in self._reach or all(other != slot for other, _ in self._reach):
            return True
        run = self.clock.run
        assert run is not None
        first = first_of(self.settings.dense, run.steps)
        every = max(1, (run.steps - first) // self.settings.stages)
        return (step - first) % every == every // 2

    def stages(self, slot: str) -> list[list[int]]:
        """The measured steps in parts, by number."""
        steps = torch.tensor(sorted(self._steps[slot]))
        parts = torch.tensor_split(steps, min(self.settings.stages, len(steps)))
        return [part.tolist() for part in parts]

    def end(self) -> dict[str, dict[str, list]]:
        """By slot: {"sigmas", "ends", "steps", "errors", "gains", "reach"}, each by stage."""
        self._measuring = False
        found = {}
        for denoiser in denoisers(self._pipe()):
            slot, layers = denoiser.slot, range(len(attention_paths(denoiser)))
            if not self._steps[slot]:
                continue
            figures = found[slot] = defaultdict(list)
            for stage in self.stages(slot):
                errors, gains = [], []
                for layer in layers:
                    seen = [x for step in stage for x in self._seen[slot, step, layer]]
                    errors.append(torch.stack([x for x, _ in seen]).mean(0).tolist())
                    gains.append(_geometric_mean(torch.stack([x for _, x in seen])).tolist())
                figures["errors"].append(errors)
                figures["gains"].append(gains)
                figures["reach"].append(self._reach_of(slot, stage, len(layers)))
                figures["sigmas"].append(sum(self._steps[slot][s] for s in stage) / len(stage))
                figures["steps"].append(len(stage))
            levels = [[self._steps[slot][s] for s in stage] for stage in self.stages(slot)]
            figures["ends"] = stage_ends(levels)
        return found

    def _reach_of(self, slot: str, stage: list[int], layers: int) -> list[float]:
        """(layers,): mean over branches, at the probed step nearest to the middle of the stage."""
        probed = [step for at, step in self._reach if at == slot]
        nearest = min(probed, key=lambda step: abs(step - stage[len(stage) // 2]))
        calls = torch.stack(self._reach[slot, nearest]).view(-1, layers)
        return calls.mean(0).tolist()


def _geometric_mean(x: Tensor) -> Tensor:
    """Over the first axis."""
    return x.log().mean(0).exp()


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


def _output_weights(denoiser: Denoiser) -> list[Tensor | None]:
    """The output projection of each attention, (out, heads * d); None where there is none to be
    read: it is quantised, or away until it is called."""
    found: list[Tensor | None] = []
    for path in attention_paths(denoiser):
        out = getattr(denoiser.module.get_submodule(path), "to_out", None)
        weight = None if out is None else getattr(out[0], "weight", None)
        if type(weight) not in (Tensor, torch.nn.Parameter):  # as quantised layers have
            weight = None
        usable = weight is not None and weight.is_floating_point() and not weight.is_meta
        found.append(weight if usable else None)
    return found


def layer_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    settings: CalibrationSettings,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(ladder,) squared errors of a layer's output, through `weight`, relative to it; and (heads,)
    gains that make scores of blocks compare between heads.

    A gain is the error of a head at the density that is tried, as the scores of what was dropped
    foretell it. q (b, h, s, d), k and v in order; on sampled blocks of queries.
    """
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
    scores = block_scores(q, k, v, place.blocks, settings.pooled)

    def off(keep: Tensor) -> Tensor:
        """What the output of each head, (b, h, rows, d), differs by where these are kept."""
        if place.text:
            keep = with_text(keep, math.prod(place.grid), place.blocks)
        mine = keep[:, :, chosen][:, :, owner]  # (b, h, rows, nk)
        tokens = mine.repeat_interleave(place.blocks[1], dim=-1)[..., : k.shape[2]]
        kept, values = logits.masked_fill(~tokens, -math.inf), heads_v
        if settings.pooled:
            pooled = complement(k, v, keep, place.blocks[1])
            pk, pv = (x.float().repeat_interleave(repeat, dim=1) for x in pooled[:2])
            more = q[:, :, rows].float() @ pk.transpose(-1, -2) / math.sqrt(d)
            more = more + pooled.bias[:, :, chosen][:, :, owner]
            kept, values = torch.cat([kept, more], -1), torch.cat([values, pv], 2)
        return kept.softmax(-1) @ values - right

    parts = _parts(weight, h, d, q.device)
    tried = keep_share(scores, settings.tried, "head")
    missed = _through(off(tried), parts).square().sum((0, 2, 3))
    told = scores.masked_fill(tried, 0)[:, :, chosen].square().sum((0, 2, 3))
    gains = (missed.clamp(min=1e-12) / told.clamp(min=1e-12)).sqrt()
    whole = _through(right, parts).sum(1).square().sum().clamp(min=1e-30)
    errors = []
    for density in settings.ladder[:-1]:
        keep = keep_share(weighed(scores, gains), density, settings.allocate)
        errors.append(_through(off(keep), parts).sum(1).square().sum() / whole)
    return torch.stack([*errors, torch.zeros_like(errors[0])]), gains


def _parts(weight: Tensor | None, heads: int, width: int, device: torch.device) -> Tensor:
    """(h, d, out): each head's part of the output projection; without one, heads stay apart."""
    if weight is None or weight.shape[-1] != heads * width:
        return torch.eye(heads * width, device=device).unflatten(0, (heads, width))
    return weight.detach().to(device, torch.float32).unflatten(-1, (heads, width)).permute(1, 2, 0)


def _through(x: Tensor, parts: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, h, n, out)."""
    return torch.einsum("bhnd,hdo->bhno", x, parts)


def _tensors(
    pipe: Any, settings: CalibrationSettings, found: list[dict[str, Any]]
) -> dict[str, Tensor]:
    tensors = {"ladder": torch.tensor(settings.ladder, dtype=torch.float64)}
    for denoiser in denoisers(pipe):
        slot = denoiser.slot
        if slot not in found[0]:
            raise ValueError(f"calibrate: {slot} was not called; take more steps")

        def of(name: str, slot: str = slot) -> Tensor:
            """(inputs, stages, ...)."""
            return torch.tensor([x[slot][name] for x in found], dtype=torch.float64)

        tensors[f"{slot}/losses"] = losses(
            of("losses"), of("reach"), of("errors"), settings.ladder.index(settings.tried)
        )
        tensors[f"{slot}/gains"] = _geometric_mean(of("gains"))
        for name in ("sigmas", "steps", "ends"):
            tensors[f"{slot}/{name}"] = of(name)[0]
    return tensors


def losses(stages: Tensor, reach: Tensor, errors: Tensor, tried: int) -> Tensor:
    """(stages, layers, ladder): the sample's squared error, in the mean of dB over inputs.

    A stage's loss at the density that was tried, (inputs, stages), is shared out to its layers as
    their sparsity reached the denoiser's output, (inputs, stages, layers); at other densities it is
    as the layer's own errors, (inputs, stages, layers, ladder), are to those at that density.
    """
    whole = _geometric_mean(stages.clamp(min=LEAST))
    part = (reach / reach.sum(-1, keepdim=True).clamp(min=1e-30)).mean(0)
    curve = errors.mean(0)
    curve = curve / curve[..., tried, None].clamp(min=1e-30)
    return whole[:, None, None] * part[..., None] * curve
