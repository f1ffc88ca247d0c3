"""Through transformers, from local folders: a tiny model with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.loading import zoo_path
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


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        TextImage("clip", str(tmp_path))
    with pytest.raises(ValueError, match="kind"):
        TextImage("dino", str(tmp_path))
