"""Tiny random pipelines: the stock diffusers classes at a size that runs in a blink.

`tiny("wan")` builds a complete pipeline with random weights, without text encoders, plus the call
arguments that make it run offline. Token grids have three different sides (DiT is square), so a
swapped height and width is an error and not a coincidence. Every parameter is redrawn: many of
these models initialise gates and output projections to zero, and then a block that is skipped
changes nothing and every test passes. Deterministic in `seed`; the global RNG is left alone.
"""

# diffusers exports its classes lazily, annotates tuples of any length as tuple[int], and does not
# say that encoders and tokenizers may be None.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

STEPS = 4
TEXT = 7  # tokens of a prompt; coprime to every grid below
DIM = 32  # width of the transformers: 2 heads of 16
# Gain of the last convolution of an autoencoder: pixels stay inside the clamp to [0, 1].
PIXEL_GAIN = 0.3


@dataclass
class TinyPipeline:
    """A pipeline with the call arguments it runs with (tensors among them, no generator)."""

    name: str
    pipe: DiffusionPipeline
    inputs: dict[str, Any]

    def run(self, **overrides: Any) -> torch.Tensor:
        """Call the pipeline with `inputs`, `overrides` and a fresh CPU generator of seed 0.

        Returns the output as one tensor: (batch, channels, height, width) for images and
        (batch, frames, channels, height, width) for video, unless `output_type` is overridden.
        """
        import numpy as np
        import torch

        generator = torch.Generator("cpu").manual_seed(0)
        arguments = {"generator": generator, **self.inputs, **overrides, "return_dict": False}
        with warnings.catch_warnings():
            # Schedulers in sigma space call np.array(tensor), which numpy >= 2 warns of.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            output = self.pipe(**arguments)[0]  # pyright: ignore[reportCallIssue]
        return output if torch.is_tensor(output) else torch.from_numpy(np.asarray(output))


