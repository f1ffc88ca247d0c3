"""Frames as PNG or MP4 bytes, each carrying the record of how it was made; and reading it back.

Frames are uint8 arrays (height, width, channels) for a picture and (frames, height, width,
channels) for a video. Sameness of frames is `frames_sha256`: shape, type and bytes; PNG keeps them
exactly, MP4 is lossy and only carries them.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PNG_KEY = "accel"
_CODECS = ("libx264", "libopenh264", "mpeg4")  # first one the installed PyAV can encode with


def frames_sha256(frames: np.ndarray) -> str:
    """SHA-256 over shape, element type and bytes of the raw frames."""
    import numpy as np

    digest = hashlib.sha256(f"{frames.shape}|{frames.dtype.str}|".encode())
    digest.update(np.ascontiguousarray(frames).tobytes())
    return digest.hexdigest()


def encode_png(frames: np.ndarray, record: dict[str, Any] | None) -> bytes:
    """Encode one picture (h, w, 1 | 3 | 4); `record` goes into an iTXt chunk."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if record is not None:
        info.add_itxt(PNG_KEY, json.dumps(record, sort_keys=True, ensure_ascii=False))
    picture = Image.fromarray(frames.squeeze(-1) if frames.shape[-1] == 1 else frames)
    target = io.BytesIO()
    picture.save(target, format="PNG", pnginfo=info)
    return target.getvalue()


def encode_mp4(frames: np.ndarray, fps: int, record: dict[str, Any] | None) -> bytes:
    """Encode a video (f, h, w, 3); `record` goes into the comment tag.

    Odd sides are padded by one row or column, as yuv420p demands even ones.
    Raises ModuleNotFoundError naming the remedy when PyAV is not installed.
    """
    import numpy as np

    av = _pyav()
    if frames.shape[-1] == 1:
        frames = np.repeat(frames, 3, axis=-1)
    odd = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames[..., :3], odd, mode="edge")
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        if record is not None:
            container.metadata["comment"] = json.dumps(record, sort_keys=True)
        stream = container.add_stream(_codec(av), rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14"} if stream.codec.name == "libx264" else {}
        stream.bit_rate = 0 if stream.codec.name == "libx264" else 8_000_000
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target.getvalue()


def encode_raw(frames: np.ndarray) -> bytes:
    """Frames of any shape exactly, as the array `frames` of an .npz file."""
    import numpy as np

    target = io.BytesIO()
    np.savez_compressed(target, frames=frames)
    return target.getvalue()


def embedded_record(path: Path) -> dict[str, Any] | None:
    """The record inside a PNG or MP4; None when it carries none or cannot be read."""
    try:
        text = _png_text(path) if path.suffix == ".png" else _mp4_comment(path)
        record = json.loads(text) if text else None
    except (OSError, ValueError, SyntaxError, RecursionError, ImportError):
        return None
    return record if isinstance(record, dict) else None


def decode_png(path: Path) -> np.ndarray:
    """Frames of a PNG written by `encode_png`: uint8 (h, w, c)."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        frames = np.asarray(picture)
    return frames[..., None] if frames.ndim == 2 else frames


def decode_mp4(path: Path) -> np.ndarray:
    """Frames of an MP4: uint8 (f, h, w, 3). ModuleNotFoundError as `encode_mp4`."""
    import numpy as np

    with _pyav().open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def decode_raw(path: Path) -> np.ndarray:
    """What `encode_raw` wrote. Never unpickles."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return arrays["frames"]


def _png_text(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return getattr(picture, "text", {}).get(PNG_KEY)
    except Image.DecompressionBombError:
        return None


def _mp4_comment(path: Path) -> str | None:
    av = _pyav()
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment")
    except av.error.FFmpegError:
        return None


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing or reading mp4 needs PyAV; install it with: pip install -e '.[video]'"
        ) from None
    return av


def _codec(av: Any) -> str:
    for name in _CODECS:
        try:
            av.codec.Codec(name, "w")
        except av.error.FFmpegError:
            continue
        return name
    raise RuntimeError(f"this PyAV has none of the encoders {', '.join(_CODECS)}")
