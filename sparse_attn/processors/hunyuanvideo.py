"""HunyuanVideo: one attention over video and text, which comes last and ends with padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.processors.site import SparseProcessor


class HunyuanVideoProcessor(SparseProcessor):
    """For `HunyuanVideoAttnProcessor2_0`. The mask hides padded text; the site knows its length."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        attend = None if encoder_hidden_states is None else self.site.sparse()
        if attend is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        assert encoder_hidden_states is not None
        text = encoder_hidden_states.shape[1]
        single = attn.add_q_proj is None
        if single:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = _heads(attn, attn.to_q, attn.to_k, attn.to_v, hidden_states)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q = _rotated(q, image_rotary_emb, text if single else 0)
            k = _rotated(k, image_rotary_emb, text if single else 0)
        if not single:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = _heads(attn, *added, encoder_hidden_states)
            tq = tq if attn.norm_added_q is None else attn.norm_added_q(tq)
            tk = tk if attn.norm_added_k is None else attn.norm_added_k(tk)
            q, k, v = (torch.cat(x, dim=1) for x in ((q, tq), (k, tk), (v, tv)))
        out = attend(q, k, v).flatten(2, 3).to(q.dtype)
        shown, said = out[:, :-text], out[:, -text:]
        if getattr(attn, "to_out", None) is not None:
            shown = attn.to_out[1](attn.to_out[0](shown))
        if getattr(attn, "to_add_out", None) is not None:
            said = attn.to_add_out(said)
        return shown, said


def _heads(attn: Any, to_q: Any, to_k: Any, to_v: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (project(x).unflatten(2, (attn.heads, -1)) for project in (to_q, to_k, to_v))
    return q, k, v


def _rotated(x: Tensor, rotary: Any, text: int) -> Tensor:
    """All but the last `text` tokens turned."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotate: Any = apply_rotary_emb  # which is said to return pairs, and never does here
    if not text:
        return rotate(x, rotary, sequence_dim=1)
    return torch.cat([rotate(x[:, :-text], rotary, sequence_dim=1), x[:, -text:]], dim=1)
