"""Temporal token merging (On-device Sora, arXiv 2502.04363): attend to pairs of frames.

In the noisy part of a run neighbouring latent frames differ little. Around every attention of a
video transformer their tokens are averaged, and what it returns goes to both; norms, feed-forwards
and residuals stay at full length. Half the frames cost half the projections and a quarter of the
scores. Fast motion blurs: a draft mode. Unlike the official code, which takes even counts only,
any number of frames works, the first one stays alone (causal autoencoders put one picture into it
and several into each other one), and rotary tables are merged to the middle of a group (LTX's turn
many times from frame to frame and have no middle: a group has those of one of its frames). Frames
are neighbours in memory, so nothing is gathered. Acts inside graphs of `torch.compile`, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from accel.denoiser import Denoiser, denoisers
from accel.method import Attached, Claim, Method

if TYPE_CHECKING:
    from torch import Tensor

VIDEO_CLASSES = (
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
)
MANY_TURNS = ("LTXVideoTransformer3DModel",)  # of rotary tables, from frame to frame


class Groups(NamedTuple):
    """How the tokens of a video are grouped along time, counted in tokens.

    The first `alone` ones stay, then come `groups` groups of `size` frames of `frame` tokens each;
    what is left over stays.
    """

    alone: int
    groups: int
    size: int
    frame: int

    @property
    def end(self) -> int:
        """Tokens before those that are left over."""
        return self.alone + self.groups * self.size * self.frame


def grouped(grid: tuple[int, int, int], size: int, first_alone: bool) -> Groups:
    """The groups of a token grid (frames, height, width)."""
    frames, height, width = grid
    alone = int(first_alone)
    return Groups(alone * height * width, (frames - alone) // size, size, height * width)


def merged(x: Tensor, of: Groups, axis: int = 1, *, one: bool = False) -> Tensor:
    """Means over the groups, along the axis of the tokens; or `one` of each, next to its middle."""
    import torch

    def part(start: int, length: int) -> Tensor:
        return x.narrow(axis, start, length)

    middle = part(of.alone, of.end - of.alone).unflatten(axis, (of.groups, of.size, of.frame))
    found = middle.select(axis + 1, (of.size - 1) // 2) if one else middle.mean(axis + 1)
    found = found.flatten(axis, axis + 1)
    return torch.cat((part(0, of.alone), found, part(of.end, x.shape[axis] - of.end)), axis)


def unmerged(x: Tensor, of: Groups) -> Tensor:
    """(b, merged tokens, c) -> (b, tokens, c): every frame gets what its group has."""
    import torch

    count = of.groups * of.frame
    middle = x.narrow(1, of.alone, count).unflatten(1, (of.groups, 1, of.frame))
    middle = middle.expand(-1, -1, of.size, -1, -1).flatten(1, 3)
    rest = x.narrow(1, of.alone + count, x.shape[1] - of.alone - count)
    return torch.cat((x.narrow(1, 0, of.alone), middle, rest), 1)


def merged_rotary(
    tables: tuple[Tensor, Tensor], of: Groups, tokens: int, *, one: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines at the middle of every group, or those of `one` of its frames.

    The sum of unit vectors at evenly spaced angles points to the middle one, as long as a group
    spans less than half a turn: neighbours are at most one radian apart, but in LTX.
    """
    axis = next(i for i, n in enumerate(tables[0].shape) if n == tokens)
    cos, sin = (merged(t, of, axis, one=one) for t in tables)
    if one:
        return cos, sin
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length


