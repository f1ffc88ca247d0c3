"""Feature extractors from local files; CLIP score by its formula."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from accel.metrics.clip_score import clip_score, scores
from accel.metrics.extractors import VIDEO_FRAMES, extractor


def _pictures(n=5, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


class _Toy(torch.nn.Module):
    """Has the arguments of the scripted Inception: features on request, else probabilities."""

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        x = img.float().mean([2, 3])
        if return_features:
            return x
        return (x / 100).softmax(1) if no_output_bias else x * 0


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(_Toy()).save(str(path))
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP in a stock folder, with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("clip")
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "<end>", "a", "red", "three", "blue"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        model_max_length=8,
    )  # fmt: skip
    config = CLIPConfig(
        text_config={"vocab_size": 7, "hidden_size": 16, "intermediate_size": 16,
                     "num_hidden_layers": 1, "num_attention_heads": 2,
                     "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_a_judge_of_the_zoo_looks_as_it_is():
    from accel.zoo.judge import judge

    look, pictures = extractor("zoo:digits-judge-b"), _pictures()
    assert np.array_equal(look.features(pictures), judge("digits-judge-b").features_of(pictures))
    assert np.allclose(look.probabilities(pictures).sum(1), 1, atol=1e-5)
    assert len(look.sha256) == 64


def test_a_scripted_network_gets_bytes_and_gives_features(script):
    look, pictures = extractor(f"torchscript:{script}"), _pictures(70)
    expected = pictures.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(look.features(pictures), expected, rtol=1e-5)
    e = np.exp(expected / 100)
    probabilities = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(look.probabilities(pictures), probabilities, rtol=1e-4)


def test_of_a_video_it_is_the_mean_of_eight_frames(script):
    videos = np.stack([_pictures(17, seed=i) for i in range(3)])
    rows = np.linspace(0, 16, VIDEO_FRAMES).round().astype(int)
    found = extractor(f"torchscript:{script}").features(videos)
    np.testing.assert_allclose(found, videos[:, rows].mean((1, 2, 3)), rtol=1e-5)


def test_a_transformers_folder_gives_projected_features(clip_folder):
    look, pictures = extractor(f"transformers:{clip_folder}"), _pictures(3)
    assert look.features(pictures).shape == (3, 8)
    assert look.name == "CLIPModel"
    assert not np.allclose(look.features(pictures)[0], look.features(pictures)[1])


def test_what_cannot_look_is_refused_in_one_line(tmp_path, script):
    (tmp_path / "broken.pt").write_bytes(b"no network")
    for spec, why in (
        ("inception", "wants zoo:NAME"),
        ("torchscript:nowhere.pt", "no such file"),
        (f"torchscript:{tmp_path / 'broken.pt'}", "TorchScript"),
        (f"transformers:{tmp_path}", "config.json"),
        ("zoo:digits", "no embedded|no judge|judge"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            extractor(spec)
        assert "\n" not in str(error.value)


def test_clip_score_is_a_hundred_cosines_and_never_negative():
    a = np.array([[1.0, 0], [1, 0], [1, 0], [3, 4]])
    b = np.array([[2.0, 0], [0, 5], [-1, 0], [4, 3]])
    np.testing.assert_allclose(scores(a, b), [100, 0, 0, 96])


def test_clip_score_of_a_local_model(clip_folder):
    """The model's own logits are cosines times its scale."""
    score, pictures = clip_score(str(clip_folder)), _pictures(3)
    prompts = ["a red three", "a blue three", "a red blue"]
    with torch.inference_mode():
        inputs = score.processor(text=prompts, images=list(pictures), return_tensors="pt",
                                 padding=True)  # fmt: skip
        inputs.pop("token_type_ids", None)
        out = score.model(**inputs)
        cosines = (out.logits_per_image / score.model.logit_scale.exp()).diagonal().numpy()
    expected = 100 * np.maximum(cosines, 0)
    # single precision through two layers: some hundred roundings of values near 100
    np.testing.assert_allclose(score(pictures, prompts), expected, atol=1e-3)
    video = np.stack([pictures[:1].repeat(9, 0)[0]] * 9)[None]
    assert score(video, prompts[:1])[0] == pytest.approx(score(pictures[:1], prompts[:1])[0])
    with pytest.raises(ValueError, match="prompts"):
        score(pictures, prompts[:2])
    with pytest.raises(ValueError, match="no CLIP model"):
        clip_score("nowhere")
