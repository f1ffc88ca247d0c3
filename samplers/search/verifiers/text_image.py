"""Scores of contrastive image-text models from local folders, through transformers.

CLIP score (Hessel et al. 2021), SigLIP, PickScore (Kirstain et al. 2023), HPSv2.1 (Wu et al. 2023)
and the LAION aesthetic heads. All need weights that you have downloaded: nothing is fetched. A
video's score is the mean over eight evenly spaced frames. ``differentiable`` resizes in float
tensors what ``score`` has resized by the model's own processor; the two differ by that rounding.
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
from samplers.search.verifiers.open_clip import by_transformers_names, checkpoint

FRAMES = 8
KINDS = ("clip", "siglip", "pickscore", "hps")


class TextImage:
    """Cosine of image and prompt embeddings of a model folder (config, weights, processor).

    kind: "pickscore" multiplies with the model's logit scale, as published scores do; the order is
    the same. Not defined for empty prompts: those score NaN. weights: a checkpoint that takes the
    place of the folder's own, as HPSv2.1 is published: CLIP ViT-H/14 by open_clip's names (.pt,
    .safetensors), beside any transformers folder of that model.
    """

    def __init__(self, kind: str, folder: str, weights: str | None = None, *, device: str = "cpu"):
        if kind not in KINDS:
            raise ValueError(f"TextImage: kind {kind!r}; one of {', '.join(KINDS)}")
        _check_folder(folder)
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"TextImage: there is no file {weights}")
        self.name, self.folder, self.weights, self.device = kind, folder, weights, device
        self.range = (-100.0, 100.0) if kind == "pickscore" else (-1.0, 1.0)

    @cached_property
    def fingerprint(self) -> str:
        if self.weights is not None:
            return f"{self.name}:{file_sha256(Path(self.weights))[:16]}"
        return f"{self.name}:{_weights_sha256(self.folder)[:16]}"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        return _loaded(self.folder, self.device, self.weights)

    @torch.inference_mode()
    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        images = image_embeddings(*self._parts, samples, self.device)
        scores = self._agreement(images, prompts).float().cpu().numpy().astype(np.float64)
        return np.where([not p for p in prompts], np.nan, scores)

    def differentiable(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same from tensors in 0..1 (``protocol.Differentiable``); of an empty prompt, too."""
        return self._agreement(tensor_embeddings(*self._parts, samples), prompts)

    def _agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, frames, d) with those of prompts: (n,)."""
        model, processor = self._parts
        padding = "max_length" if self.name == "siglip" else True  # as it was trained
        words = processor.tokenizer(
            [p or " " for p in prompts], padding=padding, truncation=True, return_tensors="pt"
        ).to(self.device)
        with torch.no_grad():
            text = _unit(_features(model.get_text_features(**words)))
        cosine = (images * text[:, None].to(images)).sum(-1)
        if self.name == "pickscore":
            cosine = cosine * model.logit_scale.detach().exp()
        return cosine.mean(1)


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
    @torch.inference_mode(False)
    def _parts(self) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
        from safetensors.torch import load_file

        tensors = load_file(self.head, device=self.device)
        names = sorted({k.rpartition(".")[0] for k in tensors}, key=_last_number)
        layers = [(tensors[f"{n}.weight".lstrip(".")], tensors[f"{n}.bias".lstrip(".")])
                  for n in names]  # fmt: skip
        return *_loaded(self.folder, self.device), layers

    @torch.inference_mode()
    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        model, processor, _ = self._parts
        found = self._headed(image_embeddings(model, processor, samples, self.device))
        return found.cpu().numpy().astype(np.float64)

    def differentiable(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same from tensors in 0..1; see ``protocol.Differentiable``."""
        model, processor, _ = self._parts
        return self._headed(tensor_embeddings(model, processor, samples))

    def _headed(self, x: Tensor) -> Tensor:
        """Unit embeddings (n, frames, d) -> (n,)."""
        x = x.float()
        for weight, bias in self._parts[2]:  # between them is only dropout
            x = torch.nn.functional.linear(x, weight.float(), bias.float())
        return x[..., 0].mean(1)


def image_embeddings(model: Any, processor: Any, samples: np.ndarray, device: str) -> Tensor:
    """Unit embeddings (n, frames, d) of pictures (n, h, w, c) or videos (n, f, h, w, c)."""
    if samples.ndim == 4:
        samples = samples[:, None]
    samples = samples[:, _looked_at(samples.shape[1])]
    if samples.shape[-1] == 1:
        samples = np.repeat(samples, 3, -1)
    flat = list(samples.reshape(-1, *samples.shape[2:]))
    pixels = processor.image_processor(images=flat, return_tensors="pt").to(device)
    count = samples.shape[1]
    return _unit(_features(model.get_image_features(**pixels))).unflatten(0, (-1, count))


def tensor_embeddings(model: Any, processor: Any, samples: Tensor) -> Tensor:
    """The same of tensors (n, c, h, w) or (n, f, c, h, w) in 0..1, with their gradient."""
    if samples.ndim == 4:
        samples = samples[:, None]
    samples = samples[:, _looked_at(samples.shape[1])]
    count = samples.shape[1]
    x = samples.flatten(0, 1)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    pixels = _processed(processor.image_processor, x.float())
    kind = next(model.parameters())
    features = _features(model.get_image_features(pixel_values=pixels.to(kind.device, kind.dtype)))
    return _unit(features).unflatten(0, (-1, count))


def _looked_at(frames: int) -> Any:
    """Indices of the frames that are scored."""
    return np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int)


def _processed(settings: Any, x: Tensor) -> Tensor:
    """What an image processor does (resize, crop the middle, normalise) to (n, 3, h, w) in 0..1."""
    size = dict(settings.size)
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(x.shape[-2:])
        wanted = tuple(max(1, int(n * scale + 1e-6)) for n in x.shape[-2:])
    else:
        wanted = (size["height"], size["width"])
    if wanted != tuple(x.shape[-2:]):
        x = torch.nn.functional.interpolate(x, wanted, mode="bicubic", antialias=True).clamp(0, 1)
    if getattr(settings, "do_center_crop", False):
        crop = dict(settings.crop_size)
        top, left = (
            (n - crop[k]) // 2 for n, k in zip(x.shape[-2:], ("height", "width"), strict=True)
        )
        x = x[..., top : top + crop["height"], left : left + crop["width"]]
    mean, deviation = (
        x.new_tensor(v)[:, None, None] for v in (settings.image_mean, settings.image_std)
    )
    return (x - mean) / deviation


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object, whose pooled output is projected already."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@torch.inference_mode(False)  # weights made in that mode would have no gradient ever after
def _loaded(folder: str, device: str, weights: str | None = None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if weights is None:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    else:
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        found = by_transformers_names(checkpoint(weights))
        try:
            model.load_state_dict(found, strict=True)
        except RuntimeError as error:
            said = str(error).replace("\n", " ")[:300]
            raise ValueError(f"{weights} does not fit the model of {folder}: {said}") from None
        model = model.float()
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
