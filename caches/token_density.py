"""Spatial token density: run the middle of a transformer on fewer tokens in the noisy steps.

SparseDiT (FlexDiT, arXiv 2412.06028) averages tokens over a coarser grid for a range of blocks and
trains the model for it. Here, without training, F, the blocks between the first and the last ones,
sees one token for each cell of side x side of a frame, and the cell gets what changed:
y + up(F(down(y)) - down(y)), which is y where F does nothing. Text stays, and weighs more in joint
attention. Untrained, means do worse than tokens drawn at random: they have less noise than the
model expects at this time. So a cell is seen through one of its own, drawn anew each step, lest
errors add up, the same in all samples and guidance branches. Caches keep more for less work.
Memory: two activations during a call. Waits for nothing; acts inside graphs of `torch.compile`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from accel.clock import Run
from accel.denoiser import Block, Denoiser, Grid, denoisers
from accel.method import Attached, Claim, Method
from caches._gating import stacked_blocks
from caches._outputs import hidden_of, with_hidden

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = (  # those whose arguments of a block are known below
    *("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"),
    *("FluxTransformer2DModel", "WanTransformer3DModel", "CogVideoXTransformer3DModel"),
    *("HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel"),
)
ROTARY = ("rotary_emb", "image_rotary_emb", "freqs_cis")
TIME_BY_TOKEN = {"WanTransformer3DModel": 4, "LTXVideoTransformer3DModel": 3}  # axes of `temb` then
FULL = (  # arguments of a denoiser that act on blocks at full length, or leave some out
    *("block_controlnet_hidden_states", "controlnet_block_samples"),
    *("controlnet_single_block_samples", "skip_layers"),
)


class Sparse(NamedTuple):
    """Which tokens stand for all of a grid.

    members: (sparse, k), tokens whose mean a sparse one is; of them count those `inside` (sparse,
    k), which is None for k = 1. source: (tokens,), the sparse one whose change a token gets.
    """

    members: Tensor
    inside: Tensor | None
    source: Tensor

    def to(self, device: Any) -> Sparse:
        """From host memory, without waiting for the device."""

        def there(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        inside = None if self.inside is None else there(self.inside)
        return Sparse(there(self.members), inside, there(self.source))


def cells(grid: Grid, side: int) -> Tensor:
    """The cell of every token, (tokens,), counted row by row; those at the ends may be smaller."""
    import torch

    frames, height, width = grid
    down, across = -(-height // side), -(-width // side)
    frame = torch.arange(frames)[:, None, None]
    row, column = torch.arange(height)[:, None] // side, torch.arange(width) // side
    return ((frame * down + row) * across + column).flatten()


def means(source: Tensor) -> Sparse:
    """Every cell by the mean of its tokens."""
    import torch

    count = source.bincount()[:, None]
    place = torch.arange(int(count.max()))
    first = count.cumsum(0) - count
    members = source.argsort(stable=True)[first + place.minimum(count - 1)]
    return Sparse(members, place < count, source)


def drawn(source: Tensor, draw: int) -> Sparse:
    """Every cell by one of its tokens, each equally likely; another `draw` draws others."""
    import torch

    count = source.bincount()
    generator = torch.Generator().manual_seed(draw)
    share = torch.rand(len(count), generator=generator, dtype=torch.float64)
    first = count.cumsum(0) - count
    members = source.argsort(stable=True)[first + (share * count).long()]
    return Sparse(members[:, None], None, source)


def thinned(x: Tensor, of: Sparse, axis: int = 1) -> Tensor:
    """Tokens along an axis -> sparse tokens."""
    found = x.index_select(axis, of.members.flatten())
    if of.inside is None:
        return found
    inside = of.inside.view(*of.inside.shape, *[1] * (x.ndim - axis - 1)).to(x.dtype)
    return (found.unflatten(axis, of.inside.shape) * inside).sum(axis + 1) / inside.sum(1)


def spread(dense: Tensor, change: Tensor, of: Sparse) -> Tensor:
    """(b, tokens, c), (b, sparse, c) -> (b, tokens, c): each token with the change of its cell."""
    return dense + change.index_select(1, of.source)


def thinned_rotary(tables: tuple[Tensor, Tensor], of: Sparse) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the sparse tokens; those of text, which stand before, stay.

    For means at the middle: the sum of unit vectors at evenly spaced angles points there, as long
    as a cell spans less than half a turn (neighbours are at most one radian apart, but in LTX).
    """
    import torch

    axis = 0 if tables[0].ndim == 2 else 1  # (tokens, c), or the batch before
    text = tables[0].shape[axis] - len(of.source)

    def part(table: Tensor) -> Tensor:
        return thinned(table.narrow(axis, text, len(of.source)), of, axis)

    cos, sin = (part(table) for table in tables)
    if of.inside is not None:
        length = (cos.square() + sin.square()).sqrt()
        cos, sin = cos / length, sin / length
    before = (table.narrow(axis, 0, text) for table in tables)
    cos, sin = (torch.cat(pair, axis) for pair in zip(before, (cos, sin), strict=True))
    return cos, sin


