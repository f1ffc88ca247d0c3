"""Scores of contrastive image-text models from local folders, through transformers.

CLIP score (Hessel et al. 2021), SigLIP, PickScore (Kirstain et al. 2023) and the LAION aesthetic
heads. All need weights that you have downloaded: nothing is fetched. A video's score is the mean
over eight evenly spaced frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.metrics.protocol import file_sha256

FRAMES = 8
KINDS = ("clip", "siglip", "pickscore")


class TextImage:
    """Cosine of image and prompt embeddings of a model folder (config, weights, processor).

    kind: "pickscore" multiplies with the model's logit scale, as published scores do; the order is
    the same. Not defined for empty prompts: those score NaN.
    """

    def __init__(self, kind: str, folder: str, *, device: str = "cpu"):
        if kind not in KINDS:
            raise ValueError(f"TextImage: kind {kind!r}; one of {', '.join(KINDS)}")
        _check_folder(folder)
        self.name, self.folder, self.device = kind, folder, device
        self.range = (-100.0, 100.0) if kind == "pickscore" else (-1.0, 1.0)

    @cached_property
    def fingerprint(self) -> str:
        return f"{self.name}:{_weights_sha256(self.folder)[:16]}"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        return _loaded(self.folder, self.device)

    @torch.inference_mode()
    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        model, processor = self._parts
        padding = "max_length" if self.name == "siglip" else True  # as it was trained
        words = processor.tokenizer(
            [p or " " for p in prompts], padding=padding, truncation=True, return_tensors="pt"
        ).to(self.device)
        text = _unit(_features(model.get_text_features(**words)))
        cosine = (image_embeddings(model, processor, samples, self.device) * text[:, None]).sum(-1)
        if self.name == "pickscore":
            cosine = cosine * model.logit_scale.exp()
        scores = cosine.mean(1).float().cpu().numpy().astype(np.float64)
        return np.where([not p for p in prompts], np.nan, scores)


class Aesthetic:
    """A LAION aesthetic predictor: linear layers (a safetensors file) on unit CLIP embeddings.

    One layer is the first version, five the second; their scales differ.
    """

    range = (0.0, 10.0)

    def __init__(self, folder: str, head: str, *, device: str = "cpu"):
        _check_folder(folder)
        if not Path(head).is_file():
            raise ValueError(f"Aesthetic: there is no file {head}")
        self.name, self.folder, self.head, self.device = "aesthetic", folder, head, device

    @cached_property
    def fingerprint(self) -> str:
        return f"aesthetic:{_weights_sha256(self.folder)[:16]}:{file_sha256(Path(self.head))[:16]}"

    @cached_property
    def _parts(self) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
        from safetensors.torch import load_file

        tensors = load_file(self.head, device=self.device)
        names = sorted({k.rpartition(".")[0] for k in tensors}, key=_last_number)
        layers = [(tensors[f"{n}.weight".lstrip(".")], tensors[f"{n}.bias".lstrip(".")])
                  for n in names]  # fmt: skip
        return *_loaded(self.folder, self.device), layers

    @torch.inference_mode()
    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        model, processor, layers = self._parts
        x = image_embeddings(model, processor, samples, self.device).float()
        for weight, bias in layers:  # between them is only dropout
            x = torch.nn.functional.linear(x, weight.float(), bias.float())
        return x[..., 0].mean(1).cpu().numpy().astype(np.float64)


def image_embeddings(model: Any, processor: Any, samples: np.ndarray, device: str) -> Tensor:
    """Unit embeddings (n, frames, d) of pictures (n, h, w, c) or videos (n, f, h, w, c)."""
    if samples.ndim == 4:
        samples = samples[:, None]
    count = min(FRAMES, samples.shape[1])
    samples = samples[:, np.linspace(0, samples.shape[1] - 1, count).round().astype(int)]
    if samples.shape[-1] == 1:
        samples = np.repeat(samples, 3, -1)
    flat = list(samples.reshape(-1, *samples.shape[2:]))
    pixels = processor.image_processor(images=flat, return_tensors="pt").to(device)
    return _unit(_features(model.get_image_features(**pixels))).unflatten(0, (-1, count))


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object, whose pooled output is projected already."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _loaded(folder: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor


def _check_folder(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (no config.json); give a local folder")


def _weights_sha256(folder: str) -> str:
    files = sorted(Path(folder).glob("*.safetensors"))
    return "".join(file_sha256(f) for f in files)


def _last_number(name: str) -> int:
    digits = [part for part in name.split(".") if part.isdigit()]
    return int(digits[-1]) if digits else 0
