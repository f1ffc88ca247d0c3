"""A search that can be killed at any moment and goes on where it was.

Algorithms are pure functions of the scores they see, so nothing of them is stored: a resumed search
runs its algorithm again from the start, and every unit of work (one batch) that is in the journal
is read instead of computed. One line a unit, flushed to the disk, after the states it ends in; a
unit cut off by a kill is done again whole, so that batches, and with them the last bits, stay the
same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.search.leg import State

FORMAT = 1
LINES = "journal.jsonl"


class Journal:
    """Units by name. ``head`` says what is searched; a journal of something else is refused.

    Raises:
        ValueError: the folder holds the journal of another search, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str], head: dict[str, Any]) -> None:
        self.folder = File(folder)
        self.units: dict[str, dict[str, Any]] = {}
        self.resumed = False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LINES
        head = json.loads(json.dumps({"format": FORMAT, **head}))
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        whole = lines[:-1]  # what follows the last line end was being written
        if whole:
            self._read(whole, head)
            if lines[-1]:
                with path.open("r+b") as file:
                    file.truncate(sum(len(x) + 1 for x in whole))
        self._places = self._find_states()
        self._file = path.open("ab" if whole else "wb")
        if not whole:
            self._append(head)

    def _read(self, lines: list[bytes], head: dict[str, Any]) -> None:
        try:
            found = [json.loads(x) for x in lines]
            different = sorted(k for k in {*head, *found[0]} if head.get(k) != found[0].get(k))
            self.units = {row["unit"]: row for row in found[1:]}
        except (ValueError, AttributeError, LookupError, TypeError):
            raise ValueError(f"{self.folder / LINES} is damaged; remove the folder") from None
        if different:
            raise ValueError(
                f"{self.folder} holds the journal of another search (other {different[0]}); "
                "give another folder, or remove it"
            )
        self.resumed = bool(self.units)

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def get(self, unit: str) -> dict[str, Any] | None:
        """What was found in a unit; ``None`` if it was not finished."""
        return self.units.get(unit)

    def put(self, unit: str, row: dict[str, Any]) -> None:
        """A unit is finished."""
        self.units[unit] = {"unit": unit, **row}
        self._append(self.units[unit])

    def close(self) -> None:
        self._file.close()

    # -- beside the lines --------------------------------------------------------------------

    def keep_pictures(self, unit: str, pictures: np.ndarray) -> None:
        """uint8 (n, h, w, c)."""
        target = self.folder / "pictures" / f"{unit}.npy"
        target.parent.mkdir(exist_ok=True)
        with (temporary := target.with_suffix(".tmp")).open("wb") as file:
            np.save(file, pictures)
        temporary.replace(target)

    def pictures(self, unit: str) -> np.ndarray | None:
        """``None`` where none were kept, or the disk lost them: they are not forced to it."""
        path = self.folder / "pictures" / f"{unit}.npy"
        try:
            return np.load(path, allow_pickle=False) if path.is_file() else None
        except (EOFError, ValueError):
            return None

    def keep_states(
        self, number: int, unit: str, states: dict[str, tuple[State, Tensor | None]]
    ) -> None:
        """States that a unit of an input ends in, by name; each with what is predicted there, if
        that is known.

        One file, not forced to the disk: one that is lost or cut off is computed again. They count
        once the unit is in the journal: else the unit would cost less the second time.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        heads = {}
        for name, (state, seen) in states.items():
            parts = {"sample": state.sample, "clean": state.clean, "gained": state.gained}
            parts["seen"] = seen
            own = {k: v for k, v in parts.items() if v is not None}
            heads[name] = {"step": state.step, "solver": _flatten(state.solver, "solver", own)}
            tensors |= {f"{name}/{k}": v for k, v in own.items()}
        folder = self.folder / "states" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{unit}.safetensors"
        data = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        temporary = target.with_suffix(".tmp")
        # not save_file, which says of a full disk that it cannot serialise
        temporary.write_bytes(save(data, metadata={"states": json.dumps(heads)}))
        temporary.replace(target)
        self._places |= dict.fromkeys(states, target)

    def state(self, name: str, device: Any) -> tuple[State, Tensor | None] | None:
        """What ``keep_states`` kept; ``None`` if it did not."""
        from safetensors import SafetensorError, safe_open

        path = self._places.get(name)
        if path is None:
            return None
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                head = json.loads(file.metadata()["states"])[name]
                prefix = f"{name}/"
                own = [k for k in file.keys() if k.startswith(prefix)]  # noqa: SIM118
                tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in own}
        except (OSError, SafetensorError):
            return None
        solver = _build(head["solver"], tensors)
        own = (tensors.get(k) for k in ("sample", "clean", "gained"))
        sample, clean, gained = own
        state = State(head["step"], sample, clean, solver, gained)  # type: ignore[arg-type]
        return state, tensors.get("seen")

    def _find_states(self) -> dict[str, File]:
        """Which file holds each state of the units that were finished."""
        from safetensors import SafetensorError, safe_open

        places: dict[str, File] = {}
        for path in sorted((self.folder / "states").glob("*/*.safetensors")):
            if path.stem not in self.units:
                continue
            try:
                with safe_open(path, "pt") as file:
                    places |= dict.fromkeys(json.loads(file.metadata()["states"]), path)
            except (OSError, SafetensorError):
                continue
        return places

    def forget_states(self, number: int) -> None:
        """An input is done: its states are not wanted again. Those of a later one may be there."""
        own = self.folder / "states" / str(number)
        shutil.rmtree(own, ignore_errors=True)
        self._places = {n: p for n, p in self._places.items() if p.parent != own}
        with contextlib.suppress(OSError):  # others are left
            own.parent.rmdir()


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a solver's state, with tensors moved into ``tensors`` under their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {k: _flatten(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list):
        return {"list": [_flatten(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, np.generic):
        value = value.item()
    return {"value": value}


def _build(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    kind, value = next(iter(tree.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _build(v, tensors) for k, v in value.items()}
    if kind == "list":
        return [_build(v, tensors) for v in value]
    return value
