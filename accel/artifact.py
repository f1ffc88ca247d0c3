"""Calibration results on disk: one safetensors file with a JSON header, tied to its model.

The header says which method wrote it, for which model (a fingerprint that survives half precision
and LoRA), sampling grid, guidance and inputs, and with which versions. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accel.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
HEADER_KEY = "accel"

# bf16 keeps 8 significant bits, so a rounded copy differs by at most 2^-9 relative; 2^-7 leaves
# room for two roundings (fp32 -> bf16 -> fp16) and none for another training run.
WEIGHT_TOLERANCE = 2.0**-7
# Below the smallest normal fp16 number (2^-14) a half-precision copy has absolute error 2^-25.
WEIGHT_FLOOR = 2.0**-24
SAMPLED_PARAMETERS = 16
SAMPLED_VALUES = 8


@dataclass(frozen=True)
class ArtifactRef:
    """Where an artifact lies and what it must contain (SHA-256 of the file)."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> ArtifactRef:
        """The file as it is now. Raises ``FileNotFoundError``."""
        return cls(str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ArtifactRef:
        """``{"path": ..., "sha256": ...}``. Raises ``ValueError`` for anything else."""
        good = set(value) == {"path", "sha256"} and all(isinstance(v, str) for v in value.values())
        if not good:
            raise ValueError(f"an artifact is {{path, sha256}}, both strings; got {dict(value)!r}")
        return cls(value["path"], value["sha256"])


@dataclass(frozen=True)
class Fingerprint:
    """What a network is: class, configuration, and a few of its weights."""

    model_class: str
    config_sha256: str
    weights: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any) -> Fingerprint:
        """Of a model of diffusers or transformers, or any module; before or after LoRA (adapter
        weights are looked through)."""
        config = getattr(module, "config", {})
        if not isinstance(config, Mapping):
            config = config.to_dict() if hasattr(config, "to_dict") else {}
        config = {k: v for k, v in config.items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        return cls(
            type(module).__name__,
            hashlib.sha256(text.encode()).hexdigest(),
            _sample_weights(module),
        )

    def digest(self) -> str:
        """SHA-256 of all of it; another one in another precision."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    def mismatch(self, other: Fingerprint, match: Literal["architecture", "weights"]) -> str | None:
        """Why ``other`` is not this model, in words, or ``None``."""
        if self.model_class != other.model_class:
            return f"it is for {self.model_class}, this is {other.model_class}"
        if self.config_sha256 != other.config_sha256:
            return f"it is for a {self.model_class} of another configuration"
        if match == "architecture":
            return None
        if not self.weights:
            return "it was made where none of the model's weights could be read"
        for name, values in self.weights.items():
            if name not in other.weights:
                return f"this model has no floating-point parameter {name!r} (quantised?)"
            for (i, a), (_, b) in zip(values, other.weights[name], strict=True):
                near = abs(a - b) <= WEIGHT_TOLERANCE * max(abs(a), abs(b)) + WEIGHT_FLOOR
                if not near:  # as is what is no number
                    return f"weight {name}[{i}] is {b:.6g}, not {a:.6g}"
        return None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fingerprint:
        """Of ``asdict``. Raises ``ValueError`` for anything else."""
        try:
            weights = {k: [(int(i), float(x)) for i, x in v] for k, v in value["weights"].items()}
            return cls(value["model_class"], value["config_sha256"], weights)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"a fingerprint cannot be {value!r:.100}") from error


def fingerprints(pipe: Any) -> dict[str, Any]:
    """``fingerprint`` and ``others`` of an artifact that is for all denoisers of ``pipe``."""
    from accel.denoiser import denoisers

    first, *rest = denoisers(pipe)
    others = {denoiser.slot: Fingerprint.of(denoiser.module) for denoiser in rest}
    return {"fingerprint": Fingerprint.of(first.module), "others": others}


def _sample_weights(module: Any) -> dict[str, list[tuple[int, float]]]:
    from torch import nn

    from accel.compat import at_rest
    from accel.patch import values_of

    parameters = {
        name.replace(".base_layer.", "."): (name, p)
        for name, p in module.named_parameters()
        if "lora_" not in name and p.is_floating_point() and p.numel()
        if type(p) is nn.Parameter  # torchao's say that they are floating-point, and are not
    }
    names = sorted(parameters)
    stride = max(1, len(names) // SAMPLED_PARAMETERS)
    sampled = {}
    for name in names[::stride]:
        own, parameter = parameters[name]
        held = values_of(parameter) if parameter.device.type != "meta" else at_rest(module, own)
        if held is None:
            continue
        flat = held.detach().flatten()
        places = sorted({k * flat.numel() // SAMPLED_VALUES for k in range(SAMPLED_VALUES)})
        sampled[name] = list(zip(places, flat[places].tolist(), strict=True))  # one read
    return sampled


@dataclass
class Artifact:
    """Tensors with the conditions under which they hold.

    ``fingerprint`` of the pipeline's first denoiser, ``others`` of further ones by component name.
    ``match``: "architecture" for schedules (fine-tunes welcome), "weights" for tables tied to
    weights. ``grid``: the sampler's noise levels, high to low. ``guidance``: whether it was made
    with guidance; None if it is not known. ``inputs_sha256``: of the calibration inputs.
    """

    method: str
    fingerprint: Fingerprint
    tensors: dict[str, Tensor]
    match: Literal["architecture", "weights"] = "weights"
    grid: tuple[float, ...] = ()
    guidance: bool | None = None
    inputs_sha256: str = ""
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    others: dict[str, Fingerprint] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> ArtifactRef:
        """Write atomically (temporary name, fsync, rename); returns the reference to it."""
        from safetensors.torch import save

        target = Path(path)
        apart = ("tensors", "fingerprint", "others")
        header = {k: v for k, v in vars(self).items() if k not in apart}
        header |= {"format": FORMAT, "fingerprint": asdict(self.fingerprint)}
        if self.others:
            header["others"] = {slot: asdict(other) for slot, other in self.others.items()}
        header["versions"] = self.versions or versions()
        data = save(
            {k: v.contiguous().cpu() for k, v in self.tensors.items()},
            metadata={HEADER_KEY: json.dumps(header, sort_keys=True)},
        )
        write_atomically(target, data)
        return ArtifactRef(str(target), hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, ref: ArtifactRef | str | os.PathLike[str]) -> Artifact:
        """Read an artifact; a reference is checked against its SHA-256.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: other content than the reference says, or not an artifact.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = Path(ref.path if isinstance(ref, ArtifactRef) else ref)
        data = path.read_bytes()
        if isinstance(ref, ArtifactRef):
            found = hashlib.sha256(data).hexdigest()
            if found != ref.sha256:
                raise ValueError(f"{path}: SHA-256 is {found[:12]}…, expected {ref.sha256[:12]}…")
        try:
            header = _read_header(data)
            if header.pop("format", None) != FORMAT:
                raise ValueError("it was written by another major version of accel")
            fingerprint = Fingerprint.from_json(header.pop("fingerprint"))
            others = header.pop("others", {})
            others = {slot: Fingerprint.from_json(value) for slot, value in others.items()}
            header["grid"] = tuple(header["grid"])
            if header.get("match", "weights") not in ("architecture", "weights"):
                raise ValueError(f"its match is {header['match']!r:.40}")
            if not isinstance(header.get("settings", {}), dict):
                raise ValueError("its settings are no mapping")
            return cls(fingerprint=fingerprint, tensors=load(data), others=others, **header)
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an accel artifact: {error}") from error

    def check_method(self, method: str) -> None:
        """Raises ``ValueError`` if this artifact is not for the method of this name."""
        if self.method != method:
            raise ValueError(f"the artifact is for {self.method}, not for {method}")

    def check_model(self, module: Any) -> None:
        """Raises ``ValueError`` saying why this artifact is not for ``module``."""
        self._check(self.fingerprint.mismatch(Fingerprint.of(module), self.match))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ``ValueError`` saying why this artifact is not for the denoisers of ``pipe``.

        One that it has no fingerprint of has to be built as the first is.
        """
        from accel.denoiser import denoisers

        first, *rest = denoisers(pipe)
        self.check_model(first.module)
        for denoiser in rest:
            found, known = Fingerprint.of(denoiser.module), self.others.get(denoiser.slot)
            if known is None:
                reason = self.fingerprint.mismatch(found, "architecture")
            else:
                reason = known.mismatch(found, self.match)
            self._check(reason and f"{denoiser.slot}: {reason}")

    def _check(self, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(f"artifact of {self.method} does not fit: {reason}; calibrate again")


def _read_header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError("truncated")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if HEADER_KEY not in metadata:
        raise ValueError("it has no accel header")
    return json.loads(metadata[HEADER_KEY])


def inputs_digest(inputs: list[dict[str, Any]]) -> str:
    """SHA-256 of pipeline-call arguments. Raises ``ValueError`` for others than JSON values."""
    try:
        text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    except TypeError:
        other = {k: type(v).__name__ for x in inputs for k, v in x.items() if not _is_json(v)}
        raise ValueError(f"inputs with {other}: JSON values only, which can be named") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except TypeError:
        return False
    return True


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("accel", "torch", "diffusers", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
