"""What a denoiser consists of: the one table that knows diffusers' model classes.

`denoisers(pipe)` describes the UNet or transformer(s) of a pipeline: their blocks, the attentions
and feed-forwards inside them, what a block returns, and, from the arguments of a forward call,
the token grid, where text sits in a joint sequence and how many rows the batch has. Nothing
here runs or changes a model. Facts checked against diffusers 0.42.1 on real runs of every class.
Another class is added with `register`.

Costs: only Flux's grid reads values from a tensor (one device synchronisation per `img_ids`
tensor object, that is one per pipeline run); everything else is arithmetic on shapes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.compat import compiled_entry, feed_forward_chunk

if TYPE_CHECKING:
    from torch import nn

SLOTS = ("unet", "transformer", "transformer_2")

Grid = tuple[int, int, int]
Call = Mapping[str, Any]  # arguments of the denoiser's forward by name


@dataclass(frozen=True)
class Block:
    """One block. Paths are relative to the denoiser and resolve with `module.get_submodule`.

    kind: "dit" (text, if any, by cross-attention), "joint" (two streams, one attention), "single"
        (one fused stream), "unet.down" / "unet.mid" / "unet.up" (a stage of a UNet; what is
        inside it follows as blocks of their own), "unet.transformer" (a transformer block inside
        a stage), "unet.attention" (a bare residual attention inside a stage; path == self_attn).
    self_attn: attention over the hidden tokens; in "joint" and "single" blocks text tokens take
        part in it. None in UNet stages and where `only_cross_attention` replaces it.
    cross_attn: attention from hidden tokens to text.
    ff: feed-forward modules that own weights, in call order. "joint": hidden's, then text's (one
        for both in CogVideoX; the last block of SD3 drops text and has only hidden's). "single":
        (proj_mlp, proj_out), where proj_out also projects the attention's output.
    output_layout: what forward returns. ("hidden",) is a bare tensor, anything longer a tuple in
        this order. "text" is None after the last block of SD3; "skips" is a tuple of tensors.
    self_attn_2: a second self-attention, over the hidden tokens alone (SD3.5's dual attention).
    """

    path: str
    kind: str
    self_attn: str | None
    cross_attn: str | None
    ff: tuple[str, ...]
    output_layout: tuple[str, ...]
    self_attn_2: str | None = None


@dataclass(frozen=True)
class SkipConcat:
    """A resnet of a UNet's decoder, fed with cat((hidden, skip), dim=1); sizes in channels."""

    up_block: str
    resnet: str
    hidden: int
    skip: int


@dataclass(frozen=True)
class Anatomy:
    """The table entry of one model class.

    blocks: (model) -> blocks in the order they run, a UNet stage before what is inside it.
    grid: (model, call, path) -> (frames, height, width) in tokens; `path` picks a UNet's level.
    text_span: (model, call) -> text positions in the joint attention sequence.
    skip_concats: (model) -> decoder resnets fed by skips, in the order they run.
    sample: name of the forward argument whose first axis is the batch.
    """

    blocks: Callable[[Any], tuple[Block, ...]]
    grid: Callable[[Any, Call, str], Grid]
    text_span: Callable[[Any, Call], slice] | None = None
    skip_concats: Callable[[Any], tuple[SkipConcat, ...]] | None = None
    sample: str = "hidden_states"


@dataclass(frozen=True)
class Denoiser:
    """A pipeline component seen through the table. `module` is the model inside torch.compile's
    wrapper, `cls` the name of the table entry. `args` and `kwargs` below are those of one call of
    the model's forward, positional or by name.
    """

    slot: str
    module: nn.Module
    cls: str

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks in the order they run; a UNet stage comes before what is inside it."""
        return _TABLE[self.cls].blocks(self.module)

    @functools.cached_property
    def skip_concats(self) -> tuple[SkipConcat, ...]:
        """Where a UNet's decoder takes in skip connections, in running order; else empty."""
        skips = _TABLE[self.cls].skip_concats
        return () if skips is None else skips(self.module)

    def grid(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str = "") -> Grid:
        """(frames, height, width) of the hidden tokens in a self-attention; images have 1 frame.

        A UNet's grid depends on the level: `path` is that of the block or attention asked for,
        and without it the grid is that of the input.

        Raises:
            ValueError: the hidden tokens of this call do not form one grid (reference images or
                condition frames appended to them), or the call does not tell.
        """
        return _TABLE[self.cls].grid(self.module, self._bind(args, kwargs), path)

    def text_span(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> slice | None:
        """Positions of the text tokens, padding included, in the joint attention sequence.

        None where text enters by cross-attention or not at all.
        """
        span = _TABLE[self.cls].text_span
        return None if span is None else span(self.module, self._bind(args, kwargs))

    @property
    def sample_name(self) -> str:
        """Name of the argument that is denoised."""
        return _TABLE[self.cls].sample

    def sample(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What is denoised, (rows, channels, ...)."""
        return self.argument(self.sample_name, args, kwargs)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One argument of a call; None where the call does not give it."""
        return self._bind(args, kwargs).get(name)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return dict(self._bind(args, kwargs))

    def batch_rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Rows of the batch; batched guidance doubles them."""
        return self.sample(args, kwargs).shape[0]

    def replace(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **values: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other values for some of its arguments, such as `timestep`."""
        names = list(_signature(type(self.module)).parameters)[1 : len(args) + 1]
        by_place = tuple(values.get(n, a) for n, a in zip(names, args, strict=True))
        by_name = {n: v for n, v in values.items() if n not in names}
        return by_place, {**kwargs, **by_name}

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        bound = _signature(type(self.module)).bind(self.module, *args, **kwargs).arguments
        return {name: value for name, value in bound.items() if value is not self.module}


@functools.lru_cache(maxsize=64)
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)  # pyright: ignore[reportAttributeAccessIssue]


def denoisers(pipe: Any) -> tuple[Denoiser, ...]:
    """Describe the denoisers that `pipe` holds, in the order of `SLOTS`.

    Raises:
        ValueError: `pipe` has none, or one of a class that is not in the table.
    """
    parts = [(slot, getattr(pipe, slot, None)) for slot in SLOTS]
    found = tuple(_describe(slot, part) for slot, part in parts if part is not None)
    if not found:
        raise ValueError(f"denoisers: {type(pipe).__name__} has none of {', '.join(SLOTS)}")
    return found


def register(cls_name: str, anatomy: Anatomy) -> None:
    """Add a model class, by class name. Raises `ValueError` where another entry has the name."""
    if _TABLE.setdefault(cls_name, anatomy) != anatomy:
        raise ValueError(f"register: {cls_name} is in the table already; choose another class name")


def chunked_feed_forward(module: nn.Module) -> bool:
    """Whether forward chunking is on inside `module`: then `ff` runs several times a forward."""
    return any(feed_forward_chunk(part) is not None for part in module.modules())


def _describe(slot: str, part: Any) -> Denoiser:
    module = compiled_entry(part)
    for cls in type(module).__mro__:
        # A subclass that overrides forward (FSDP's do not) may be built in another way.
        if cls.__name__ in _TABLE and type(module).forward is cls.forward:
            return Denoiser(slot, module, cls.__name__)
    raise ValueError(
        f"denoisers: {slot} is a {type(module).__name__}, which accel does not know. Known: "
        f"{', '.join(_TABLE)}. To add a class: accel.denoiser.register("
        f"{type(module).__name__!r}, Anatomy(blocks=..., grid=...))"
    )


# Blocks of transformers


def _basic_block(path: str, block: Any, kind: str) -> Block:
    """A `BasicTransformerBlock`, whose attentions depend on two flags."""
    first = None if block.only_cross_attention else f"{path}.attn1"
    second = f"{path}.attn2" if _has(block, "attn2") else None
    cross, dual = (None, second) if block.double_self_attention else (second, None)
    return Block(path, kind, first, cross, (f"{path}.ff",), ("hidden",), dual)


def _numbered(model: Any, name: str) -> list[tuple[str, Any]]:
    return [(f"{name}.{i}", block) for i, block in enumerate(getattr(model, name, ()))]


def _has(block: Any, name: str) -> bool:
    return getattr(block, name, None) is not None


def _basic_blocks(model: Any) -> tuple[Block, ...]:
    return tuple(_basic_block(p, b, "dit") for p, b in _numbered(model, "transformer_blocks"))


def _attn_blocks(
    where: str, kind: str, cross: str | None, ff: str, layout: tuple[str, ...]
) -> Callable[[Any], tuple[Block, ...]]:
    """Blocks that are all alike, with self-attention `attn1`."""

    def block(p: str) -> Block:
        return Block(p, kind, f"{p}.attn1", cross and f"{p}.{cross}", (f"{p}.{ff}",), layout)

    return lambda model: tuple(block(path) for path, _ in _numbered(model, where))


def _two_stream_blocks(layout: tuple[str, ...]) -> Callable[[Any], tuple[Block, ...]]:
    """Joint blocks, then (Flux, HunyuanVideo) single ones; the layout is the same for both."""

    def joint(path: str, block: Any) -> Block:
        ff = (f"{path}.{name}" for name in ("ff", "ff_context") if _has(block, name))
        dual = f"{path}.attn2" if _has(block, "attn2") else None
        return Block(path, "joint", f"{path}.attn", None, tuple(ff), layout, dual)

    def single(path: str) -> Block:
        ff = (f"{path}.proj_mlp", f"{path}.proj_out")
        return Block(path, "single", f"{path}.attn", None, ff, layout)

    return lambda model: (
        *(joint(path, block) for path, block in _numbered(model, "transformer_blocks")),
        *(single(path) for path, _ in _numbered(model, "single_transformer_blocks")),
    )


# Token grids and text spans of transformers


def _one_grid(model: Any, grid: Grid, tokens: int) -> Grid:
    if math.prod(grid) != tokens:
        raise ValueError(
            f"grid: the {tokens} hidden tokens of this {type(model).__name__} call are not a grid "
            f"{grid}; reference or condition tokens seem appended. Run this call unmodified"
        )
    return grid


def _wan_grid(model: Any, call: Call, path: str) -> Grid:
    sides = call["hidden_states"].shape[-3:]  # (b, c, f, h, w)
    f, h, w = (n // p for n, p in zip(sides, model.config.patch_size, strict=True))
    return f, h, w


def _patch_grid(frame_axis: int | None) -> Callable[[Any, Call, str], Grid]:
    def grid(model: Any, call: Call, path: str) -> Grid:
        shape, config = call["hidden_states"].shape, model.config
        frames = shape[frame_axis] // (config.patch_size_t or 1) if frame_axis else 1
        return frames, shape[-2] // config.patch_size, shape[-1] // config.patch_size

    return grid


_image_grid = _patch_grid(None)  # (b, c, h, w)
_hunyuan_grid = _patch_grid(2)  # (b, c, f, h, w)
_cogvideox_grid = _patch_grid(1)  # (b, f, c, h, w)


def _ltx_grid(model: Any, call: Call, path: str) -> Grid:
    coords = call.get("video_coords")  # is what the model goes by, where it is given
    sides = tuple(call.get(side) for side in ("num_frames", "height", "width"))
    grid: Any = sides if coords is None else _counted(coords)
    if None in grid:
        raise ValueError("grid: this LTX call has neither video_coords nor num_frames and sides")
    return _one_grid(model, grid, call["hidden_states"].shape[1])


def _flux_grid(model: Any, call: Call, path: str) -> Grid:
    return _one_grid(model, _extent(call["img_ids"]), call["hidden_states"].shape[1])


def _extent(ids: Any) -> Grid:
    """Sides of the box that position ids (tokens, 3) span, remembered per tensor object.

    Shapes cannot tell 4x6 from 6x4, so values are read; pipelines make the tensor once a run.
    """
    memo = _read_once()
    if ids not in memo:
        rows = ids[0] if ids.ndim == 3 else ids
        low, high = (bound.long() for bound in rows.aminmax(dim=0))
        memo[ids] = tuple((high - low + 1).tolist())
    return memo[ids]


def _counted(coords: Any) -> Grid:
    """How many places there are on each axis of coordinates (b, 3, tokens), remembered as above;
    tokens of condition frames stand before the others and are later in time: no grid."""
    memo = _read_once()
    if coords not in memo:
        in_order = bool((coords[0, 0].diff() >= 0).all())
        memo[coords] = tuple(len(axis.unique()) for axis in coords[0]) if in_order else (0, 0, 0)
    return memo[coords]


@functools.cache
def _read_once() -> Any:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _text(after: Callable[[Any, Call, str], Grid] | None = None) -> Callable[[Any, Call], slice]:
    """The text comes first in the joint sequence, or after the hidden tokens of a grid."""

    def span(model: Any, call: Call) -> slice:
        start = math.prod(after(model, call, "")) if after else 0
        return slice(start, start + call["encoder_hidden_states"].shape[1])

    return span


# UNets: the stages whose wiring the functions below describe. Others differ: KUpBlock2D takes one
# skip, AttnSkipDownBlock2D returns three values, SimpleCrossAttn* mixes text into self-attention.
_STAGES = {
    "unet.down": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
    "unet.mid": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "unet.up": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def _stages(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(path, stage, kind) of every stage in running order. Raises on one of another wiring."""
    mid = [] if model.mid_block is None else [("mid_block", model.mid_block)]
    for path, stage in (*_numbered(model, "down_blocks"), *mid, *_numbered(model, "up_blocks")):
        kind = "unet." + path.partition("_")[0]
        if type(stage).__name__ not in _STAGES[kind]:
            raise ValueError(
                f"denoisers: {path} of this {type(model).__name__} is a {type(stage).__name__}, "
                f"which accel does not know; known there: {', '.join(_STAGES[kind])}"
            )
        yield path, stage, kind


def _unet_blocks(model: Any) -> tuple[Block, ...]:
    found: list[Block] = []
    for path, stage, kind in _stages(model):
        layout = ("hidden", "skips") if kind == "unet.down" else ("hidden",)
        found.append(Block(path, kind, None, None, (), layout))
        for inner, attention in _numbered(stage, "attentions"):
            found += _unet_attention(f"{path}.{inner}", attention)
    return tuple(found)


def _unet_attention(path: str, attention: Any) -> list[Block]:
    if attention is None:  # a mid block built without attention
        return []
    if inner := _numbered(attention, "transformer_blocks"):
        return [_basic_block(f"{path}.{p}", block, "unet.transformer") for p, block in inner]
    if hasattr(attention, "to_q"):
        return [Block(path, "unet.attention", path, None, (), ("hidden",))]
    raise ValueError(f"denoisers: {path} is a {type(attention).__name__}, unknown to accel")


def _unet_grid(model: Any, call: Call, path: str) -> Grid:
    """Sides at the level of `path`; the decoder mirrors the sides of the encoder."""
    sides = tuple(call["sample"].shape[-2:])  # (b, c, h, w)
    levels = [(1, *sides)]
    for _, stage, kind in _stages(model):
        if kind == "unet.down":
            for downsampler in stage.downsamplers or ():
                sides = tuple(_halved(n, downsampler) for n in sides)
            levels.append((1, *sides))
    part, _, rest = path.partition(".")
    if part == "mid_block":
        return levels[-1]
    index = int(rest.partition(".")[0]) if rest else 0
    return levels[-2 - index] if part == "up_blocks" else levels[index]


def _halved(side: int, downsampler: Any) -> int:
    """A convolution that pads both sides rounds up; one-sided padding and pooling round down."""
    both_sides = getattr(downsampler, "use_conv", False) and downsampler.padding == 1
    return (side + both_sides) // 2


def _unet_skips(model: Any) -> tuple[SkipConcat, ...]:
    found, hidden = [], 0  # the first resnet of the decoder takes over what ran before it
    for path, stage, kind in _stages(model):
        for inner, resnet in _numbered(stage, "resnets"):
            if kind == "unet.up":
                skip = resnet.in_channels - hidden
                found.append(SkipConcat(path, f"{path}.{inner}", hidden, skip))
            hidden = resnet.out_channels
    return tuple(found)


_UNET = Anatomy(_unet_blocks, _unet_grid, skip_concats=_unet_skips, sample="sample")
_TEXT_HIDDEN = _two_stream_blocks(("text", "hidden"))
_HIDDEN_TEXT = _two_stream_blocks(("hidden", "text"))
_WAN = _attn_blocks("blocks", "dit", "attn2", "ffn", ("hidden",))
_LTX = _attn_blocks("transformer_blocks", "dit", "attn2", "ff", ("hidden",))
_COGVIDEOX = _attn_blocks("transformer_blocks", "joint", None, "ff", ("hidden", "text"))

_TABLE: dict[str, Anatomy] = {
    "UNet2DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "DiTTransformer2DModel": Anatomy(_basic_blocks, _image_grid),
    "PixArtTransformer2DModel": Anatomy(_basic_blocks, _image_grid),
    "SD3Transformer2DModel": Anatomy(_TEXT_HIDDEN, _image_grid, _text(_image_grid)),
    "FluxTransformer2DModel": Anatomy(_TEXT_HIDDEN, _flux_grid, _text()),
    "WanTransformer3DModel": Anatomy(_WAN, _wan_grid),
    "CogVideoXTransformer3DModel": Anatomy(_COGVIDEOX, _cogvideox_grid, _text()),
    "HunyuanVideoTransformer3DModel": Anatomy(_HIDDEN_TEXT, _hunyuan_grid, _text(_hunyuan_grid)),
    "LTXVideoTransformer3DModel": Anatomy(_LTX, _ltx_grid),
}
