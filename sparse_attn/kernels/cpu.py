"""Attention to kept blocks on a CPU: gathers the kept keys and calls torch's own attention.

Origin: measurements in benchmarks/bench_sparse.py. Layout: q (b, h, s, d), k and v (b, g, s, d),
any strides: tokens are gathered from where they lie, and the output lies token by token, as a
pipeline reads it. Blocks of queries with as many kept blocks are computed together, a few at a
time, so that what is gathered stays in cache; what is not kept is never touched. Keys of rows that
keep everything are not copied. A ragged last block of keys is the last of an ascending list, so it
is cut off and needs no mask; pooled keys are blocks that every row lists, with their biases as a
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
    nq, block = blocks.keep.shape[2], blocks.query_block
    make = torch.empty if blocks.counts.all() else torch.zeros
    out = make(b, nq, block, h, d, dtype=q.dtype)
    lse = torch.full((b * h * nq, block), -math.inf, dtype=_lse_type(q.dtype))
    for part in parts(q, Sources(k, v, blocks, h, pooled), blocks):
        found = attention_with_lse(part.q, part.k, part.v, scale, part.mask)
        for row, one in zip(part.rows.tolist(), found.out.view(-1, block, d), strict=True):
            out[row // (nq * h), row % nq, :, row // nq % h] = one
        lse[part.rows] = found.lse.view(-1, block)
    return Attention(out.view(b, -1, h, d)[:, :s].transpose(1, 2), lse.view(b, h, -1)[:, :, :s])


def by_block(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """(b, h, s, d) -> (rows, block, d): a row is a block of queries of a head, filled up."""
    filled = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block), value=fill)
    return filled.reshape(-1, block, x.shape[-1])


class Part(NamedTuple):
    """What one call of torch's attention takes: n rows with keys of their own, or of one head."""

    rows: Tensor  # (n,)
    heads: Tensor  # (n,) or (1,), whose keys these are, of b * g
    lists: Tensor  # (n or 1, blocks) of those heads that keys and values are, in order
    q: Tensor  # (n, 1, query_block, d) or (1, 1, n * query_block, d)
    k: Tensor  # (n or 1, 1, keys, d); a ragged last block is cut off
    v: Tensor
    mask: Tensor | None


def parts(q: Tensor, sources: Sources, blocks: BlockMap) -> Iterator[Part]:
    """Queries (b, h, s, d) in parts; what one holds is overwritten by the next.

    Rows that see no key are in none. A ragged last block of queries is filled up with its last.
    """
    queries = Blocks(q, blocks.query_block)
    for group in _groups(blocks):
        bias = sources.bias_of(group.rows)
        if group.count == 0 and bias is None:
            continue
        if group.count == sources.nk and bias is None:
            yield from group.whole(queries, sources)
        else:
            yield from group.chunks(queries, sources, bias)


