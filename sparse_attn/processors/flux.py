"""Flux: one attention over text, which comes first, and the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.processors.site import SparseProcessor


class FluxProcessor(SparseProcessor):
    """For `FluxAttnProcessor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        attend = None if attention_mask is not None else self.site.sparse()
        if attend is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        from diffusers.models.embeddings import apply_rotary_emb

        said = encoder_hidden_states
        q, k, v = _projected(attn, hidden_states, ("to_q", "to_k", "to_v"), "to_qkv")
        q, k = attn.norm_q(q), attn.norm_k(k)
        if attn.added_kv_proj_dim is not None and said is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            tq, tk, tv = _projected(attn, said, names, "to_added_qkv")
            tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = (torch.cat(x, dim=1) for x in ((tq, q), (tk, k), (tv, v)))
        if image_rotary_emb is not None:
            rotate: Any = apply_rotary_emb  # which is said to return pairs, and never does here
            q = rotate(q, image_rotary_emb, sequence_dim=1)
            k = rotate(k, image_rotary_emb, sequence_dim=1)
        out = attend(q, k, v).flatten(2, 3).to(q.dtype)
        if said is None:
            return out
        text = said.shape[1]
        said, shown = out.split_with_sizes([text, out.shape[1] - text], dim=1)
        shown = attn.to_out[1](attn.to_out[0](shown.contiguous()))
        return shown, attn.to_add_out(said.contiguous())


def _projected(attn: Any, x: Tensor, names: tuple[str, ...], fused: str) -> tuple[Tensor, ...]:
    if attn.fused_projections:
        parts = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        parts = tuple(getattr(attn, name)(x) for name in names)
    return tuple(part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