@dataclass(frozen=True)
class TokenDensity(Method):
    """Run the middle blocks of a transformer on one token a cell in the first part of a run.

    until: share of the steps, from the noisy end; 0 never does. side: of a cell, 2 to 4 tokens.
    choose: a cell is seen through one of its tokens, "drawn" anew each step, or their "mean".
    first, last: blocks at the ends that see all tokens.
    """

    SLOTS = ("tokens", "block.skip")
    PAPER = "SparseDiT (FlexDiT), arXiv 2412.06028, without its training"

    until: float = 0.25
    side: int = 2
    choose: Literal["drawn", "mean"] = "drawn"
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.until <= 1:
            raise ValueError(f"TokenDensity.until = {self.until}: a share of the steps, 0 to 1")
        if not 2 <= self.side <= 4:
            raise ValueError(f"TokenDensity.side = {self.side}: a cell has 2 to 4 tokens a side")
        if min(self.first, self.last) < 0:
            raise ValueError(f"TokenDensity: first = {self.first}, last = {self.last}; at least 0")

    def neutral(self) -> TokenDensity:
        return replace(self, until=0.0)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        found = [(d.slot, self.middle(d)) for d in denoisers(pipe)]
        paths = frozenset(f"{slot}.{block.path}" for slot, blocks in found for block in blocks)
        return frozenset((slot, paths) for slot in self.SLOTS)

    def middle(self, denoiser: Denoiser) -> tuple[Block, ...]:
        """The blocks that run on fewer tokens.

        Raises:
            ValueError: a model it cannot go on, or none is left between first and last.
        """
        blocks = stacked_blocks(denoiser, "TokenDensity")
        said = f"TokenDensity cannot go on this {denoiser.cls}"
        if denoiser.cls not in CLASSES:
            raise ValueError(f"{said}; it knows {', '.join(CLASSES)}")
        if getattr(denoiser.module.config, "image_condition_type", None) == "token_replace":
            raise ValueError(f"{said}: its first frame has a time of its own")
        if self.choose == "mean" and denoiser.cls.startswith("LTX"):
            raise ValueError(
                f"{said} with means: its rotary tables turn by many radians from one token to the "
                "next and have no middle; use choose='drawn'"
            )
        found = blocks[self.first : max(0, len(blocks) - self.last)]
        if not found:
            raise ValueError(
                f"{said}: first = {self.first} and last = {self.last} leave none of its "
                f"{len(blocks)} blocks"
            )
        return found

    def new_live(self, pipe: Any) -> Attached:
        return _LiveDensity(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveDensity)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, self.middle(denoiser))

    def sparse(self, grid: Grid, draw: int) -> Sparse:
        """The tokens that stand for all of a grid; `draw` is another number in every step."""
        source = cells(grid, self.side)
        return means(source) if self.choose == "mean" else drawn(source, draw)


