"""``quant_method: "tfmq"`` for stock diffusers: save_pretrained and from_pretrained, bit for bit.

Import this module (``accel.load`` does), and diffusers knows the method:
``Model.from_pretrained(folder)`` of a folder that ``save_quantised`` wrote,
``PipelineQuantizationConfig(quant_mapping={"transformer": TFMQConfig()})`` for 8- or 4-bit weights
on the fly (rounded to the nearest, without calibration).
Without the import, diffusers says that it does not know "tfmq". Integers are what they are in the
file, 4-bit ones two to a byte; scales are stored as the bits of float32, because the loader casts
every float to the type that was asked for. A model loaded so has no weights of its own to fall back
to, so nothing looks for clipped inputs or outputs that are not finite, as ``quant.tfmq`` does.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from accel.artifact import Artifact
from accel.denoiser import denoisers
from accel.method import require_detached
from quant._layers import Bins, layer_for, quantisable
from quant._rounding import bits_of, nearest, pack4, searched_scale
from quant._stored import bins_of, check_fits, layers_of, quantised, refuse_adapters

NAME = "tfmq"
BINS = "timestep_groups"  # the submodule that knows which group of timesteps is being computed


class QuantizationMethod(StrEnum):
    """diffusers reads ``quant_method.value``."""

    TFMQ = NAME


class TFMQConfig(QuantizationConfigMixin):
    """What stands in ``config.json``: each layer's form. Tables are in the safetensors file.

    bits: of weights that are quantised while a checkpoint in floating point is loaded. skip:
    beginnings of names of modules that stay whole then. activations: of linear layers then, "token"
    (dynamic rows, integer kernels) or "whole". layers, steps: of a calibrated checkpoint.
    """

    def __init__(
        self,
        bits: int = 8,
        skip: list[str] | None = None,
        activations: Literal["token", "whole"] = "token",
        layers: dict[str, dict[str, Any]] | None = None,
        steps: int = 0,
        quant_method: str = NAME,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"TFMQConfig.bits = {bits}: 4 or 8")
        if activations not in ("token", "whole"):
            raise ValueError(f"TFMQConfig.activations = {activations!r}: 'token' or 'whole'")
        if isinstance(skip, str):
            raise ValueError(f"TFMQConfig.skip = {skip!r}: a list of names, [{skip!r}]")
        self.quant_method = QuantizationMethod(quant_method)  # type: ignore[assignment]
        self.bits, self.skip, self.activations = bits, list(skip or []), activations
        self.layers, self.steps = layers or {}, steps

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "quant_method": NAME,
            "bits": self.bits,
            "skip": self.skip,
            "activations": self.activations,
            "layers": self.layers,
            "steps": self.steps,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``__repr__`` prints; the mixin calls it and has none."""
        return self.to_dict()


class TFMQQuantizer(DiffusersQuantizer):
    """Swaps layers before the weights come."""

    requires_calibration = False
    required_packages = None
    use_keep_in_fp32_modules = True  # what a class wants in float32 is so without quantisation, too

    def __init__(self, quantization_config: TFMQConfig, **kwargs: Any) -> None:
        own = copy.deepcopy(quantization_config)  # one config may be given for several models
        super().__init__(own, **kwargs)
        self.config = own
        self._keys: list[str] = []

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """The list is kept: names change in it once the model is there to be looked at."""
        self._keys = loaded_keys
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """state_dict: of a single file, which diffusers takes to be quantised already."""
        if not self.config.layers:
            self.pre_quantized = False
            self.config.layers = chosen(model, self.config)
            made = [
                f"{path}.{name}" for path in self.config.layers for name in ("qweight", "wscale")
            ]
            gone = {f"{path}.weight" for path in self.config.layers}
            self._keys[:] = [k for k in self._keys if k not in gone] + made
            if state_dict is not None:
                converted = self._rounded(state_dict)
                state_dict.clear()
                state_dict.update(converted)
        model.register_to_config(quantization_config=self.config)
        put_in(model, self.config)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Weights of a checkpoint in floating point, rounded to the nearest; biases stay."""
        return state_dict if self.pre_quantized else self._rounded(state_dict)

    def _rounded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        found = dict(state_dict)
        for path, how in self.config.layers.items():
            weight = found.pop(f"{path}.weight", None)
            if weight is not None:  # else it is in another shard
                scale = searched_scale(weight.float(), how["bits"])
                codes = nearest(weight.float(), scale, how["bits"]).to(torch.int8)
                found[f"{path}.qweight"] = pack4(codes) if how["bits"] == 4 else codes
                found[f"{path}.wscale"] = bits_of(scale)
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        connect(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make diffusers know the method; done when this module is imported."""
    AUTO_QUANTIZER_MAPPING[NAME] = TFMQQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = TFMQConfig


