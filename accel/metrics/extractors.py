"""Feature extractors by name, from local weights only: what distances of distributions look with.

    zoo:digits-judge-b        a judge of the embedded models
    torchscript:FILE          a scripted network that takes uint8 pictures (n, 3, h, w), such as the
                              Inception of the StyleGAN releases, which resizes inside (FID proper)
    transformers:FOLDER       a vision model in a stock folder: CLIP, SigLIP, DINOv2, ...

Nothing is ever fetched. Each extractor says how it sees (resize, quantisation), because that moves
a distance more than most accelerations do; both go into the protocol.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from accel.metrics.protocol import file_sha256

BATCH = 32  # pictures in one call
VIDEO_FRAMES = 8  # evenly spaced, that an extractor of pictures sees of a video
KINDS = ("zoo", "torchscript", "transformers")


@dataclass(frozen=True)
class Extractor:
    """Looks at uint8 pictures (n, h, w, 3), or videos (n, f, h, w, 3).

    features: gives (n, d) float. probabilities: of classes, (n, c), rows summing to 1, where the
    network has any. sees: in words, how pictures are prepared.
    """

    name: str
    sha256: str
    sees: str
    features: Callable[[np.ndarray], np.ndarray]
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None


@cache
def extractor(spec: str) -> Extractor:
    """The extractor called ``kind:what``, loaded once.

    Raises:
        ValueError: no such kind, or nothing usable there, in one line.
    """
    kind, what = require(spec)
    return {"zoo": _zoo, "torchscript": _torchscript, "transformers": _transformers}[kind](what)


def require(spec: str) -> tuple[str, str]:
    """Kind and what of an extractor that is there, without loading it.

    Raises:
        ValueError: no such kind, or no such file or folder, in one line.
    """
    kind, _, what = spec.partition(":")
    if kind not in KINDS or not what:
        raise ValueError(
            f"features {spec!r}: wants zoo:NAME, torchscript:FILE or transformers:FOLDER"
        )
    if kind == "zoo":
        from accel import zoo

        zoo.path(what)
    elif kind == "torchscript" and not Path(what).is_file():
        raise ValueError(f"features {spec}: no such file")
    elif kind == "transformers" and not (Path(what) / "config.json").is_file():
        raise ValueError(f"features {spec}: no config.json there")
    return kind, what


def extractor_sha256(spec: str) -> str:
    """Of the weights that ``extractor(spec)`` looks with, without loading them.

    Raises:
        ValueError: as ``require``.
    """
    kind, what = require(spec)
    if kind == "transformers":
        return weights_sha256(Path(what))
    if kind == "torchscript":
        return file_sha256(Path(what))
    from accel import zoo

    return file_sha256(zoo.path(what) / "model.safetensors")


def _zoo(name: str) -> Extractor:
    from accel import zoo
    from accel.zoo.judge import judge

    model = judge(name)

    def digits(samples: np.ndarray) -> np.ndarray:
        return model.probabilities(samples)["digit"]

    return Extractor(
        name,
        file_sha256(zoo.path(name) / "model.safetensors"),
        "8-bit pictures as they are, of 32 or 64 pixels; of a video 5 frames and the places",
        model.features_of,
        digits,
    )


def _torchscript(path: str) -> Extractor:
    import torch

    file = Path(path)
    try:
        with warnings.catch_warnings():  # the format is of the past, and what releases come in
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.jit.load(str(file), map_location="cpu").eval()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"features torchscript:{path}: no TorchScript file ({first})") from None
    names = {a.name for a in model.forward.schema.arguments}

    def run(samples: np.ndarray, **more: bool) -> np.ndarray:
        kept = {k: v for k, v in more.items() if k in names}
        return _in_batches(samples, lambda x: model(x, **kept).flatten(1))

    def probabilities(samples: np.ndarray) -> np.ndarray:
        return run(samples, no_output_bias=True)

    return Extractor(
        file.stem,
        file_sha256(file),
        f"8-bit pictures as they are, resized by the network itself; {_OF_VIDEOS}",
        lambda samples: run(samples, return_features=True),
        # as the scores of the Inception releases are defined
        probabilities if "no_output_bias" in names else None,
    )


def _transformers(folder: str) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    path = Path(folder)
    try:
        model: Any = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"features transformers:{folder}: {reason}") from None
    model.eval()

    def look(x: Any) -> Any:
        pixels = processor(images=list(x.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        if hasattr(model, "get_image_features"):
            return image_features(model, pixels["pixel_values"])
        return model(**pixels).pooler_output

    return Extractor(
        type(model).__name__,
        weights_sha256(path),
        f"8-bit pictures through the folder's {type(processor).__name__}; {_OF_VIDEOS}",
        lambda samples: _in_batches(samples, look),
    )


_OF_VIDEOS = f"of a video the mean of {VIDEO_FRAMES} frames"


def image_features(model: Any, pixel_values: Any) -> Any:
    """(n, d) of a CLIP-like model, whichever way this transformers returns them."""
    found = model.get_image_features(pixel_values=pixel_values)
    return getattr(found, "pooler_output", found)


def weights_sha256(folder: Path) -> str:
    """Over the weights and settings of a model folder, by name. Raises ValueError without any."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    if not any(p.suffix == ".safetensors" for p in files):
        raise ValueError(f"{folder}: no weights in safetensors there")
    text = "".join(f"{p.name} {file_sha256(p)}\n" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_batches(samples: np.ndarray, look: Callable[[Any], Any]) -> np.ndarray:
    """``look`` at pictures (n, 3, h, w) uint8; of videos the mean over some frames of each."""
    import torch

    if samples.ndim == 5:
        rows = np.linspace(0, samples.shape[1] - 1, VIDEO_FRAMES).round().astype(int)
        flat = samples[:, rows].reshape(-1, *samples.shape[2:])
        return _in_batches(flat, look).reshape(len(samples), VIDEO_FRAMES, -1).mean(1)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(samples), BATCH):
            x = torch.from_numpy(np.ascontiguousarray(samples[start : start + BATCH]))
            parts.append(look(x.permute(0, 3, 1, 2)).float().cpu().numpy())
    return np.concatenate(parts)
