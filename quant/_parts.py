"""Finished parts of a calibration on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
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

# what another run over a folder may change: it has nothing to do with the weights
NOT_WEIGHTS = ("activations", "groups", "only_faster")


class Parts:
    """A folder of one calibration; ``conditions``: plain JSON, all that its weights depend on."""

    def __init__(self, path: Path, settings: dict[str, Any], conditions: dict[str, Any]) -> None:
        self.path = path
        weights_only = {k: v for k, v in settings.items() if k not in NOT_WEIGHTS}
        require_same_work(path / "calibration.json", conditions | weights_only, "calibration")

    def _file(self, slot: str, unit: str) -> Path:
        return self.path / f"{slot}.{unit}.safetensors"

    def load(self, slot: str, unit: str) -> dict[str, Tensor] | None:
        """``None`` if the part is not done, or its file was damaged: then it is done again."""
        file = self._file(slot, unit)
        try:
            return load_file(file) if file.is_file() else None
        except SafetensorError:
            return None

    def save(self, slot: str, unit: str, tensors: dict[str, Tensor]) -> None:
        held = {k: v.detach().contiguous() for k, v in tensors.items()}
        write_atomically(self._file(slot, unit), save(held))


def conditions(pipe: Any, inputs: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """What weights in few bits depend on beside the settings, as plain JSON."""
    models = {d.slot: asdict(Fingerprint.of(d.module)) for d in denoisers(pipe)}
    text = json.dumps(models, sort_keys=True)
    return {
        "inputs": inputs_digest(inputs),
        "model": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": recipe.digest(),
    }
