"""What each embedded pipeline is asked, and how its samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from accel import zoo
from accel.loading import quiet_loading
from accel.zoo.world import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    MOTIONS,
    VIDEO_CANVAS,
    VIDEO_FRAMES,
    Attributes,
    DigitWorld,
)

CLASSES = len(DIGITS) * len(COLOURS)
STRIDE = 617  # prime: visits every combination of attributes once before any of them twice


@dataclass(frozen=True)
class Subject:
    """One pipeline: the attributes it is asked for, its guidances, and how many samples it draws.

    The first guidance is the one that sheets and distances use. also: other pipelines that the
    folder loads as, whose samples are judged beside those of `pipeline`.
    """

    name: str
    asked: tuple[str, ...]
    guidances: tuple[float, ...] = (1.0,)
    samples: int = 1000
    batch: int = 50
    frames: int = 1
    pipeline: str = "DiffusionPipeline"
    also: tuple[str, ...] = ()
    about: str = ""
    example: str = ""
    note: str = ""
    plain: bool = False  # its world: `DigitWorld(plain=True)`

    @property
    def is_video(self) -> bool:
        return self.frames > 1

    def load(self) -> Any:
        """The shipped pipeline through stock diffusers, in float32."""
        kind = getattr(diffusers, self.pipeline)
        with quiet_loading():
            pipe = kind.from_pretrained(zoo.path(self.name), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def real(self, count: int, seed: int, split: str = "heldout") -> tuple[np.ndarray, Attributes]:
        """Real pictures (n, 32, 32, 3) or videos (n, f, 64, 64, 3), and what they show.

        The combinations of attributes go round in an order that covers all of them evenly.
        """
        order = (np.arange(count) * STRIDE) % (CLASSES * len(BACKGROUNDS) * len(MOTIONS))
        classes, rest = order % CLASSES, order // CLASSES
        grounds, motions = rest % len(BACKGROUNDS), rest // len(BACKGROUNDS)
        rows = np.arange(count)
        if self.is_video:
            world = DigitWorld(split, seed, VIDEO_CANVAS)
            return world.videos(rows, classes, grounds, motions, self.frames)
        return DigitWorld(split, seed, plain=self.plain).batch(rows, classes, grounds)

    def generate(
        self, pipe: Any, what: Attributes, guidance: float, steps: int, seed: int
    ) -> np.ndarray:
        """Samples that are asked for `what`, uint8 like `real`.

        One generator per sample: sample i depends on (seed, i) only.
        """
        parts = self.parts(len(what.digit))
        return np.concatenate([self.part(pipe, what, p, guidance, steps, seed) for p in parts])

    def parts(self, count: int) -> list[np.ndarray]:
        """The rows of each batch."""
        starts = range(0, count, self.batch)
        return [np.arange(start, min(start + self.batch, count)) for start in starts]

    def part(
        self, pipe: Any, what: Attributes, rows: np.ndarray, guidance: float, steps: int, seed: int
    ) -> np.ndarray:
        """Those of one batch."""
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + int(i)) for i in rows]
        call = self._call(what, rows, guidance)
        output = pipe(**call, num_inference_steps=steps, generator=generators, output_type="np")[0]
        return np.round(np.asarray(output) * 255).astype(np.uint8)

    def _call(self, what: Attributes, rows: np.ndarray, guidance: float) -> dict[str, Any]:
        if not self.asked:
            return {"batch_size": len(rows)}
        if self.name == "digits-dit":
            return {"class_labels": what.class_id[rows].tolist(), "guidance_scale": guidance}
        captions = what.captions()
        call = {"prompt": [captions[i] for i in rows], "guidance_scale": guidance}
        if self.is_video:
            call |= {"height": VIDEO_CANVAS, "width": VIDEO_CANVAS, "num_frames": self.frames}
        return call


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "digits-ddpm",
            asked=(),
            pipeline="DDIMPipeline",
            also=("DDPMPipeline",),
            about="An unconditional diffusion model in pixel space",
            note="Its world is the plain one: digits of one size, in the middle of a background "
            "without texture. The folder names DDPMPipeline, which draws new noise at every step; "
            "DDIMPipeline draws none, so that samples with and without a method are pairs.",
            plain=True,
            example='pipe = diffusers.DDIMPipeline.from_pretrained(zoo.path("digits-ddpm"))\n'
            "images = pipe(batch_size=4, num_inference_steps=50).images",
        ),
        Subject(
            "digits-dit",
            asked=("digit", "colour"),
            guidances=(4.0, 1.0, 1.5, 2.0),
            pipeline="DiTPipeline",
            about="A class-conditional latent diffusion transformer",
            note=f"Class = digit + 10 x colour ({', '.join(COLOURS)}); 1000 is no class.",
            example='pipe = diffusers.DiTPipeline.from_pretrained(zoo.path("digits-dit"))\n'
            'labels = pipe.get_label_ids(["red three"])\n'
            "image = pipe(labels, guidance_scale=4.0, num_inference_steps=50).images[0]",
        ),
        Subject(
            "digits-sd",
            asked=("digit", "colour", "background"),
            guidances=(4.0, 1.0, 2.0, 7.5),
            pipeline="StableDiffusionPipeline",
            about="Text to image, latent diffusion with a UNet",
            example='folder = zoo.path("digits-sd")\n'
            "pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)\n"
            'image = pipe("a red three on a dark background", guidance_scale=4.0).images[0]',
        ),
        Subject(
            "digits-wan",
            asked=("digit", "colour", "background", "motion"),
            guidances=(4.0,),
            samples=200,
            batch=4,
            frames=VIDEO_FRAMES,
            pipeline="WanPipeline",
            about="Text to video, a latent flow transformer on 1,280 video tokens",
            example='pipe = diffusers.WanPipeline.from_pretrained(zoo.path("digits-wan"))\n'
            'prompt = "a red three moving left on a dark background"\n'
            "call = dict(height=64, width=64, num_frames=17, guidance_scale=4.0)\n"
            "video = pipe(prompt, **call).frames[0]",
        ),
    )
}
