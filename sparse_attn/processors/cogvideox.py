"""CogVideoX: one attention over text, which comes first, and video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.processors.site import SparseProcessor


class CogVideoXProcessor(SparseProcessor):
    """For `CogVideoXAttnProcessor2_0`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        attend = None if attention_mask is not None else self.site.sparse()
        if attend is None:
            return self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = self.projected(attn, joint)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            rotate: Any = apply_rotary_emb  # which is said to return pairs, and never does here
            q[:, :, text:] = rotate(q[:, :, text:], image_rotary_emb)
            k[:, :, text:] = rotate(k[:, :, text:], image_rotary_emb)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        said, shown = out.split([text, out.shape[1] - text], dim=1)
        return shown, said

    @staticmethod
    def projected(attn: Any, joint: Tensor) -> tuple[Tensor, ...]:
        return attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)


class FusedCogVideoXProcessor(CogVideoXProcessor):
    """For `FusedCogVideoXAttnProcessor2_0`."""

    @staticmethod
    def projected(attn: Any, joint: Tensor) -> tuple[Tensor, ...]:
        return attn.to_qkv(joint).chunk(3, dim=-1)
