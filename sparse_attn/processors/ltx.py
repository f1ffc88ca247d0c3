"""LTX-Video: self-attention only; text enters by cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_attn.processors.site import SparseProcessor


class LTXProcessor(SparseProcessor):
    """For `LTXVideoAttnProcessor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        dense = encoder_hidden_states is not None or attention_mask is not None
        attend = None if dense else self.site.sparse()
        if attend is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = attend(q, k, v).flatten(2, 3).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out))
