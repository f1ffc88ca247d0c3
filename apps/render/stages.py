"""The stages of a render: encode -> denoise -> save latents -> decode -> write.

A pipeline call is cut in two at its autoencoder. During `denoise`, `vae.decode` is replaced by a
stand-in that keeps its arguments and returns a test card; `decode` later calls the real one with
the arguments from disk. The test card proves the cut: whatever the pipeline does after decoding it
also does to the card, so if the card comes out as our own `postprocess` makes it, our postprocess
is the pipeline's. If not (a safety checker, a watermark, a crop), the pipeline decodes in flight as
it always does and the finished frames are kept instead. Needs no knowledge of pipeline classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from accel.patch import Patch
from apps.render.faults import InvalidJob
from apps.render.latents import Latents

_CARD = 8  # smallest side of the test card in pixels
_NEED_PIXELS = ("safety_checker", "watermark")  # components that look at decoded frames


class Uncut(Exception):
    """This pipeline does more after its autoencoder than we can do in its place."""


def check_inputs(pipe: Any, inputs: dict[str, Any]) -> None:
    """InvalidJob when the pipeline's call takes no such argument, or lacks one it needs."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    known = [name for name in parameters if name != "self"]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in inputs:
        if name not in parameters:
            raise InvalidJob(
                f"{type(pipe).__name__} takes no argument {name!r}; it takes {', '.join(known)}"
            )
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and name != "self"
        if needed and name not in inputs:
            raise InvalidJob(f"{type(pipe).__name__} needs the argument {name!r}")


def sample_count(inputs: dict[str, Any]) -> int:
    """How many pictures or videos one call with `inputs` makes."""
    per_prompt = inputs.get("num_images_per_prompt") or inputs.get("num_videos_per_prompt") or 1
    for key in ("prompt", "class_labels", "prompt_embeds"):
        if isinstance(inputs.get(key), (list, torch.Tensor)):
            return len(inputs[key]) * per_prompt
    return int(inputs.get("batch_size") or 1) * per_prompt


def generators(seed: int, count: int) -> Any:
    """One CPU generator per sample, seeds counted up from `seed`; a single one comes bare."""
    made = [torch.Generator("cpu").manual_seed(seed + index) for index in range(count)]
    return made[0] if count == 1 else made


