"""Puts a policy into a pipeline: where attention is sparse, in which order tokens stand, and what
was really kept.

A policy is a method that says which blocks of keys a block of queries attends to (`select`). The
rest is here. Tokens are put in the policy's order once a forward where a family permits it (Wan:
behind the patch embedding, with the rotary table), else at each attention. Early steps and layers
attend densely, through the host's own processor, in the same order: hidden states that a cache
holds from one step to the next must be of the same tokens. So do calls that do not fit or would be
slower, as the host lays tokens; whether they do is the same in all of a run.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accel import compat
from accel.clock import Run, denoiser_modules
from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method
from sparse_attn import _graphs
from sparse_attn._dense import Attention
from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.reference import Pooled
from sparse_attn.processors import family_of, processor_for
from sparse_attn.speed import Size, worth_it
from sparse_attn.token_order import Grid, TokenOrder, gilbert, raster

CANARY_ROWS = 64  # queries that a canary attends densely


@dataclass(frozen=True)
class Place:
    """Which attention of a run is computed, as policies see it: video tokens in order, then text.

    layer: counts all attentions of a denoiser. step, steps: of the sampling grid.
    """

    grid: Grid
    order: TokenOrder
    text: int  # tokens after the video's, in keys; queries may have padding more
    blocks: tuple[int, int]  # tokens of a block of queries, of keys
    denoiser: str
    layer: int
    layers: int
    step: int
    steps: int
    sigma: float
    branch: str


@dataclass(frozen=True)
class SparseAttention(ABC):
    """What the policies have in common: `class Mine(SparseAttention, Method)`.

    dense: shares of the first steps and of the first layers that attend densely. blocks: tokens of
    a block of queries and of keys. guard: attend densely where that is faster. canary: every so
    many sparse steps compare with dense attention on 64 queries, for the report; 0 never.
    """

    SLOTS: ClassVar = ("attention", "tokens", "denoiser.call")
    ORDER: ClassVar[Literal["gilbert", "raster"]] = "gilbert"

    dense: tuple[float, float] = (0.2, 0.0)
    blocks: tuple[int, int] = (256, 64)
    guard: bool = True
    canary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
        name = type(self).__name__
        if not all(0 <= share <= 1 for share in self.dense):
            raise ValueError(f"{name}.dense = {self.dense}: shares of steps and layers, 0 to 1")
        if any(size < 16 or size & (size - 1) for size in self.blocks):
            raise ValueError(f"{name}.blocks = {self.blocks}: powers of two, at least 16")
        if self.canary < 0:
            raise ValueError(f"{name}.canary = {self.canary}: at least 0")

    @abstractmethod
    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        """Blocks to keep, bool (b, h, nq, nk), of q (b, h, s, d) and k in order; text is added.

        `live.values` are the call's values, for policies that try what they keep.
        """

    def pool(self, k: Tensor, v: Tensor, keep: Tensor, place: Place) -> Pooled | None:
        """Keys and values that stand for many tokens each, given what is kept at last."""
        return None

    @abstractmethod
    def nominal(self) -> float:
        """Expected density, for the guard: work done as a share of dense attention's."""

    def attends_densely(self) -> bool:
        """Whether these settings are the neutral ones: nothing is replaced."""
        return self.nominal() >= 1

    def prepare(self, pipe: Any, live: LiveSparse) -> None:  # noqa: B027 (most have none)
        """Read artifacts. Raises ValueError where one does not fit the pipeline."""

    def claims(self, pipe: Any) -> frozenset[Claim]:
        attentions, tokens = [], []
        for denoiser in denoisers(pipe):
            family_of(denoiser.cls)
            attentions += [f"{denoiser.slot}.{path}" for path in attention_paths(denoiser)]
            tokens += [f"{denoiser.slot}.{path}" for path in REORDERED_ONCE.get(denoiser.cls, ())]
        found = {("attention", frozenset(attentions))}
        if tokens:
            found.add(("tokens", frozenset(tokens)))
        return frozenset(found)

    def new_live(self, pipe: Any) -> Attached:
        assert isinstance(self, Method)
        return LiveSparse(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, LiveSparse)
        self.prepare(pipe, live)
        if self.attends_densely():
            return
        # an offloaded pipeline's own device is where its weights rest
        dispatch.kernel_for(getattr(pipe, "_execution_device", pipe.device).type)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser)


