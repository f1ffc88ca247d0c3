"""Embedded models: small real diffusers pipelines, trained here on DigitWorld.

`path("digits-dit")` is a stock diffusers folder; `DiffusionPipeline.from_pretrained` loads it.
"""

from pathlib import Path

_MARKERS = ("model_index.json", "config.json")  # a pipeline, or a single model


def names() -> tuple[str, ...]:
    """Names of the models that are shipped, sorted."""
    here = Path(__file__).parent
    return tuple(
        sorted(p.name for p in here.iterdir() if any((p / marker).is_file() for marker in _MARKERS))
    )


def path(name: str) -> Path:
    """Folder of a shipped model. Raises ValueError, with the known names, for any other."""
    if name not in names():
        known = ", ".join(names()) or "none is shipped"
        raise ValueError(f"zoo.path: no embedded model {name!r}; known: {known}")
    return Path(__file__).parent / name
