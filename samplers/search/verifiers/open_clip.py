"""CLIP checkpoints with open_clip's names of weights, as HPSv2.1 is published, for transformers."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def checkpoint(path: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pt file; nothing but tensors is unpickled."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)


_PARTS = {  # of a block: open_clip -> transformers
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # kept as x @ W there
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)?(weight|bias)$")


def by_transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP as open_clip names its weights, as transformers' ``CLIPModel`` does.

    Raises:
        ValueError: a weight that no CLIP has.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        name = name.removeprefix("module.")
        if name in _SINGLES:
            found[_SINGLES[name]] = value.T.contiguous() if name in _TRANSPOSED else value
            continue
        block = _BLOCK.match(name)
        if block is None and name == "attn_mask":
            continue  # a buffer
        if block is None or block[3] not in (*_PARTS, "attn.in_proj"):
            raise ValueError(f"no weight of a CLIP by open_clip's names: {name!r}")
        side = "vision_model" if block[1] else "text_model"
        home = f"{side}.encoder.layers.{block[2]}"
        if block[3] == "attn.in_proj":
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{home}.self_attn.{part}_proj.{block[4]}"] = rows.contiguous()
        else:
            found[f"{home}.{_PARTS[block[3]]}.{block[4]}"] = value
    return found