# Modules around which the tokens of a whole forward can be put in another order: the video tokens
# appear, the rotary table is made, the tokens are given back.
REORDERED_ONCE = {"WanTransformer3DModel": ("patch_embedding", "rope", "proj_out")}
# Dense attention with a mask, which the operator that stands in compiled graphs does not get.
MASKED = ("HunyuanVideoTransformer3DModel",)


def attention_paths(denoiser: Denoiser) -> list[str]:
    """Self-attentions of the blocks, in order."""
    return [block.self_attn for block in denoiser.blocks if block.self_attn is not None]


@dataclass(frozen=True)
class _Geometry:
    """The sequence of one denoiser call."""

    denoiser: Denoiser
    grid: Grid
    order: TokenOrder
    sequence: TokenOrder | None  # host's joint sequence -> video in order, text; None: in order
    text: int
    hidden_text: int = 0  # padding at the end of the text, which no query attends to
    dense: bool = False  # nothing is sparse in this call, whose tokens are in order all the same


class LiveSparse(Attached):
    """The processors, the present call's geometry and the counts."""

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        assert isinstance(method, SparseAttention)
        self.policy: SparseAttention = method
        self.geometry: _Geometry | None = None
        self.tables: Any = None  # what `prepare` read
        self.values: Any = None
        self._kept: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # (step, layer)
        self._canaries: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._dense: dict[str, int] = defaultdict(int)
        self._adopted: list[Denoiser] = []
        self._whole: set[str] = set()  # denoisers that are one compiled graph
        self._in_graphs: set[str] = set()  # these, and denoisers with compiled blocks
        self._unable: dict[str, str] = {}  # denoisers that attend densely, and why

    # -- attaching ---------------------------------------------------------------------------

    def adopt(self, denoiser: Denoiser) -> None:
        """Replace the processors of a denoiser and listen to its calls."""
        paths = attention_paths(denoiser)
        self._adopted.append(denoiser)
        for layer, path in enumerate(paths):
            module = denoiser.module.get_submodule(path)
            site = _Site(self, layer, len(paths), module.processor, denoiser.cls not in MASKED)
            processor = processor_for(denoiser.cls, path, module.processor, site)
            self.patch.swap(module, "processor", processor)
            self._layered.add(id(module))
        self.around_denoiser(denoiser.slot, functools.partial(self._around_denoiser, denoiser))
        if denoiser.cls in REORDERED_ONCE:
            embedding, rope, out = REORDERED_ONCE[denoiser.cls]
            get = denoiser.module.get_submodule
            self.around_call(get(embedding), self._reorder_embedded)
            self.around_call(get(rope), self._reorder_rotary)
            self.around_call(get(out), self._restore)

    # -- a denoiser call ---------------------------------------------------------------------

    def _around_denoiser(
        self, denoiser: Denoiser, call_next: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        self.geometry = self._geometry(denoiser, args, kwargs)
        if self.geometry is not None and self.geometry.sequence is None:
            args, kwargs = self._reorder_timesteps(denoiser, args, kwargs)
        try:
            return call_next(*args, **kwargs)
        finally:
            self.geometry = None

    def _geometry(self, denoiser: Denoiser, args: tuple, kwargs: dict) -> _Geometry | None:
        """None where the whole call attends densely; says why in the report."""
        now, run = self.now, self.clock.run
        assert now is not None
        assert run is not None
        if denoiser.slot in self._unable:
            return self._all_dense(self._unable[denoiser.slot])
        if denoiser.slot in self._in_graphs and torch.is_grad_enabled():
            self.fallback("compiled graphs have no gradients of sparse attention")
            return None
        if torch.is_grad_enabled() and denoiser.module.is_gradient_checkpointing:
            self.fallback("gradient checkpointing attends again when the call is over")
            return None
        dense = now.step < first_of(self.policy.dense[0], run.steps)
        if dense and not self._is_ordered(denoiser, run.steps):
            return self._all_dense("first steps")
        try:
            grid = denoiser.grid(args, kwargs)
        except ValueError as error:
            self.fallback(str(error))
            return None
        span = denoiser.text_span(args, kwargs)
        text = 0 if span is None else span.stop - span.start
        sample = denoiser.sample(args, kwargs)
        if self.policy.guard and not self._gains(denoiser, sample, math.prod(grid) + text):
            return self._all_dense("guard: dense attention is faster here")
        if dense:
            self._dense["first steps"] += 1
        device = sample.device
        order = ORDERS[self.policy.ORDER](grid).on(device)
        sequence = None
        if not self._is_ordered(denoiser, run.steps):
            sequence = _joint_order(grid, self.policy.ORDER, text, span is None or span.start > 0)
            sequence = sequence.on(device)
        hidden = self._hidden_text(denoiser, args, kwargs)
        if hidden is None:
            self.fallback("texts of different lengths in one batch")
            return None
        return _Geometry(denoiser, grid, order, sequence, text, hidden, dense)

    def _is_ordered(self, denoiser: Denoiser, steps: int) -> bool:
        """Whether the tokens of all calls of a run are in the policy's order, sparse or not."""
        if denoiser.cls not in REORDERED_ONCE or denoiser.slot in self._whole:
            return False
        layers = len(attention_paths(denoiser))
        firsts = zip(self.policy.dense, (steps, layers), strict=True)
        return all(first_of(share, count) < count for share, count in firsts)

    def _gains(self, denoiser: Denoiser, sample: Tensor, tokens: int) -> bool:
        shape = Attention("", denoiser.module.get_submodule(attention_paths(denoiser)[0])).shape
        size = Size(sample.device, sample.dtype, *shape, tokens, self.policy.blocks)
        return worth_it(size, self.policy.nominal())

    def _all_dense(self, reason: str) -> None:
        self._dense[reason] += 1

    def _hidden_text(self, denoiser: Denoiser, args: tuple, kwargs: dict) -> int | None:
        """Text tokens at the end that are padding; None where batch rows differ."""
        if denoiser.cls not in MASKED:
            return 0
        mask = denoiser.argument("encoder_attention_mask", args, kwargs)
        known = _hidden_lengths()
        if mask not in known:  # once a tensor: pipelines make it once a run
            seen = mask.sum(1, dtype=torch.int)  # as the host counts: half types miscount
            lengths = set((mask.shape[1] - seen).tolist())
            known[mask] = int(lengths.pop()) if len(lengths) == 1 else None
            self.count("syncs")
        return known[mask]

    # -- the order of tokens -----------------------------------------------------------------

    @property
    def _order_of_all(self) -> TokenOrder | None:
        """Where the tokens of a whole forward are put in order; None: at each attention, or not."""
        geometry = self.geometry
        return None if geometry is None or geometry.sequence is not None else geometry.order

    def _reorder_embedded(self, call_next: Callable, *args: Any, **kwargs: Any) -> Tensor:
        out = call_next(*args, **kwargs)  # (b, c, f, h, w)
        order = self._order_of_all
        return out if order is None else out.flatten(2)[:, :, order.forward].view_as(out)

    def _reorder_rotary(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        tables = call_next(*args, **kwargs)  # (1, s, 1, d) each
        order = self._order_of_all
        return tables if order is None else tuple(table[:, order.forward] for table in tables)

    def _restore(self, call_next: Callable, *args: Any, **kwargs: Any) -> Tensor:
        out = call_next(*args, **kwargs)  # (b, s, c)
        order = self._order_of_all
        return out if order is None else out[:, order.back]

    def _reorder_timesteps(
        self, denoiser: Denoiser, args: tuple, kwargs: dict
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Wan 2.2 gives every token a timestep of its own where a frame is given."""
        timestep = denoiser.argument("timestep", args, kwargs)
        if getattr(timestep, "ndim", 0) != 2 or self.geometry is None:
            return args, kwargs
        ordered = timestep[:, self.geometry.order.forward]
        return denoiser.replace(args, kwargs, timestep=ordered)

    # -- an attention ------------------------------------------------------------------------

    def plan(self, layer: int, layers: int) -> Callable[..., Tensor] | None:
        """How the attention numbered `layer` attends now; None: densely."""
        if self.geometry is None or self.geometry.dense or self.now is None:
            self.count("computed")
            return None
        if layer < first_of(self.policy.dense[1], layers):
            self._dense["first layers"] += 1
            self.count("computed")
            return None
        return functools.partial(self._attend, layer, layers)

    def _attend(self, layer: int, layers: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (b, s, h, d) in the host's order, as the result is."""
        device = q.device.type
        if torch.is_autocast_enabled(device):  # attention is cast, selection is not
            inputs = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
            with torch.autocast(device, enabled=False):
                return self._attend(layer, layers, *inputs)
        geometry = self.geometry
        assert geometry is not None
        if geometry.sequence is not None:
            q, k, v = (x[:, geometry.sequence.forward] for x in (q, k, v))
        keys = k.shape[1] - geometry.hidden_text
        q, k, v = (x.transpose(1, 2) for x in (q, k[:, :keys], v[:, :keys]))
        place = self._place(layer, layers)
        self.values = v
        with torch.no_grad():  # what is kept is chosen, not learned
            keep = self.policy.keep(q, k, place, self)
        if geometry.text:
            keep = with_text(keep, math.prod(geometry.grid), self.policy.blocks)
        pooled = self.policy.pool(k, v, keep, place)
        self.values = None  # they would outlive the attention
        blocks = BlockMap(keep, *self.policy.blocks, q.shape[2], keys)
        out, lse = dispatch.attend(q, k, v, blocks, pooled)
        self.count("changed")
        self._kept[place.step, layer].append(blocks.density().mean())
        if self._canary_due(place):
            found = compared_with_dense(q, k, v, out, lse if pooled is None else None)
            self._canaries[place.step, layer].append(found)
        out = out.transpose(1, 2)
        return out if geometry.sequence is None else out[:, geometry.sequence.back]

    def _place(self, layer: int, layers: int) -> Place:
        geometry, now, run = self.geometry, self.now, self.clock.run
        assert geometry is not None
        assert now is not None
        assert run is not None
        return Place(
            geometry.grid, geometry.order, geometry.text - geometry.hidden_text,
            self.policy.blocks, geometry.denoiser.slot, layer, layers,
            now.step, run.steps, now.sigma, now.branch,
        )  # fmt: skip

    def _canary_due(self, place: Place) -> bool:
        first = first_of(self.policy.dense[0], place.steps)
        return self.policy.canary > 0 and (place.step - first) % self.policy.canary == 0

    # -- the report --------------------------------------------------------------------------

    def on_run(self, run: Run) -> None:
        self.geometry = None
        modules = denoiser_modules(self._pipe())
        self._whole = {slot for slot, module in modules if compat.is_compiled(module)}
        self._in_graphs = self._whole | {d.slot for d in self._adopted if _has_compiled_blocks(d)}
        self._unable = {d.slot: why for d in self._adopted if (why := self._why_dense(d))}
        for reason in self._unable.values():
            self.fallback(reason)
        for counts in (self._kept, self._canaries, self._dense):
            counts.clear()

    def _why_dense(self, denoiser: Denoiser) -> str | None:
        """What keeps all of a denoiser from being sparse in this run."""
        get = denoiser.module.get_submodule
        processors = [get(path).processor for path in attention_paths(denoiser)]
        if any(getattr(p, "_parallel_config", None) is not None for p in processors):
            return "context parallelism is on, which splits the tokens"
        if denoiser.slot in self._in_graphs and denoiser.cls in MASKED:
            return "its blocks are compiled, and their attention has a mask"
        return None

    def _hidden_by_compile(self) -> bool:
        return False  # attention is an operator of its own in graphs

    def on_run_end(self, run: Run) -> None:
        """Densities are read here, so that no step waits for the device."""
        self.detail |= {"dense": dict(self._dense)} if self._dense else {}
        if self._kept:
            kept = _read(self._kept)
            self.detail |= {
                "density": _mean(kept.values()),
                "density_by_step": _means(kept, 0),
                "density_by_layer": _means(kept, 1),
            }
            self.count("syncs")
        if self._canaries:
            found = _read(self._canaries)
            self.count("syncs")
            names = ("output_error", "retained_mass", "least_retained_mass")
            for i, name in enumerate(names):
                values = {at: x[i] for at, x in found.items() if not math.isnan(x[i])}
                if values:
                    by_layer = _means(values, 1)
                    self.detail[name] = {"mean": _mean(values.values()), "by_layer": by_layer}


def _has_compiled_blocks(denoiser: Denoiser) -> bool:
    get = denoiser.module.get_submodule
    return any(compat.is_compiled(get(block.path)) for block in denoiser.blocks)


class _Site:
    """See `processors.site.Site`. stock: the host's processor there. in_graphs: whether a compiled
    graph may call this attention."""

    def __init__(
        self, live: LiveSparse, layer: int, layers: int, stock: Any, in_graphs: bool
    ) -> None:
        self.live, self.layer, self.layers, self.stock = live, layer, layers, stock
        self.taken = 0
        self.number = _graphs.numbered(self) if in_graphs else None

    def sparse(self) -> Callable[..., Tensor] | None:
        if compat.is_compiling():
            able = self.number is not None and not torch.is_grad_enabled()
            return self._in_graph if able else None
        found = self.live.plan(self.layer, self.layers)
        self.taken += found is not None
        return found

    def _in_graph(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _graphs.attend(q, k, v, self.number)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a graph calls: sparse or dense, as it is now."""
        found = self.sparse()
        return _graphs.attend_as_host(self.stock, q, k, v) if found is None else found(q, k, v)


ORDERS: dict[str, Callable[[Grid], TokenOrder]] = {"gilbert": gilbert, "raster": raster}


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _joint_order(grid: Grid, order: str, text: int, text_last: bool) -> TokenOrder:
    """Of a joint sequence: the video in order, then the text."""
    video, tokens = ORDERS[order](grid).forward, math.prod(grid)
    if text_last:
        return TokenOrder.of(torch.cat([video, tokens + torch.arange(text)]))
    return TokenOrder.of(torch.cat([text + video, torch.arange(text)]))


def first_of(share: float, count: int) -> int:
    """How many of `count` that share is, at least; 0.07 of 100 is 7, whatever floats say."""
    return math.ceil(round(share * count, 6))


def with_text(keep: Tensor, video: int, blocks: tuple[int, int]) -> Tensor:
    """Blocks that hold text tokens are seen by all, and see all."""
    keep = keep.clone()
    keep[:, :, video // blocks[0] :] = True
    keep[..., video // blocks[1] :] = True
    return keep


def compared_with_dense(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> Tensor:
    """(3,): relative error of the output (L2); mean and smallest retained softmax mass of a query.

    Exact, on queries spread evenly: what is retained is exp(lse sparse - lse dense). Without `lse`
    (of pooled keys it says nothing) the masses are nan.
    """
    rows = torch.linspace(0, q.shape[2] - 1, min(CANARY_ROWS, q.shape[2])).long().to(q.device)
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(repeat, dim=1) for x in (k, v))
    logits = q[:, :, rows].float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    right = logits.softmax(-1) @ v
    error = (out[:, :, rows].float() - right).norm() / right.norm()
    if lse is None:
        return torch.stack([error, error * math.nan, error * math.nan])
    mass = (lse[:, :, rows].float() - logits.logsumexp(-1)).exp()
    return torch.stack([error, mass.mean(), mass.min()])


def _read(found: dict[tuple[int, int], list[Tensor]]) -> dict[tuple[int, int], Any]:
    """Means of what was kept on the device, in one read; layers may be on several."""
    means = [torch.stack(values).mean(0) for values in found.values()]
    read = torch.stack([mean.to(means[0].device) for mean in means]).tolist()
    return dict(zip(found, read, strict=True))


def _mean(values: Any) -> float:
    values = list(values)
    return round(sum(values) / len(values), 5)


def _means(found: dict[tuple[int, int], float], axis: int) -> list[list[float]]:
    """[[step or layer, mean], ...]."""
    by: dict[int, list[float]] = defaultdict(list)
    for at, value in found.items():
        by[at[axis]].append(value)
    return [[at, _mean(by[at])] for at in sorted(by)]


@functools.cache
def _hidden_lengths() -> Any:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()
