"""Attention to kept blocks on a CPU: gathers the kept keys and calls torch's own attention.

Origin: measurements in benchmarks/bench_sparse.py. Layout: q (b, h, s, d), k and v (b, g, s, d),
any strides. Blocks of queries with as many kept blocks are computed together, a few at a time, so
that what is gathered stays in cache; what is not kept is never touched. Rows that keep everything
are computed without a copy. A ragged last block of keys is the last of an ascending list, so it is
cut off and needs no mask; pooled keys are blocks that every row lists, with their biases as a
mask. Tested on x86; works wherever torch does, needs no compiler.
Gradients: ``cpu_backward``. Blocks of 256 queries are about 1.5 times as fast as
of 128: torch's attention takes 32 queries at a time below 192 queries, 64 below 768.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels.reference import Attention, Pooled

CHUNK_BYTES = 4 << 20  # of gathered keys and values: fits a core's share of the cache


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, pooled: Pooled | None = None,
    *, scale: float | None = None,
) -> Attention:  # fmt: skip
    """The same as ``reference.attend``, without gradients."""
    b, h, s, d = q.shape
    rows = by_block(q, blocks.query_block)
    out = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -math.inf, dtype=_lse_type(q.dtype))
    for part in parts(rows, Sources(k, v, blocks, h, pooled), blocks):
        found = attention_with_lse(part.q, part.k, part.v, scale, part.mask)
        out[part.rows] = found.out.view(-1, *rows.shape[1:])
        lse[part.rows] = found.lse.view(-1, rows.shape[1])
    return Attention(out.view(b, h, -1, d)[:, :, :s], lse.view(b, h, -1)[:, :, :s])


def by_block(x: Tensor, block: int) -> Tensor:
    """(b, h, s, d) -> (rows, block, d): a row is a block of queries of a head, filled up."""
    return _padded(x, block).reshape(-1, block, x.shape[-1])


class Part(NamedTuple):
    """What one call of torch's attention takes: n rows with keys of their own, or of one head."""

    rows: Tensor  # (n,)
    places: Tensor  # (blocks,) of `Sources` that keys and values are, in order
    q: Tensor  # (n, 1, query_block, d) or (1, 1, n * query_block, d)
    k: Tensor  # (n or 1, 1, keys, d); a ragged last block is cut off
    v: Tensor
    mask: Tensor | None


def parts(rows: Tensor, sources: Sources, blocks: BlockMap) -> Iterator[Part]:
    """Queries (rows, query_block, d) in parts; the keys of one are overwritten by the next.

    Rows that see no key are in none.
    """
    for group in _groups(blocks):
        bias = sources.bias_of(group.rows)
        if group.count == 0 and bias is None:
            continue
        if group.count == sources.nk and bias is None:
            yield from group.whole(rows, sources)
        else:
            yield from group.chunks(rows, sources, bias)


