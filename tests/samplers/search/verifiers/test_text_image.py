"""Through transformers, from local folders: a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from accel.loading import zoo_path
from samplers.search.verifiers.names import verifier_named
from samplers.search.verifiers.open_clip import by_transformers_names
from samplers.search.verifiers.text_image import Aesthetic, TextImage

SAMPLES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
PROMPTS = ["a red three", "a blue one on a white background", "a green two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizerFast
    from transformers.models.clip import CLIPImageProcessorPil

    target = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizerFast.from_pretrained(zoo_path("zoo:digits-sd") / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    words = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=words, vision_config={**small, "image_size": 32,
                            "patch_size": 8}, projection_dim=8)  # fmt: skip
        CLIPModel(config).save_pretrained(target)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(target)
    return str(target)


def test_it_is_the_models_own_similarity(folder):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    asked = processor(text=PROMPTS, images=list(SAMPLES), return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = model.eval()(**asked).logits_per_image.diagonal()
    scale = float(model.logit_scale.detach().exp())
    assert TextImage("clip", folder).score(SAMPLES, PROMPTS) == pytest.approx(
        (logits / scale).numpy(), abs=1e-5
    )
    assert TextImage("pickscore", folder).score(SAMPLES, PROMPTS) == pytest.approx(
        logits.numpy(), abs=1e-4
    )


def test_a_video_scores_the_mean_of_its_frames(folder):
    clip = TextImage("clip", folder)
    videos = SAMPLES[None].repeat(2, 0)  # 2 videos of 3 frames
    frames = clip.score(SAMPLES, ["a red three"] * 3)
    assert clip.score(videos, ["a red three"] * 2) == pytest.approx([frames.mean()] * 2, abs=1e-6)


def test_nothing_asked_is_nothing_scored(folder):
    found = TextImage("clip", folder).score(SAMPLES[:2], ["", "a red three"])
    assert np.isnan(found[0])
    assert np.isfinite(found[1])


def test_an_aesthetic_head_is_applied_layer_by_layer(folder, tmp_path):
    from safetensors.torch import save_file

    first, last = torch.randn(4, 8), torch.randn(1, 4)
    head = {"layers.0.weight": first, "layers.0.bias": torch.ones(4),
            "layers.10.weight": last, "layers.10.bias": torch.zeros(1)}  # fmt: skip
    save_file(head, tmp_path / "head.safetensors")
    scorer = Aesthetic(folder, str(tmp_path / "head.safetensors"))
    single = {"weight": (last @ first), "bias": (last @ torch.ones(4))}
    save_file(single, tmp_path / "one.safetensors")
    one = Aesthetic(folder, str(tmp_path / "one.safetensors"))
    assert scorer.score(SAMPLES, PROMPTS) == pytest.approx(one.score(SAMPLES, PROMPTS), abs=1e-5)
    x = torch.from_numpy(SAMPLES).movedim(-1, 1).float() / 255
    found = scorer.differentiable(x.requires_grad_(), PROMPTS)
    assert found.requires_grad
    assert found.detach().numpy() == pytest.approx(scorer.score(SAMPLES, PROMPTS), abs=1e-4)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        TextImage("clip", str(tmp_path))
    with pytest.raises(ValueError, match="kind"):
        TextImage("dino", str(tmp_path))


def by_open_clip_names(state):
    """What transformers' CLIP holds, as open_clip would have saved it."""
    found, rows = {}, {}
    for name, value in state.items():
        name = name.replace("vision_model.encoder.layers", "visual.transformer.resblocks")
        name = name.replace("text_model.encoder.layers", "transformer.resblocks")
        parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
                 "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
        for theirs, own in parts.items():
            name = name.replace(theirs, own)
        if "self_attn." in name:
            home, _, rest = name.partition("self_attn.")
            rows.setdefault(f"{home}attn.in_proj_{rest.split('.')[1]}", {})[rest[0]] = value
            continue
        for theirs, own in (
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm", "ln_final"),
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
        ):
            name = name.replace(theirs, own)
        if name in ("visual_projection.weight", "text_projection.weight"):
            name = "visual.proj" if name[0] == "v" else "text_projection"
            value = value.T.contiguous()
        found[name] = value
    return found | {k: torch.cat([v[p] for p in "qkv"]) for k, v in rows.items()}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_hps_takes_a_checkpoint_by_open_clips_names(folder, tmp_path, ending):
    """Other weights than the folder's, saved as HPSv2.1 is; the score is their cosine."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        other = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    whole, weights = tmp_path / "whole", tmp_path / f"hps{ending}"
    other.save_pretrained(whole)
    for part in Path(folder).glob("*"):
        if part.suffix != ".safetensors" and not (whole / part.name).exists():
            (whole / part.name).write_bytes(part.read_bytes())
    theirs = by_open_clip_names(other.state_dict())
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in theirs
    if ending == ".pt":
        torch.save({"epoch": 1, "state_dict": theirs}, weights)
    else:
        save_file(theirs, weights)
    found = verifier_named(f"hps:{folder},{weights}").score(SAMPLES, PROMPTS)
    assert found == pytest.approx(TextImage("clip", str(whole)).score(SAMPLES, PROMPTS), abs=1e-6)
    assert found != pytest.approx(TextImage("hps", folder).score(SAMPLES, PROMPTS), abs=1e-3)
    assert verifier_named(f"hps:{whole}").score(SAMPLES, PROMPTS) == pytest.approx(found, abs=1e-6)


def test_checkpoints_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        TextImage("hps", folder, str(tmp_path / "missing.pt"))
    with pytest.raises(ValueError, match=r"no weight of a CLIP.*visual\.trunk"):
        by_transformers_names({"visual.trunk.weight": torch.zeros(1)})
    torch.save({"ln_final.weight": torch.zeros(3)}, tmp_path / "small.pt")
    with pytest.raises(ValueError, match="does not fit"):
        TextImage("hps", folder, str(tmp_path / "small.pt")).score(SAMPLES, PROMPTS)


@pytest.mark.parametrize("size", [32, 48])
def test_the_score_of_tensors_is_that_of_pictures_and_has_a_gradient(folder, size):
    """At the model's own size the same; else up to the resizing's rounding to bytes."""
    samples = np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    for scorer in (TextImage("clip", folder), TextImage("pickscore", folder)):
        expected = scorer.score(samples, PROMPTS[:2])  # first: it loads in inference mode
        x = torch.from_numpy(samples).movedim(-1, 1).float() / 255
        x.requires_grad_()
        found = scorer.differentiable(x, PROMPTS[:2])
        scale = 1 if scorer.name == "clip" else float(scorer._parts[0].logit_scale.detach().exp())
        close = 1e-5 if size == 32 else 2e-2
        assert found.detach().numpy() == pytest.approx(expected, abs=close * scale)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert float(gradient.abs().max()) > 0