def tiny(name: str, *, seed: int = 0) -> TinyPipeline:
    """Build the tiny pipeline called `name` (one of `TINY_NAMES`) with weights drawn from `seed`.

    Raises:
        ValueError: `name` is not in `TINY_NAMES`.
    """
    import torch

    if name not in _BUILDERS:
        raise ValueError(f"tiny: unknown name {name!r}; choose one of {', '.join(TINY_NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe, inputs = _BUILDERS[name]()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
                _redraw(component)
    pipe.set_progress_bar_config(disable=True)
    return TinyPipeline(name, pipe, inputs)


def _redraw(module: torch.nn.Module) -> None:
    """Draw every parameter again: matrices of unit gain, scales around 1, the rest near zero."""
    import torch

    is_vae = hasattr(module, "decoder")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("scale_shift_table"):
                p.normal_(0.0, 0.5)
            elif p.ndim > 1 and "norm" in name and p.numel() == max(p.shape):  # Wan's RMS "gamma"
                p.normal_(1.0, 0.1)
            elif p.ndim > 1:
                gain = PIXEL_GAIN if is_vae and "conv_out" in name else 1.0
                p.normal_(0.0, gain * (p.shape[0] / p.numel()) ** 0.5)
            elif name.endswith("weight"):
                p.normal_(1.0, 0.1)
            else:
                p.normal_(0.0, 0.05)


def _text(*sizes: int, batch: int = 1) -> torch.Tensor:
    import torch

    return torch.randn(batch, *sizes)


def _prompts(width: int) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": _text(TEXT, width), "negative_prompt_embeds": _text(TEXT, width)}


def _vae(latent_channels: int = 4, **config: Any) -> Any:
    """An image autoencoder, 2x smaller in space."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=24,
        **config,
    )


def _pixel_unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=(8, 12),
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def _ddpm() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(unet=_pixel_unet(), scheduler=DDPMScheduler())
    return pipe, {"batch_size": 1, "num_inference_steps": STEPS, "output_type": "pt"}


def _ddim() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(unet=_pixel_unet(), scheduler=DDIMScheduler())
    return pipe, {"batch_size": 1, "num_inference_steps": STEPS, "output_type": "pt"}


def _latent_unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=DIM,
        **config,
    )


def _sd_parts() -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return {
        "vae": _vae(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": _latent_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
        ),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd() -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionPipeline

    inputs = {"height": 16, "width": 24, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    pipe = StableDiffusionPipeline(**_sd_parts())
    return pipe, {**inputs, **_prompts(DIM), "output_type": "pt"}


def _sd_img2img() -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**_sd_parts())
    inputs = {"image": torch.rand(1, 3, 16, 24), "strength": 0.6, "num_inference_steps": 5}
    return pipe, {**inputs, "guidance_scale": 5.0, **_prompts(DIM), "output_type": "pt"}


def _sdxl() -> tuple[Any, dict[str, Any]]:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _latent_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + DIM,
    )
    pipe = StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    inputs = {"height": 16, "width": 24, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    pooled = {"pooled_prompt_embeds": _text(DIM), "negative_pooled_prompt_embeds": _text(DIM)}
    return pipe, {**inputs, **_prompts(DIM), **pooled, "output_type": "pt"}


def _sd3() -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=DIM,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.0609, scaling_factor=1.5305),
        **dict.fromkeys((*encoders, *tokenizers), None),
    )
    inputs = {"height": 16, "width": 24, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    pooled = {"pooled_prompt_embeds": _text(24), "negative_pooled_prompt_embeds": _text(24)}
    return pipe, {**inputs, **_prompts(24), **pooled, "output_type": "pt"}


def _dit() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
    )
    pipe = DiTPipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    inputs = {"class_labels": [3], "num_inference_steps": STEPS, "guidance_scale": 4.0}
    return pipe, {**inputs, "output_type": "pt"}


def _pixart() -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=DIM,
        caption_channels=24,
        sample_size=8,
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae(),
        transformer=transformer,
        # Not PixArt's linear betas: dividing random noise by their last alpha gives latents of 300.
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
    )
    masks = {
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_attention_mask": torch.ones(1, TEXT).index_fill(1, torch.tensor([6]), 0.0),
    }
    inputs = {"height": 16, "width": 24, "num_inference_steps": STEPS, "guidance_scale": 4.5}
    plain = {"negative_prompt": None, "use_resolution_binning": False, "clean_caption": False}
    return pipe, {**inputs, **_prompts(24), **masks, **plain, "output_type": "pt"}


def _flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    inputs = {"height": 16, "width": 24, "num_inference_steps": STEPS, "guidance_scale": 3.5}
    embeds = {"prompt_embeds": _text(TEXT, 24), "pooled_prompt_embeds": _text(24)}
    return pipe, {**inputs, **embeds, "output_type": "pt"}


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=2 * DIM,
        num_layers=3,
        rope_max_seq_len=32,
    )


def _wan_pipe(**parts: Any) -> tuple[Any, dict[str, Any]]:
    """Latents 4x smaller in space and time: grid (3, 2, 4)."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        **parts,
    )
    inputs = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": STEPS}
    return pipe, {**inputs, "guidance_scale": 5.0, **_prompts(24), "output_type": "pt"}


def _wan() -> tuple[Any, dict[str, Any]]:
    return _wan_pipe(transformer=_wan_transformer())


def _wan22() -> tuple[Any, dict[str, Any]]:
    parts = {"transformer": _wan_transformer(), "transformer_2": _wan_transformer()}
    pipe, inputs = _wan_pipe(**parts, boundary_ratio=0.875)
    return pipe, {**inputs, "guidance_scale_2": 3.0}


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=16,
        sample_width=32,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )
    inputs = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": STEPS}
    return pipe, {**inputs, "guidance_scale": 6.0, **_prompts(24), "output_type": "pt"}


def _hunyuanvideo() -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.ones(1, TEXT)
    embeds = {
        **_prompts(24),
        "pooled_prompt_embeds": _text(24),
        "negative_pooled_prompt_embeds": _text(24),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask.index_fill(1, torch.tensor([5, 6]), 0.0),
    }
    inputs = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": STEPS}
    return pipe, {**inputs, "true_cfg_scale": 4.0, **embeds, "output_type": "pt"}


def _ltx() -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=DIM,
        num_layers=3,
        caption_channels=24,
    )
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    masks = {
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_attention_mask": torch.ones(1, TEXT).index_fill(1, torch.tensor([6]), 0.0),
    }
    inputs = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": STEPS}
    return pipe, {**inputs, "guidance_scale": 3.0, **_prompts(24), **masks, "output_type": "pt"}


_BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "sd": _sd,
    "sd-img2img": _sd_img2img,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "dit": _dit,
    "pixart": _pixart,
    "flux": _flux,
    "wan": _wan,
    "wan22": _wan22,
    "cogvideox": _cogvideox,
    "hunyuanvideo": _hunyuanvideo,
    "ltx": _ltx,
}
TINY_NAMES: tuple[str, ...] = tuple(_BUILDERS)