class _LiveDensity(Attached):
    """Of the present call: the sparse tokens (None: all), and the hidden ones on entering."""

    sparse: Sparse | None = None
    dense: Tensor | None = None
    entered: Tensor | None = None

    def __init__(self, method: TokenDensity, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.known: tuple[Any, Sparse | None] = (None, None)  # of the newest step

    def adopt(self, denoiser: Denoiser, blocks: tuple[Block, ...]) -> None:
        self.around_denoiser(denoiser.slot, self._deciding(denoiser))
        for block in blocks:
            module = denoiser.module.get_submodule(block.path)
            names = tuple(inspect.signature(type(module).forward).parameters)[1:]
            ends = (block is blocks[0], block is blocks[-1])
            layer = self._layer(block, names, TIME_BY_TOKEN.get(denoiser.cls, 0), ends)
            self.around_call(module, layer, layer)

    def on_run(self, run: Run) -> None:
        self.known = (None, None)

    def on_run_end(self, run: Run) -> None:
        self.known = (None, None)

    def _deciding(self, denoiser: Denoiser) -> Callable:
        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            self.sparse = self._chosen(denoiser, args, kwargs)
            if self.sparse is None:
                return call_next(*args, **kwargs)
            self.detail["tokens"] = [len(self.sparse.source), len(self.sparse.members)]
            self.count("changed")
            try:
                return call_next(*args, **kwargs)
            finally:
                self.sparse = self.dense = self.entered = None

        return layer

    def _chosen(self, denoiser: Denoiser, args: tuple, kwargs: dict[str, Any]) -> Sparse | None:
        """The sparse tokens of this call, the same in all branches; None where it runs in full."""
        method, now, run = self.method, self.clock.now, self.clock.run
        assert isinstance(method, TokenDensity)
        assert now is not None
        assert run is not None
        if now.step >= round(method.until * run.steps):
            return None
        for name in FULL:
            if denoiser.argument(name, args, kwargs) is not None:
                self.fallback(f"{name} was given, which is for blocks that see all tokens")
                return None
        try:
            grid = denoiser.grid(args, kwargs)
        except ValueError as error:
            self.fallback(str(error))
            return None
        draw = now.step * run.order + now.stage
        key = (grid, draw, denoiser.sample(args, kwargs).device)
        if self.known[0] != key:
            self.known = (key, method.sparse(grid, draw).to(key[-1]))
        sparse = self.known[1]
        assert sparse is not None
        if len(sparse.members) == len(sparse.source):
            self.fallback(f"a token grid of {grid} has no cells of more than one token")
            return None
        return sparse

    def _layer(
        self, block: Block, names: tuple[str, ...], time_axes: int, ends: tuple[bool, bool]
    ) -> Callable:
        enters, leaves = ends

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            sparse = self.sparse
            if sparse is None:
                return call_next(*args, **kwargs)

            def changed(name: str, value: Any) -> Any:
                if name == "hidden_states" and enters:
                    self.dense, self.entered = value, thinned(value, sparse)
                    return self.entered
                return _by_token(name, value, sparse, time_axes)

            named = zip((*names, *[""] * len(args)), args, strict=False)
            args = tuple(changed(name, value) for name, value in named)
            kwargs = {name: changed(name, value) for name, value in kwargs.items()}
            output = call_next(*args, **kwargs)
            if not leaves:
                return output
            assert self.dense is not None
            change = hidden_of(block.output_layout, output) - self.entered
            return with_hidden(block.output_layout, output, spread(self.dense, change, sparse))

        return layer


def _by_token(name: str, value: Any, of: Sparse, time_axes: int) -> Any:
    """An argument of a block, other than the hidden tokens, at the sparse length."""
    import torch

    if value is None:
        return None
    tokens = len(of.source)
    if name in ROTARY:
        return thinned_rotary(value, of)
    if name == "temb" and value.ndim == time_axes and value.shape[1] == tokens:
        return thinned(value, of)
    if name == "attention_mask" and value.shape[-1] >= tokens:  # text behind, of which some is out
        shown = value[..., :tokens].index_select(-1, of.members[:, 0])
        return torch.cat((shown, value[..., tokens:]), -1)
    return value
