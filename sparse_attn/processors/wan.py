"""Wan 2.1 and 2.2: self-attention only; text and image conditions enter by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.processors.site import SparseProcessor


class WanProcessor(SparseProcessor):
    """For `WanAttnProcessor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        dense = encoder_hidden_states is not None or attention_mask is not None
        attend = None if dense else self.site.sparse()
        if attend is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
        out = attend(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)