def chosen(model: nn.Module, config: TFMQConfig) -> dict[str, dict[str, Any]]:
    """Layers that are quantised on the fly: all linear ones and convolutions but the skipped.

    Raises:
        ValueError: there are none.
    """
    skip = tuple(config.skip)
    named = {
        n: m for n, m in model.named_modules() if quantisable(m) and not n.startswith(skip or " ")
    }
    if not named:
        raise ValueError(
            f"TFMQConfig(skip={config.skip}) leaves no layer of {type(model).__name__}"
        )
    token = config.activations == "token"
    return {
        path: {
            "bits": config.bits,
            "scheme": "token" if token and isinstance(part, nn.Linear) else "weight",
            "groups": 1,
        }
        for path, part in named.items()
    }


def put_in(model: nn.Module, config: TFMQConfig) -> None:
    """Empty quantised layers in place of the model's own, on the device that those are on."""
    for path, how in config.layers.items():
        own: Any = model.get_submodule(path)
        with torch.device(own.weight.device):
            model.set_submodule(path, layer_for(own, **how))
    if config.steps:
        model.add_module(BINS, Bins(config.steps))


def connect(model: Any) -> None:
    """Layers hear of the timestep: the model writes its group once a call."""
    bins = getattr(model, BINS, None)
    for part in model.modules():
        if hasattr(part, "qweight"):
            part.bins = [bins]
            part.pack()
    if bins is not None:
        model.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that knows no model, since the one that it is on may be a copy."""
    call = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    getattr(model, BINS).set(call.arguments["timestep"])


def save_quantised(pipe: Any, artifact: Artifact, folder: str | os.PathLike[str]) -> None:
    """Write a pipeline whose denoisers are quantised as ``artifact`` says; ``pipe`` stays whole.

    The folder loads through stock ``from_pretrained`` once this module is imported.

    Raises:
        ValueError: something is attached to ``pipe`` (its weights may be elsewhere), it has
            adapters, or the artifact is not for its models; nothing is written then.
    """
    require_detached(pipe, "saving")
    refuse_adapters(pipe)
    check_fits(artifact, pipe)
    made = layers_of(artifact)
    pipe.save_pretrained(folder)
    for denoiser in denoisers(pipe):
        paths = {p for p in made if p.startswith(f"{denoiser.slot}.")}
        if not paths:
            continue
        model: Any = copy.deepcopy(denoiser.module)
        layers: dict[str, dict[str, Any]] = {}
        for path in sorted(paths):
            inner, how = path.partition(".")[2], made[path]
            layer = quantised(model.get_submodule(inner), artifact.tensors, path, how)
            groups = [len(getattr(piece, "ascale", "?")) for piece in layer.pieces()]
            layers[inner] = {**how, "groups": groups if len(groups) > 1 else groups[0]}
            model.set_submodule(inner, layer)
        bins = bins_of(artifact, denoiser.slot)
        model.add_module(BINS, bins)
        config = TFMQConfig(layers=layers, steps=len(bins.times))  # type: ignore[arg-type]
        _mark(model, config)
        target = Path(folder) / denoiser.slot
        for old in target.glob("*.safetensors*"):
            old.unlink()
        model.save_pretrained(target)
        _check_written(target)


def _mark(model: Any, config: TFMQConfig) -> None:
    """What diffusers wants of a model before it saves it as quantised."""
    quantizer = TFMQQuantizer(config, pre_quantized=True)
    marks = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    vars(model).update(marks)
    model.register_to_config(quantization_config=config)


def _check_written(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text("utf-8"))
    found = written.get("quantization_config", {}).get("quant_method")
    assert found == NAME, f"{folder}: diffusers wrote quant_method {found!r}"


register()
