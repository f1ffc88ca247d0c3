"""The referee of the embedded models: was the digit made that the call asked for?

It judges by what the pipeline call says, a class or a caption, with a shipped judge that no method,
training or calibration has used ("digits-judge-b"), and knows real samples of the same content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from accel.measure import Inputs, Referee, Verdict

NAME = "digits-judge-b"
STEPS, SAMPLES, CALL, VIDEOS = 50, 40, 10, 8  # of the standard inputs; CALL: samples in a call
STRIDE = 37  # prime to 100: goes round all classes before any comes twice
CLASSES = 100  # of digits-dit; its other label is "no class"
VIDEO_FRAMES = 17  # where a call does not say `num_frames`; what digits-wan makes


def digits_referee(inputs: Inputs, name: str = NAME) -> Referee | None:
    """The shipped judge ``name`` as a referee; ``None`` if ``inputs`` ask for nothing it knows.

    Raises:
        ValueError: no judge of that name is shipped.
    """
    from accel import zoo
    from accel.measure import Referee
    from accel.metrics.protocol import file_sha256
    from accel.zoo.judge import judge

    if not asked(inputs):
        return None
    sha256 = file_sha256(zoo.path(name) / "model.safetensors")
    model = judge(name)
    return Referee(
        name=name,
        sha256=sha256,
        judge=lambda samples, given: _verdict(model, samples, asked(given)),
        real=lambda given, draw: model.features_of(real_samples(given, draw)),
    )


def standard_inputs(pipe: Any) -> list[dict[str, Any]]:
    """Pipeline calls that go round what an embedded model can be asked for, for a quick measure.

    Raises:
        ValueError: a pipeline of a class that the zoo does not have.
    """
    kind = type(pipe).__name__
    return zoo_inputs(kind, VIDEOS if kind == "WanPipeline" else SAMPLES)


def zoo_inputs(kind: str, samples: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """Calls of a pipeline class for ``samples`` samples: all classes once before any comes twice.

    Pictures are made ``CALL`` in a call, videos one by one.

    Raises:
        ValueError: a class that the zoo does not have.
    """
    from accel.zoo.world import caption

    classes = [i * STRIDE % CLASSES for i in range(samples)]
    rows = [list(enumerate(classes))[i : i + CALL] for i in range(0, samples, CALL)]
    more = {"num_inference_steps": steps}
    if kind == "DiTPipeline":
        calls = [{"class_labels": [c for _, c in row], "guidance_scale": 3.0} for row in rows]
    elif kind in ("DDPMPipeline", "DDIMPipeline"):
        calls = [{"batch_size": len(row)} for row in rows]
    elif kind == "StableDiffusionPipeline":
        calls = [
            {"prompt": [caption(c % 10, c // 10, (c + i // CLASSES) % 5) for i, c in row]}
            for row in rows
        ]
    elif kind == "WanPipeline":
        size = {"height": 64, "width": 64, "num_frames": VIDEO_FRAMES}
        said = [
            caption(c % 10, c // 10, c % 5, (c + i // CLASSES) % 4) for i, c in enumerate(classes)
        ]
        calls = [{"prompt": prompt, **size} for prompt in said]
    else:
        raise ValueError(f"no calls are known for a {kind}; give some with --jobs FILE")
    return [{**call, **more} for call in calls]


def asked(inputs: Inputs) -> dict[str, np.ndarray]:
    """What each sample of some pipeline calls should show: index (n,) by attribute.

    From ``class_labels`` (digit + 10 x colour) or the words of ``prompt``; an attribute that not
    every sample names is left out.
    """
    samples = [x for call in inputs for x in _samples_asked(call)]
    names = set.intersection(*(set(s) for s in samples)) if samples else set()
    return {k: np.array([s[k] for s in samples]) for k in sorted(names)}


def _samples_asked(call: dict[str, Any]) -> list[dict[str, int]]:
    from accel.zoo.world import named

    if "class_labels" in call:
        labels = call["class_labels"]
        return [{"digit": c % 10, "colour": c // 10} if c < CLASSES else {} for c in labels]
    prompts = call.get("prompt", [])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    copies = call.get("num_images_per_prompt", call.get("num_videos_per_prompt", 1))
    return [named(prompt) for prompt in prompts for _ in range(copies)]


def real_samples(inputs: Inputs, draw: int) -> np.ndarray:
    """Real held-out samples with the asked content, uint8: (n, 32, 32, 3) or (n, f, 64, 64, 3).

    Of calls that ask for nothing: as many of the plain world, which digits-ddpm was trained on.
    """
    from accel.zoo.world import VIDEO_CANVAS, DigitWorld

    what = asked(inputs)
    if not what:
        return _unasked_samples(inputs, draw)
    classes = what["digit"] + 10 * what["colour"]
    rows, grounds = np.arange(len(classes)), what.get("background")
    if "motion" not in what:
        return DigitWorld("heldout", seed=draw).batch(rows, classes, grounds)[0]
    frames = inputs[0].get("num_frames", VIDEO_FRAMES)
    world = DigitWorld("heldout", seed=draw, canvas=VIDEO_CANVAS)
    return world.videos(rows, classes, grounds, what["motion"], frames)[0]


def _unasked_samples(inputs: Inputs, draw: int) -> np.ndarray:
    from accel.zoo.world import DigitWorld

    count = sum(call.get("batch_size", 1) for call in inputs)
    rows = np.arange(count)
    return DigitWorld("heldout", seed=draw, plain=True).batch(rows, rows * STRIDE % CLASSES)[0]


def _verdict(model: Any, samples: np.ndarray, what: dict[str, np.ndarray]) -> Verdict:
    from accel.measure import Verdict

    answers = model.video_answers(samples) if samples.ndim == 5 else model.answers(samples)
    right = np.logical_and.reduce([answers[k] == v for k, v in what.items() if k in answers])
    return Verdict(right, model.features_of(samples))