class Sources:
    """Keys and values by block, (b * g * blocks, key_block * d), and whose they are.

    Blocks of pooled keys stand before a head's own; their biases are (rows, pooled keys, filled
    up with -inf to whole blocks).
    """

    def __init__(
        self, k: Tensor, v: Tensor, blocks: BlockMap, heads: int, pooled: Pooled | None
    ) -> None:
        self.nq, self.nk = blocks.keep.shape[2:]
        self.keys, self.block, self.width = blocks.keys, blocks.key_block, k.shape[-1]
        self.heads, self.own, self.repeat = heads, k.shape[1], heads // k.shape[1]
        self.pooled, self.bias = 0, None
        parts = [(k, v)]
        if pooled is not None:
            self.pooled = -(-pooled.k.shape[2] // self.block)
            bias = pooled.bias.expand(*blocks.keep.shape[:3], pooled.k.shape[2])
            short = self.pooled * self.block - bias.shape[-1]
            bias = torch.nn.functional.pad(bias.flatten(0, 2), (0, short), value=-math.inf)
            self.bias = bias.to(k.dtype)
            parts.insert(0, (pooled.k.to(k.dtype), pooled.v.to(v.dtype)))
        cut = ([_padded(x, self.block) for x in side] for side in zip(*parts, strict=True))
        self.k, self.v = (
            (side[0] if len(side) == 1 else torch.cat(side, dim=2)).flatten(3).flatten(0, 2)
            for side in cut
        )

    def filled(self, x: Tensor) -> Tensor:
        """(n, 1, keys, d) of gathered keys -> (their blocks, key_block * d), zeros at the end."""
        short = -x.shape[2] % self.block
        x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x
        return x.reshape(-1, self.block * self.width)

    def apart(self, x: Tensor, like: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What has the layout of `self.k`, as the keys and the pooled keys that it was made of."""
        b, g, s, d = like.shape
        x = x.view(b, g, -1, d)
        cut = self.pooled * self.block
        own = x[:, :, cut : cut + s].to(like.dtype)
        return own, None if pooled is None else x[:, :, : pooled.shape[2]].to(pooled.dtype)

    def first_block(self, rows: Tensor) -> Tensor:
        """Where the blocks of a row's head begin, the pooled ones first."""
        head, batch = rows // self.nq % self.heads, rows // (self.nq * self.heads)
        return (batch * self.own + head // self.repeat) * (self.pooled + self.nk)

    def bias_of(self, rows: Tensor) -> Tensor | None:
        """(rows, pooled keys); None where all of them are hidden."""
        found = None if self.bias is None else self.bias[rows]
        return None if found is None or bool((found == -math.inf).all()) else found


class _Group:
    """Rows with equally many kept blocks, all with the ragged last block or all without it."""

    def __init__(self, rows: Tensor, lists: Tensor, count: int, ragged: bool) -> None:
        self.rows, self.lists, self.count, self.ragged = rows, lists, count, ragged

    def whole(self, q: Tensor, sources: Sources) -> Iterator[Part]:
        """Rows of one head share all keys: no copy, and long queries."""
        starts = sources.first_block(self.rows) + sources.pooled
        heads = self.rows // sources.nq
        for head in heads.unique().tolist():
            mine = self.rows[heads == head]
            start = int(starts[heads == head][0])
            k, v = (
                x[start : start + sources.nk].view(1, 1, -1, sources.width)[:, :, : sources.keys]
                for x in (sources.k, sources.v)
            )
            places = torch.arange(start, start + sources.nk)
            yield Part(mine, places, q[mine].view(1, 1, -1, q.shape[-1]), k, v, None)

    def chunks(self, q: Tensor, sources: Sources, bias: Tensor | None) -> Iterator[Part]:
        rows, lists = self.rows, self.lists + sources.pooled
        if bias is not None:
            if self.count == 0:
                seeing = (bias > -math.inf).any(1)
                rows, lists, bias = rows[seeing], lists[seeing], bias[seeing]
            pooled = torch.arange(sources.pooled).expand(len(lists), -1)
            lists = torch.cat([pooled, lists], dim=1)  # the ragged block stays last
        keys = lists.shape[1] * sources.block
        used = keys - (-sources.keys % sources.block if self.ragged else 0)
        size = keys * sources.width * q.element_size() * 2
        chunk = max(1, min(len(rows), CHUNK_BYTES // size))
        places = lists + sources.first_block(rows)[:, None]
        buffers = [q.new_empty(chunk * lists.shape[1], sources.k.shape[1]) for _ in "kv"]
        for at in range(0, len(rows), chunk):
            mine, wanted = rows[at : at + chunk], places[at : at + chunk].flatten()
            k, v = (
                torch.index_select(x, 0, wanted, out=buffer[: len(wanted)]).view(
                    len(mine), 1, keys, sources.width
                )[:, :, :used]
                for x, buffer in zip((sources.k, sources.v), buffers, strict=True)
            )
            mask = None if bias is None else _mask(bias[at : at + chunk], used, q.shape[1])
            yield Part(mine, wanted, q[mine, None], k, v, mask)


def _mask(bias: Tensor, keys: int, queries: int) -> Tensor:
    """(rows, 1, queries, keys): biases of the pooled keys, then 0; one row for all queries."""
    mask = bias.new_zeros(len(bias), keys)
    mask[:, : bias.shape[1]] = bias
    return mask[:, None, None].expand(-1, 1, queries, -1)


def _groups(blocks: BlockMap) -> list[_Group]:
    """Rows by how many blocks they keep."""
    keep = blocks.keep.flatten(0, 2)
    counts = blocks.counts.flatten().long()
    lists = blocks.lists(int(counts.max())).flatten(0, 2).long()
    ragged = keep[:, -1] if blocks.keys % blocks.key_block else torch.zeros_like(keep[:, -1])
    kinds, which = torch.unique(counts * 2 + ragged, return_inverse=True)
    found = []
    for i, kind in enumerate(kinds.tolist()):
        rows = (which == i).nonzero()[:, 0]
        count = kind // 2
        found.append(_Group(rows, lists[rows, :count], count, bool(kind % 2)))
    return found


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None
) -> Attention:
    """Dense attention through the kernel behind torch's, which also returns log-sum-exps."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return Attention(*flash(q, k, v, attn_mask=mask, scale=scale))


def _lse_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(x: Tensor, block: int) -> Tensor:
    """(b, h, s, d) -> (b, h, blocks, block, d) in one piece, zeros at the end."""
    b, h, s, d = x.shape
    count = -(-s // block)
    if count * block == s:
        return x.contiguous().view(b, h, count, block, d)
    out = x.new_zeros(b, h, count * block, d)
    out[:, :, :s] = x
    return out.view(b, h, count, block, d)
