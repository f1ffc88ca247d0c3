"""Public denoisers at their released sizes, on the meta device, with one call of each.

Configurations are those of the released checkpoints; where a class's defaults are them, they are
left out. Calls have the shapes of one sample of the usual size, and texts of the usual length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


@dataclass(frozen=True)
class PublicModel:
    """``model()`` builds it, ``call()`` makes its arguments; ``sample``: those denoised."""

    kind: str
    config: dict[str, Any]
    call: Callable[[], dict[str, Any]]
    sample: tuple[str, ...] = ("hidden_states",)

    def model(self) -> Any:
        with torch.device("meta"):
            built = getattr(diffusers, self.kind)(**self.config)
        for parameter in built.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return built.eval()


def _sd(context: int, **more: Any) -> dict[str, Any]:
    text = empty(1, 77, context)
    return {
        "sample": empty(1, 4, 64, 64),
        "timestep": numbers(1),
        "encoder_hidden_states": text,
    } | more


def _wan(frames: int) -> dict[str, Any]:
    return {
        "hidden_states": empty(1, 16, frames, 60, 104),
        "timestep": numbers(1),
        "encoder_hidden_states": empty(1, 512, 4096),
    }


def _joint(channels: int, text: tuple[int, int], **more: Any) -> dict[str, Any]:
    """4,096 image tokens and some of text."""
    return {
        "hidden_states": empty(1, 4096, channels),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, *text),
    } | more


def _cogvideox() -> dict[str, Any]:
    return {
        "hidden_states": empty(1, 13, 16, 60, 90),
        "timestep": numbers(1),
        "encoder_hidden_states": empty(1, 226, 4096),
    }


def _minimax() -> dict[str, Any]:
    video, audio, text = 4096, 64, 256
    total = video + audio + text
    return {
        "hidden_states": empty(1, video, 24 * 4),
        "audio_hidden_states": empty(1, audio, 32),
        "encoder_hidden_states": empty(1, text, 5120),
        "timestep": empty(1, dtype=torch.float32),
        "timestep_indices": numbers(total),
        "token_tags": numbers(total),
        "position_ids": numbers(total, 3),
        "video_indices": numbers(video),
        "audio_indices": numbers(audio),
        "text_indices": numbers(text),
    }


PUBLIC: dict[str, PublicModel] = {
    "DDPM CIFAR-10": PublicModel(
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
        },
        lambda: {"sample": empty(1, 3, 32, 32), "timestep": numbers(1)},
        ("sample",),
    ),
    "SD 1.5": PublicModel(
        "UNet2DConditionModel", {"cross_attention_dim": 768}, lambda: _sd(768), ("sample",)
    ),
    "SDXL": PublicModel(
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        lambda: _sd(
            2048, added_cond_kwargs={"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}
        ),
        ("sample",),
    ),
    "DiT-XL/2": PublicModel(
        "DiTTransformer2DModel",
        {"out_channels": 8},
        lambda: {
            "hidden_states": empty(1, 4, 32, 32),
            "timestep": numbers(1),
            "class_labels": numbers(1),
        },
    ),
    "PixArt-alpha 512": PublicModel(
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096},
        lambda: {
            "hidden_states": empty(1, 4, 64, 64),
            "timestep": numbers(1),
            "encoder_hidden_states": empty(1, 120, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3 medium": PublicModel(
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        lambda: {
            "hidden_states": empty(1, 16, 128, 128),
            "timestep": empty(1),
            "encoder_hidden_states": empty(1, 333, 4096),
            "pooled_projections": empty(1, 2048),
        },
    ),
    "FLUX.1 dev": PublicModel(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        lambda: _joint(
            64,
            (512, 4096),
            pooled_projections=empty(1, 768),
            guidance=empty(1, dtype=torch.float32),
            img_ids=empty(4096, 3),
            txt_ids=empty(512, 3),
        ),
    ),
    "Qwen-Image": PublicModel(
        "QwenImageTransformer2DModel",
        {},
        lambda: _joint(64, (512, 3584), img_shapes=[[(1, 64, 64)]]),
    ),
    "AuraFlow": PublicModel(
        "AuraFlowTransformer2DModel",
        {},
        lambda: {
            "hidden_states": empty(1, 4, 128, 128),
            "timestep": empty(1),
            "encoder_hidden_states": empty(1, 256, 2048),
        },
    ),
    "CogVideoX 2B": PublicModel("CogVideoXTransformer3DModel", {}, _cogvideox),
    "CogVideoX 5B": PublicModel(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        lambda: (
            _cogvideox() | {"image_rotary_emb": (empty(13 * 30 * 45, 64), empty(13 * 30 * 45, 64))}
        ),
    ),
    "HunyuanVideo": PublicModel(
        "HunyuanVideoTransformer3DModel",
        {},
        lambda: {
            "hidden_states": empty(1, 16, 5, 40, 64),
            "timestep": numbers(1),
            "encoder_hidden_states": empty(1, 256, 4096),
            "encoder_attention_mask": numbers(1, 256),
            "pooled_projections": empty(1, 768),
            "guidance": empty(1),
        },
    ),
    "CogView4": PublicModel(
        "CogView4Transformer2DModel",
        {},
        lambda: {
            "hidden_states": empty(1, 16, 128, 128),
            "timestep": numbers(1),
            "encoder_hidden_states": empty(1, 224, 4096),
            "original_size": empty(1, 2),
            "target_size": empty(1, 2),
            "crop_coords": empty(1, 2),
        },
    ),
    "Wan 2.1 1.3B": PublicModel(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        lambda: _wan(5),
    ),
    "Wan 2.1 14B": PublicModel("WanTransformer3DModel", {}, lambda: _wan(5)),
    "LTX-Video": PublicModel(
        "LTXVideoTransformer3DModel",
        {},
        lambda: _joint(
            128,
            (128, 4096),
            encoder_attention_mask=empty(1, 128),
            num_frames=1,
            height=64,
            width=64,
        ),
    ),
    "MiniMax-H3": PublicModel(
        "MiniMaxH3Transformer3DModel", {}, _minimax, ("hidden_states", "audio_hidden_states")
    ),
}