def denoise(pipe: Any, arguments: dict[str, Any], *, cut: bool = True) -> Latents:
    """Run `pipe(**arguments)` up to its autoencoder. With `cut=False` decode in flight.

    Raises Uncut when the test card did not come back as expected; then call again uncut.
    """
    call = {**arguments, **_array_output(pipe)}
    if not cut or not is_cuttable(pipe):
        return _frames(pipe(**call))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    cards: list[torch.Tensor] = []

    def stand_in(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        cards.append(test_card(pipe, _latents(args, kwargs)))
        return (cards[-1],) if kwargs.get("return_dict") is False else _decoder_output(cards[-1])

    patch = Patch()
    patch.around(pipe.vae, "decode", stand_in)
    try:
        output = pipe(**call)
    finally:
        patch.undo()
    if not seen:
        return _frames(output)
    if len(seen) > 1:
        raise Uncut(f"{type(pipe).__name__} calls its autoencoder {len(seen)} times")
    came_back = _as_array(output[0])
    if not _equal(came_back, postprocess(pipe, cards[0])):
        raise Uncut(f"{type(pipe).__name__} changes the decoded frames before it returns them")
    args, kwargs = seen[0]
    return Latents("decode", args, kwargs)


@torch.no_grad()
def decode(pipe: Any, latents: Latents) -> np.ndarray:
    """Float frames in [0, 1]: (samples, h, w, c), or (samples, frames, h, w, c) for video."""
    if latents.mode == "frames":
        return latents.args[0].cpu().numpy()
    vae = pipe.vae
    tensor = _latents(latents.args, latents.kwargs)
    own_type = vae.dtype
    try:
        if tensor.is_floating_point() and tensor.dtype != own_type:
            vae.to(dtype=tensor.dtype)  # as pipelines that upcast their autoencoder do
        decoded = vae.decode(*latents.args, **latents.kwargs)
    finally:
        if vae.dtype != own_type:
            vae.to(dtype=own_type)
    sample = decoded[0] if isinstance(decoded, tuple) else decoded.sample
    return postprocess(pipe, sample)


def decode_tiled(pipe: Any, latents: Latents) -> np.ndarray:
    """`decode` in tiles and slices, for when the whole did not fit into memory."""
    patch = Patch()
    for name in ("use_tiling", "use_slicing"):
        if hasattr(pipe.vae, name):
            patch.swap(pipe.vae, name, True)
    try:
        return decode(pipe, latents)
    finally:
        patch.undo()


def postprocess(pipe: Any, sample: torch.Tensor) -> np.ndarray:
    """What pipelines do to decoded tensors (b, c, h, w) or (b, c, f, h, w): arrays in [0, 1]."""
    if sample.ndim == 5 and hasattr(pipe, "video_processor"):
        return _as_array(pipe.video_processor.postprocess_video(sample, output_type="np"))
    if sample.ndim == 4 and hasattr(pipe, "image_processor"):
        return _as_array(pipe.image_processor.postprocess(sample, output_type="np"))
    order = (0, 2, 3, 1) if sample.ndim == 4 else (0, 2, 3, 4, 1)
    return (sample / 2 + 0.5).clamp(0, 1).cpu().permute(*order).float().numpy()


def quantise(frames: np.ndarray) -> list[np.ndarray]:
    """Float frames in [0, 1] to one uint8 array per sample, rounded as diffusers rounds."""
    return list((frames * 255).round().astype("uint8"))


def is_cuttable(pipe: Any) -> bool:
    """Whether the pipeline has an autoencoder and nothing alive that needs its real output."""
    if not hasattr(getattr(pipe, "vae", None), "decode"):
        return False
    return all(getattr(pipe, name, None) is None for name in _NEED_PIXELS)


def test_card(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """A gradient beyond the clamp range, as large as a picture would be (small for video)."""
    channels = getattr(pipe.vae.config, "out_channels", 3)
    rows, columns = latents.shape[-2:]
    scale = int(getattr(pipe, "vae_scale_factor", _CARD)) if latents.ndim == 4 else 1
    sides = (max(rows * scale, _CARD), max(columns * scale, _CARD))
    frames = () if latents.ndim == 4 else (1,)
    shape = (latents.shape[0], channels, *frames, *sides)
    count = int(np.prod(shape))
    card = torch.linspace(-1.3, 1.3, count, dtype=torch.float32, device=latents.device)
    return card.reshape(shape).to(latents.dtype if latents.is_floating_point() else torch.float32)


test_card.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def _latents(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The latents among the arguments of a decode call: its first."""
    return args[0] if args else next(iter(kwargs.values()))


def _decoder_output(sample: torch.Tensor) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=sample)


def _array_output(pipe: Any) -> dict[str, str]:
    takes = inspect.signature(type(pipe).__call__).parameters
    return {"output_type": "np"} if "output_type" in takes else {}


def _frames(output: Any) -> Latents:
    story = {}
    if any(getattr(output, "nsfw_content_detected", None) or []):
        story["notes"] = ["the safety checker blanked a picture"]
    return Latents("frames", (torch.from_numpy(_as_array(output[0]).copy()),), {}, story)


def _as_array(frames: Any) -> np.ndarray:
    if torch.is_tensor(frames):
        order = (0, 2, 3, 1) if frames.ndim == 4 else (0, 1, 3, 4, 2)
        return frames.cpu().permute(*order).float().numpy()
    if isinstance(frames, (list, tuple)) and frames:
        return np.stack([_as_array(frame) for frame in frames])
    array = np.asarray(frames)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and bool(np.array_equal(left, right, equal_nan=True))
