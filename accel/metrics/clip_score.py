"""CLIP score: how well a picture fits its prompt, by a CLIP model in a local folder.

Hessel et al. 2021 (arXiv 2104.08718) without its factor of 2.5: 100 max(cos, 0), as torchmetrics
and most tables have it. Truncates prompts to the model's text length, as everybody does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from accel.metrics.extractors import VIDEO_FRAMES, image_features, weights_sha256

SCALE = 100.0


@dataclass(frozen=True)
class ClipScore:
    """A loaded CLIP with its processor."""

    model: Any
    processor: Any
    sha256: str

    def __call__(self, samples: np.ndarray, prompts: list[str]) -> np.ndarray:
        """(n,) scores of uint8 pictures (n, h, w, 3); of a video the mean over 8 frames.

        Raises ValueError if there is not one prompt for each sample.
        """
        import torch

        if len(samples) != len(prompts):
            raise ValueError(f"clip score: {len(samples)} samples, {len(prompts)} prompts")
        if samples.ndim == 5:
            rows = np.linspace(0, samples.shape[1] - 1, VIDEO_FRAMES).round().astype(int)
            return np.mean([self(samples[:, row], prompts) for row in rows], axis=0)
        with torch.inference_mode():
            inputs = self.processor(
                text=prompts, images=list(samples), return_tensors="pt", padding=True,
                truncation=True,
            )  # fmt: skip
            seen = image_features(self.model, inputs["pixel_values"])
            words = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            said = self.model.get_text_features(**words)
            said = getattr(said, "pooler_output", said)
        return scores(seen.float().numpy(), said.float().numpy())


def scores(seen: np.ndarray, said: np.ndarray) -> np.ndarray:
    """100 max(cos, 0) of each pair of rows: (n, d), (n, d) -> (n,) float64."""
    seen, said = (x.astype(np.float64) for x in (seen, said))
    length = np.linalg.norm(seen, axis=1) * np.linalg.norm(said, axis=1)
    return SCALE * np.maximum((seen * said).sum(1) / length, 0.0)


@cache
def clip_score(folder: str) -> ClipScore:
    """The CLIP model of a local folder, loaded once. Raises ValueError in one line."""
    from transformers import CLIPModel, CLIPProcessor

    path = Path(folder)
    try:
        model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"clip score: no CLIP model in {folder}: {reason}") from None
    return ClipScore(model.eval(), processor, weights_sha256(path))