@dataclass(frozen=True)
class TokenMerge(Method):
    """Let attentions see groups of frames as one in the first part of a run.

    until: share of the steps, from the noisy end; 0 never merges. frames: in a group, 2 to 4.
    first_alone: the first latent frame is in no group. cross: around attention to text, too.
    """

    SLOTS = ("tokens", "attention")
    PAPER = "On-device Sora, arXiv 2502.04363"

    until: float = 0.5
    frames: int = 2
    first_alone: bool = True
    cross: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.until <= 1:
            raise ValueError(f"TokenMerge.until = {self.until}: a share of the steps, 0 to 1")
        if not 2 <= self.frames <= 4:
            raise ValueError(f"TokenMerge.frames = {self.frames}: 2 to 4 in a group")

    def neutral(self) -> TokenMerge:
        return TokenMerge(0.0, self.frames, self.first_alone, self.cross)

    def claims(self, pipe: Any) -> frozenset[Claim]:
        for denoiser in denoisers(pipe):
            if denoiser.cls not in VIDEO_CLASSES:
                raise ValueError(
                    f"TokenMerge cannot go on {denoiser.cls}, which has no frames; it knows "
                    f"{', '.join(VIDEO_CLASSES)}"
                )
        paths = frozenset(f"{d.slot}.{p}" for d in denoisers(pipe) for p in self.paths(d))
        return frozenset({("tokens", paths), ("attention", paths)})

    def paths(self, denoiser: Denoiser) -> list[str]:
        """The attentions it goes around."""
        own = [block.self_attn for block in denoiser.blocks]
        across = [block.cross_attn for block in denoiser.blocks] if self.cross else []
        return [path for path in (*own, *across) if path]

    def new_live(self, pipe: Any) -> Attached:
        return _LiveMerge(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveMerge)
        for denoiser in denoisers(pipe):
            live.adopt(denoiser, self.paths(denoiser))


class _LiveMerge(Attached):
    """The groups of the present call; None where nothing is merged. A constant to compilers."""

    groups: Groups | None = None

    def adopt(self, denoiser: Denoiser, paths: list[str]) -> None:
        self.around_denoiser(denoiser.slot, self._grouping(denoiser))
        layer = partial(self._layer, denoiser.cls in MANY_TURNS)
        for path in paths:
            self.around_call(denoiser.module.get_submodule(path), layer, layer)

    def _grouping(self, denoiser: Denoiser) -> Callable:
        method = self.method
        assert isinstance(method, TokenMerge)

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            now, run = self.clock.now, self.clock.run
            assert now is not None
            assert run is not None
            if now.step >= round(method.until * run.steps):
                return call_next(*args, **kwargs)
            try:
                grid = denoiser.grid(args, kwargs)
            except ValueError as error:
                self.fallback(str(error))
                return call_next(*args, **kwargs)
            groups = grouped(grid, method.frames, method.first_alone)
            if not groups.groups:
                self.fallback(f"a video of {grid[0]} latent frames has no groups to merge")
                return call_next(*args, **kwargs)
            fewer = groups.groups * (groups.size - 1) * groups.frame
            tokens = grid[0] * groups.frame
            self.detail["tokens"] = [tokens, tokens - fewer]
            self.count("changed")
            self.groups = groups
            try:
                return call_next(*args, **kwargs)
            finally:
                self.groups = None

        return layer

    def _layer(self, turns: bool, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        groups = self.groups
        if groups is None:
            return call_next(*args, **kwargs)
        args, kwargs = _merged_call(args, kwargs, groups, turns)
        output = call_next(*args, **kwargs)
        if isinstance(output, tuple):
            return (unmerged(output[0], groups), *output[1:])
        return unmerged(output, groups)


NAMES = ("hidden_states", "encoder_hidden_states", "attention_mask")  # of an attention's arguments
ROTARY = ("rotary_emb", "image_rotary_emb")


def _merged_call(
    args: tuple, kwargs: dict[str, Any], of: Groups, turns: bool
) -> tuple[tuple, dict[str, Any]]:
    """An attention's arguments at the merged length; text stays as it is."""
    import torch

    names = (*NAMES, ROTARY[0])[: len(args)]
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    tokens = given["hidden_states"].shape[1]
    given["hidden_states"] = merged(given["hidden_states"], of)
    mask, text = given.get("attention_mask"), given.get("encoder_hidden_states")
    if mask is not None and text is not None and mask.shape[-1] == tokens + text.shape[1]:
        shorter = given["hidden_states"].shape[1]  # of video tokens none is masked
        given["attention_mask"] = torch.cat((mask[..., :shorter], mask[..., tokens:]), -1)
    for name in ROTARY:
        if given.get(name) is not None:
            given[name] = merged_rotary(given[name], of, tokens, one=turns)
    return tuple(given[name] for name in names), {k: given[k] for k in kwargs}
