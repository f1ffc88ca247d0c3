"""Finished parts of a calibration on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from accel.artifact import Fingerprint, inputs_digest
from accel.denoiser import denoisers
from accel.files import write_atomically
from accel.method import Recipe
from accel.resuming import require_same_work

# what another run over a folder may change where all layers are rounded: nothing to the weights
NOT_WEIGHTS = ("activations", "groups")


def of_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a calibration that its weights depend on. Where layers that are slower in
    integers stay whole, parts behind them depend on how activations are quantised, too."""
    left = () if settings["only_faster"] else NOT_WEIGHTS
    return {k: v for k, v in settings.items() if k not in left}


class Parts:
    """A folder of one calibration; ``conditions``: plain JSON, all that its parts depend on."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path = path
        require_same_work(path / "calibration.json", conditions, "calibration")

    def _file(self, slot: str, unit: str) -> Path:
        return self.path / f"{slot}.{unit}.safetensors"

    def load(self, slot: str, unit: str, names: Collection[str]) -> dict[str, Tensor] | None:
        """Tensors of these names; ``None`` if the part is not done, or its file has others or was
        damaged: then it is done again."""
        file = self._file(slot, unit)
        try:
            found = load_file(file) if file.is_file() else {}
        except SafetensorError:
            return None
        return found if found.keys() == set(names) else None

    def save(self, slot: str, unit: str, tensors: dict[str, Tensor]) -> None:
        held = {k: v.detach().contiguous() for k, v in tensors.items()}
        write_atomically(self._file(slot, unit), save(held))


def conditions(pipe: Any, inputs: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """What weights in few bits depend on beside the settings, as plain JSON."""
    models = {d.slot: asdict(Fingerprint.of(d.module)) for d in denoisers(pipe)}
    given = getattr(pipe.scheduler, "config", {}).items()
    config = {k: v for k, v in given if not k.startswith("_")}
    scheduler = {"class": type(pipe.scheduler).__name__, "config": config}
    return {
        "inputs": inputs_digest(inputs),
        "model": _digest(models),
        "scheduler": _digest(scheduler),
        "recipe": recipe.digest(),
    }


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()
