"""Attention to kept blocks on a CPU: gathers the kept keys and calls torch's own attention.

Origin: measurements in benchmarks/bench_sparse.py. Layout: q (b, h, s, d), k and v (b, g, s, d),
any strides. Blocks of queries with as many kept blocks are computed together, a few at a time, so
that what is gathered stays in cache; what is not kept is never touched. Rows that keep everything
are computed without a copy. A ragged last block of keys is the last of an ascending list, so it is
cut off and needs no mask. Tested on x86; works wherever torch does, needs no compiler.
Limits: no gradients (the reference has them). Blocks of 256 queries are about 1.5 times as fast as
of 128: torch's attention takes 32 queries at a time below 192 queries, 64 below 768.
"""

from __future__ import annotations

import math

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
    rows = _padded(q, blocks.query_block).reshape(-1, blocks.query_block, d)  # (b * h * nq, ., d)
    out = torch.empty_like(rows)
    lse = torch.empty(rows.shape[:2], dtype=_lse_type(q.dtype))
    sources = _Sources(k, v, blocks, h)
    for group in _groups(blocks):
        group.compute(rows, sources, scale, out, lse)
    result = Attention(out.view(b, h, -1, d)[:, :, :s], lse.view(b, h, -1)[:, :, :s])
    if pooled is None:
        return result
    return _merged(result, _pooled(rows.view(b, h, -1, d), pooled, blocks, scale))


class _Sources:
    """Keys and values by block, (b * g * nk, key_block * d), and whose they are."""

    def __init__(self, k: Tensor, v: Tensor, blocks: BlockMap, heads: int) -> None:
        self.k = _padded(k, blocks.key_block).flatten(3).flatten(0, 2)
        self.v = _padded(v, blocks.key_block).flatten(3).flatten(0, 2)
        self.heads, self.own, self.repeat = heads, k.shape[1], heads // k.shape[1]
        self.nq, self.nk = blocks.keep.shape[2:]
        self.keys, self.block, self.width = blocks.keys, blocks.key_block, k.shape[-1]

    def first_block(self, rows: Tensor) -> Tensor:
        """Where the blocks of a row's head begin."""
        head, batch = rows // self.nq % self.heads, rows // (self.nq * self.heads)
        return (batch * self.own + head // self.repeat) * self.nk


class _Group:
    """Rows with equally many kept blocks, all with the ragged last block or all without it."""

    def __init__(self, rows: Tensor, lists: Tensor, count: int, ragged: bool) -> None:
        self.rows, self.lists, self.count, self.ragged = rows, lists, count, ragged

    def compute(
        self, q: Tensor, sources: _Sources, scale: float | None, out: Tensor, lse: Tensor
    ) -> None:
        if self.count == 0:
            out[self.rows], lse[self.rows] = 0, -math.inf
        elif self.count == sources.nk:
            self._compute_whole(q, sources, scale, out, lse)
        else:
            self._compute_chunks(q, sources, scale, out, lse)

    def _compute_whole(self, q, sources, scale, out, lse) -> None:
        """Rows of one head share all keys: no copy, and long queries."""
        starts = sources.first_block(self.rows)
        heads = self.rows // sources.nq
        for head in heads.unique().tolist():
            mine = self.rows[heads == head]
            start = int(starts[heads == head][0])
            k, v = (
                x[start : start + sources.nk].view(1, 1, -1, sources.width)[:, :, : sources.keys]
                for x in (sources.k, sources.v)
            )
            part, sums = attention_with_lse(q[mine].view(1, 1, -1, q.shape[-1]), k, v, scale)
            out[mine] = part.view(len(mine), -1, q.shape[-1])
            lse[mine] = sums.view(len(mine), -1)

    def _compute_chunks(self, q, sources, scale, out, lse) -> None:
        keys = self.count * sources.block
        used = keys - (-sources.keys % sources.block if self.ragged else 0)
        size = keys * sources.width * q.element_size() * 2
        chunk = max(1, min(len(self.rows), CHUNK_BYTES // size))
        places = self.lists + sources.first_block(self.rows)[:, None]
        buffers = [q.new_empty(chunk * self.count, sources.k.shape[1]) for _ in "kv"]
        for at in range(0, len(self.rows), chunk):
            mine, wanted = self.rows[at : at + chunk], places[at : at + chunk].flatten()
            k, v = (
                torch.index_select(x, 0, wanted, out=buffer[: len(wanted)]).view(
                    len(mine), 1, keys, sources.width
                )[:, :, :used]
                for x, buffer in zip((sources.k, sources.v), buffers, strict=True)
            )
            part, sums = attention_with_lse(q[mine, None], k, v, scale)
            out[mine], lse[mine] = part[:, 0], sums[:, 0]


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


def _pooled(q: Tensor, pooled: Pooled, blocks: BlockMap, scale: float | None) -> Attention:
    """Of all queries to the pooled keys, whose bias may differ by block of queries."""
    b, h, nq, _ = blocks.keep.shape
    size, d = blocks.query_block, q.shape[-1]
    count, repeat = pooled.k.shape[2], h // pooled.k.shape[1]

    def rows(x: Tensor) -> Tensor:  # (b, g, p, d) -> (b * h * nq, 1, p, d)
        x = x.to(q.dtype).repeat_interleave(repeat, dim=1)[:, :, None]
        return x.expand(b, h, nq, count, d).reshape(-1, 1, count, d)

    bias = pooled.bias.expand(b, h, nq, count).reshape(-1, 1, 1, count)
    mask = bias.to(q.dtype).expand(-1, 1, size, -1)  # one row, seen by all queries of a block
    out, lse = attention_with_lse(
        q.reshape(-1, 1, size, d), rows(pooled.k), rows(pooled.v), scale, mask
    )
    hidden = (bias == -math.inf).all(-1)
    out, lse = out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -math.inf)
    out, lse = out.view(b, h, -1, d), lse.view(b, h, -1)
    return Attention(out[:, :, : blocks.queries], lse[:, :, : blocks.queries])


def _merged(one: Attention, other: Attention) -> Attention:
    """One softmax over the keys of both."""
    lse = torch.logaddexp(one.lse, other.lse)
    finite = lse.masked_fill(lse == -math.inf, 0)
    a, b = ((x.lse - finite).exp()[..., None].to(x.out.dtype) for x in (one, other))
    return Attention(one.out * a + other.out * b, lse)


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
