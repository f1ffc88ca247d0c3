"""What distilling any pipeline takes: its denoiser's calls, and weights to train beside its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from accel.compat import compile_call
from accel.denoiser import Denoiser, denoisers
from accel.device import forked_rng
from accel.loop import step_generator
from accel.patch import Patch

LOW, HIGH = ".lora_A", ".lora_B"  # behind a weight's name: its change is B @ A


class _Seen(Exception):
    """Ends a pipeline's run at the first call of its denoiser."""

    def __init__(self, args: tuple, kwargs: dict):
        super().__init__()
        self.args_of_call, self.kwargs_of_call = args, kwargs


@dataclass(frozen=True)
class Call:
    """One call that a pipeline made of its denoiser, to be made again with other samples.

    shape: of the sample, (n, ...). scale: what the network is told is this times the scheduler's
    time.
    """

    denoiser: Denoiser
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...]
    scale: float

    @classmethod
    def of(cls, pipe: Any, arguments: Mapping[str, Any]) -> Call:
        """The first call of a run with these arguments, which ends there.

        Raises ValueError where the pipeline has several denoisers, made no call, or one at time 0.
        """
        parts = denoisers(pipe)
        if len(parts) != 1:
            raise ValueError(f"{type(pipe).__name__} has {len(parts)} denoisers; one is distilled")
        patch = Patch()

        def layer(call_next: Any, *args: Any, **kwargs: Any) -> Any:
            raise _Seen(args, kwargs)

        patch.around_call(parts[0].module, layer)
        try:
            with forked_rng():  # its noise is thrown away
                pipe(**arguments)
        except _Seen as seen:
            args, kwargs = seen.args_of_call, seen.kwargs_of_call
        else:
            raise ValueError(f"{type(pipe).__name__} did not call its denoiser: {arguments!r}")
        finally:
            patch.undo()
        x = parts[0].sample(args, kwargs)
        told = torch.as_tensor(parts[0].argument("timestep", args, kwargs))
        time = float(told.flatten()[0])
        if time <= 0:
            raise ValueError(f"the first step of {arguments!r} is at time 0; ask for more steps")
        grid = pipe.scheduler.timesteps.tolist()
        begin = getattr(pipe.scheduler, "begin_index", None) or 0  # image to image begins inside
        scale = 1.0 if time in grid else time / grid[begin]
        return cls(parts[0], args, kwargs, tuple(x.shape), scale)

    @classmethod
    def without_guidance(cls, pipe: Any, arguments: Mapping[str, Any]) -> Call:
        """`of`, for what is learned of a network that is asked for each sample once.

        Raises ValueError also for a guided run. Guidance that the network is told (Flux) is none.
        """
        call, scale = cls.of(pipe, arguments), arguments.get("guidance_scale", 1)
        twice = getattr(pipe, "do_classifier_free_guidance", False)  # of this call
        if scale > 1 and not twice:
            alone = cls.of(pipe, {**arguments, "guidance_scale": 1.0})
            twice = alone.shape[0] < call.shape[0]
        if twice:
            raise ValueError(
                f"{type(pipe).__name__} is guided (guidance_scale {scale}), and asks for each "
                "sample twice; leave guidance_scale out of the inputs"
            )
        return call

    def __call__(
        self, x: Tensor, times: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The network's output for x (n, ...) at the scheduler's times (n,), in float32.

        weights: in place of some of the network's own. Learned variances are left out.
        """
        module = self.denoiser.module
        kind = next(module.parameters())
        given = {
            self.denoiser.sample_name: x.to(kind.device, kind.dtype),
            "timestep": (self.scale * times).to(kind.device),
        }
        args, kwargs = self.denoiser.replace(self.args, dict(self.kwargs), **given)
        out = functional_call(module, dict(weights or {}), args, kwargs)
        out = out[0] if isinstance(out, tuple) else out.sample
        return out[:, : x.shape[1]].float()


class Weights(nn.Module):
    """Weights to train in place of a network's own: all of them, or low-rank changes.

    rank: of the changes to the weights of its linear layers (Hu et al. 2021, LoRA); None for a
    full copy. Starts as the network. Raises ValueError where there is nothing to train, or an
    adapter is on the network.
    """

    def __init__(self, network: nn.Module, rank: int | None = None):
        super().__init__()
        self.rank = rank
        own = dict(network.named_parameters())
        if any(".base_layer." in name for name in own):
            raise ValueError(
                f"{type(network).__name__} has an adapter, of which no artifact would know; fuse "
                "it (fuse_lora, then unload_lora_weights) or unload it first"
            )
        if rank is None:
            start = {name: p.detach().float().clone() for name, p in own.items()}
        else:
            self._base = {name: p.detach() for name, p in own.items()}
            linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
            start = {}
            for name in (f"{layer}.weight" for layer in linear):
                base = own[name]
                low = torch.randn(rank, base.shape[1], device=base.device) / math.sqrt(rank)
                start[name + LOW] = low / math.sqrt(base.shape[1])
                start[name + HIGH] = torch.zeros(base.shape[0], rank, device=base.device)
        if not start:
            raise ValueError(f"{type(network).__name__} has no weights to train")
        self.names = list(start)
        self.values = nn.ParameterList(start.values())

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return dict(zip(self.names, self.values, strict=True))

    def merged(self) -> dict[str, Tensor]:
        """All weights by the names of the network, with gradients to what is trained alone."""
        trained = self.tensors()
        return trained if self.rank is None else self._base | dict(merge(self._base, trained))


class Pair(nn.Module):
    """A student and its fake, both beginning as the network; the fake learns at `rate` times."""

    def __init__(self, network: nn.Module, rank: int | None, rate: float):
        super().__init__()
        self.student, self.fake = Weights(network, rank), Weights(network, rank)
        self._rate = rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's, then the fake's."""
        groups = ((self.student, 1.0), (self.fake, self._rate))
        return [{"params": list(part.parameters()), "rate": rate} for part, rate in groups]


def merge(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a network, from full ones or low-rank changes to `base`."""
    for name, value in trained.items():
        if name.endswith(LOW):
            weight = name.removesuffix(LOW)
            change = trained[weight + HIGH].float() @ value.float()
            yield weight, base[weight] + change.to(base[weight].device)
        elif not name.endswith(HIGH):
            yield name, value


def lora_layers(trained: Mapping[str, Tensor], slot: str) -> dict[str, Tensor]:
    """Low-rank changes as ``pipe.load_lora_weights`` takes them; `slot`: "unet" or "transformer".

    So a student also runs without this package, under any few-step scheduler that has its anchors.
    Raises ValueError for full weights.
    """
    layers = {}
    for name, value in trained.items():
        layer, _, factor = name.rpartition(".weight")
        if factor not in (LOW, HIGH):
            raise ValueError(f"{name} is a full weight; only low-rank students are LoRAs")
        layers[f"{slot}.{layer}{factor}.weight"] = value
    return layers


def calls_of(pipe: Any, arguments: list[dict[str, Any]]) -> list[Call | None]:
    """The call of each; of equal ones, such as those without text, one."""
    made: dict[str, Call] = {}
    for given in arguments:
        if repr(given) not in made:
            made[repr(given)] = Call.of(pipe, given)
    return [made[repr(given)] for given in arguments]


def instead(call: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The call with other values for some of its arguments, as long as its lists."""
    changed = dict(call)
    for name, value in values.items():
        before = call.get(name)
        changed[name] = [value] * len(before) if isinstance(before, list) else value
    return changed


@dataclass(frozen=True)
class Draws:
    """What a step draws: `host`, numbers that Python has to know, and `noise` on the device."""

    host: torch.Generator
    noise: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, device: torch.device) -> Draws:
        host = step_generator(seed, step)
        return cls(host, host if device.type == "cpu" else step_generator(seed, step, device))


@contextmanager
def compiled_blocks(denoiser: Denoiser) -> Iterator[None]:
    """Blocks of a transformer compiled one by one: they are alike, so that is done once for all."""
    patch, get = Patch(), denoiser.module.get_submodule
    for block in denoiser.blocks:
        patch.swap(get(block.path), *compile_call(get(block.path)))
    try:
        yield
    finally:
        patch.undo()


def unguided(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """A call without guidance, unless it says otherwise."""
    takes = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
    return {"guidance_scale": 1.0, **call} if takes else call