class Blocks:
    """Blocks of the tokens of x (b, h, s, d), gathered from where they lie: rows of one table.

    Only a layout in which no table holds all tokens as rows is copied.
    """

    def __init__(self, x: Tensor, block: int) -> None:
        b, h, s, d = x.shape
        if x.stride(3) != 1 or any(x.stride(i) % d for i in range(3) if x.shape[i] > 1):
            x = x.contiguous()
        self.block, self.x = block, x
        steps = [x.stride(i) // d if x.shape[i] > 1 else 0 for i in range(3)]
        size = 1 + sum((x.shape[i] - 1) * steps[i] for i in range(3))
        self.table = x.as_strided((size, d), (d, 1))
        head = torch.arange(b)[:, None] * steps[0] + torch.arange(h) * steps[1]
        self._heads = head.flatten()  # (b * h,) where they begin
        token = torch.arange(-(-s // block) * block).clamp_(max=s - 1) * steps[2]
        self._tokens = token.view(-1, block)

    def take(self, heads: Tensor, lists: Tensor, out: Tensor | None = None) -> Tensor:
        """Blocks `lists` (n, count) of each of `heads` (n,) -> (n, 1, count * block, d).

        Past a ragged end stands the last token again. out: (n * count * block or more, d).
        """
        rows = (self._tokens[lists] + self._heads[heads][:, None, None]).flatten()
        out = None if out is None else out[: len(rows)]
        found = torch.index_select(self.table, 0, rows, out=out)
        return found.view(len(lists), 1, -1, self.table.shape[1])


class Sources:
    """Keys and values by block, and whose they are; in order they are (b * g * blocks).

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
        if pooled is not None:
            self.pooled = -(-pooled.k.shape[2] // self.block)
            bias = pooled.bias.expand(*blocks.keep.shape[:3], pooled.k.shape[2])
            short = self.pooled * self.block - bias.shape[-1]
            bias = torch.nn.functional.pad(bias.flatten(0, 2), (0, short), value=-math.inf)
            self.bias = bias.to(k.dtype)
            k, v = (
                torch.cat([torch.nn.functional.pad(mean.to(x.dtype), (0, 0, 0, short)), x], dim=2)
                for mean, x in ((pooled.k, k), (pooled.v, v))
            )
        self.k, self.v = Blocks(k, self.block), Blocks(v, self.block)
        count = k.shape[0] * self.own * (self.pooled + self.nk)
        self.shape = (count, self.block * self.width)  # by block, filled up

    def filled(self, x: Tensor) -> Tensor:
        """(n, 1, keys, d) of gathered keys -> (their blocks, key_block * d), zeros at the end."""
        short = -x.shape[2] % self.block
        x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x
        return x.reshape(-1, self.block * self.width)

    def apart(self, x: Tensor, like: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What has `self.shape`, as the keys and the pooled keys that it was made of."""
        b, g, s, d = like.shape
        x = x.view(b, g, -1, d)
        cut = self.pooled * self.block
        own = x[:, :, cut : cut + s].to(like.dtype)
        return own, None if pooled is None else x[:, :, : pooled.shape[2]].to(pooled.dtype)

    def head(self, rows: Tensor) -> Tensor:
        """Whose keys a row sees, of b * g."""
        head, batch = rows // self.nq % self.heads, rows // (self.nq * self.heads)
        return batch * self.own + head // self.repeat

    def places(self, heads: Tensor, lists: Tensor) -> Tensor:
        """Blocks of heads, as all blocks are numbered."""
        return (lists + heads[:, None] * (self.pooled + self.nk)).flatten()

    def bias_of(self, rows: Tensor) -> Tensor | None:
        """(rows, pooled keys); None where all of them are hidden."""
        found = None if self.bias is None else self.bias[rows]
        return None if found is None or bool((found == -math.inf).all()) else found


class _Group:
    """Rows with equally many kept blocks, all with the ragged last block or all without it."""

    def __init__(self, rows: Tensor, lists: Tensor, count: int, ragged: bool) -> None:
        self.rows, self.lists, self.count, self.ragged = rows, lists, count, ragged

    def whole(self, queries: Blocks, sources: Sources) -> Iterator[Part]:
        """Rows of one head share all keys: no copy of them, and long queries."""
        heads = self.rows // sources.nq
        every = sources.pooled + torch.arange(sources.nk)[None]
        for head in heads.unique().tolist():
            mine = self.rows[heads == head]
            own = sources.head(mine[:1])
            batch, index = divmod(int(own), sources.own)
            first = sources.pooled * sources.block
            k, v = (x.x[batch, index, first:][None, None] for x in (sources.k, sources.v))
            q = queries.take(mine // sources.nq, mine[:, None] % sources.nq)
            q = q.view(1, 1, -1, q.shape[-1])
            yield Part(mine, own, every, q, k, v, None)

    def chunks(self, queries: Blocks, sources: Sources, bias: Tensor | None) -> Iterator[Part]:
        rows, lists = self.rows, self.lists + sources.pooled
        if bias is not None:
            if self.count == 0:
                seeing = (bias > -math.inf).any(1)
                rows, lists, bias = rows[seeing], lists[seeing], bias[seeing]
            pooled = torch.arange(sources.pooled).expand(len(lists), -1)
            lists = torch.cat([pooled, lists], dim=1)  # the ragged block stays last
        keys = lists.shape[1] * sources.block
        used = keys - (-sources.keys % sources.block if self.ragged else 0)
        table = sources.k.table
        size = keys * sources.width * table.element_size() * 2
        chunk = max(1, min(len(rows), CHUNK_BYTES // size))
        tokens = (queries.block, keys, keys)
        buffers = [table.new_empty(chunk * count, sources.width) for count in tokens]
        for at in range(0, len(rows), chunk):
            mine, wanted = rows[at : at + chunk], lists[at : at + chunk]
            q = queries.take(mine // sources.nq, mine[:, None] % sources.nq, buffers[0])
            heads = sources.head(mine)
            k = sources.k.take(heads, wanted, buffers[1])[:, :, :used]
            v = sources.v.take(heads, wanted, buffers[2])[:, :, :used]
            mask = None if bias is None else _mask(bias[at : at + chunk], used, queries.block)
            yield Part(mine, heads, wanted, q, k, v, mask)


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
