"""Few-step sampling for diffusion and flow models: predict the clean sample, then noise it again.

    x_n = alpha_n x_0 + s_n (eta e + sqrt(1 - eta^2) z)

with the predicted clean sample x_0 and noise e, fresh noise z, and the levels alpha_n, s_n of the
next step (flow: 1 - sigma, sigma). ``eta`` 1 is DDIM (Song et al. 2021) and Euler; 0 is the sampler
of latent consistency models (Luo et al. 2023); ``gamma`` is that of trajectory consistency (Zheng
et al. 2024, TCD), which keeps the noise of a cleaner level and is defined here for flows, too. The
last step draws no noise and goes to the stock scheduler's last level. That is x_0 but for diffusion
with ``set_alpha_to_one=False``, such as Stable Diffusion's: there it is DDIM's result, which keeps
the predicted noise at the level of time 0 (3 % of it).

``eta`` is a setting and no argument of ``step``: pipelines of Stable Diffusion pass eta = 0 to any
scheduler that takes one, whatever its user has set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module of a foreign scheduler.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from samplers.extension import Extension
from samplers.host import is_flow, made_for, refuse
from samplers.predictions import DIFFUSION, FLOW, split

SETTINGS: dict[str, Any] = {
    "eta": 1.0,  # share of the predicted noise that is kept, 0 to 1
    "gamma": None,  # instead of eta: 0 keeps all, 1 nothing
    "anchors": None,  # times, falling, that the model was distilled at; steps are chosen from them
}


def choose(anchors: list[float], count: int) -> list[float]:
    """`count` of the anchors, evenly, from the first on, as latent consistency models do it.

    Raises ValueError for more than there are.
    """
    if not 1 <= count <= len(anchors):
        raise ValueError(f"{count} steps of a model with {len(anchors)} anchors; 1 to that many")
    index = np.floor(np.linspace(0, len(anchors), count, endpoint=False)).astype(int)
    return [anchors[i] for i in index]


class FewStep(Extension):
    """Mixin before a stock scheduler that lays the grid; the step is ours. Settings: `SETTINGS`.

    Raises ValueError for settings out of range.
    """

    settings = SETTINGS
    config: Any
    timesteps: Tensor
    step_index: int | None

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings (all of them) that are out of range."""
        for name in ("eta", "gamma"):
            value = settings[name]
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{cls.__name__}: {name} = {value!r}; 0 to 1")
        anchors = settings["anchors"]
        if anchors is not None and not (len(anchors) and list(anchors) == sorted(anchors)[::-1]):
            raise ValueError(f"{cls.__name__}: anchors = {anchors!r}; one time or more, falling")

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From the network's output for `sample` (any shape alike) to the next sample.

        `generator`: of the fresh noise, one or one for each sample; unused where `eta` is 1. Raises
        ValueError before there is a grid, and off it.
        """
        if getattr(self, "num_inference_steps", None) is None:
            raise ValueError(f"{type(self).__name__} has no grid yet; call set_timesteps first")
        if self.step_index is None:
            try:
                self._init_step_index(timestep)  # type: ignore[attr-defined]
            except (ValueError, IndexError) as error:
                grid = self.timesteps.tolist()
                raise ValueError(f"{float(timestep):g} is no time of the grid {grid}") from error
        at = self.step_index
        assert at is not None
        if at >= len(self.timesteps):
            raise ValueError(f"{type(self).__name__} is at its grid's end; call set_timesteps")
        x0, noise = self._split(model_output.float(), sample.float(), *self._level(at))
        last = at + 1 == len(self.timesteps)
        eta = 1.0 if last else self._eta(at + 1)
        if eta < 1:
            kind = {"device": noise.device, "dtype": noise.dtype}
            fresh = randn_tensor(noise.shape, generator=generator, **kind)
            noise = eta * noise + (1 - eta**2) ** 0.5 * fresh
        alpha, s = self._level(at + 1)
        following = (alpha * x0 + s * noise).to(sample.dtype)
        x0 = x0.to(sample.dtype)
        self._step_index = at + 1
        return DDIMSchedulerOutput(following, x0) if return_dict else (following, x0)

    def _eta(self, at: int) -> float:
        """Share of the predicted noise in the input of step `at`."""
        gamma = self.config.gamma
        if gamma is None:
            return self.config.eta
        (alpha, s), (cleaner, less) = self._level(at), self._cleaner(at, gamma)
        return float(alpha * less / (cleaner * s))

    def _level(self, at: int) -> tuple[float, float]:
        """alpha and s of the input of step `at`; after the last step, of the result."""
        raise NotImplementedError

    def _cleaner(self, at: int, gamma: float) -> tuple[float, float]:
        """alpha and s at (1 - gamma) times the time of step `at`."""
        raise NotImplementedError

    def _split(self, out: Tensor, x: Tensor, alpha: float, s: float) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that a network's output stands for."""
        raise NotImplementedError


class FewStepScheduler(FewStep, DDIMScheduler):
    """Of diffusion models with discrete times: epsilon, v or sample prediction."""

    def check_stock(self) -> None:
        """Raises ValueError for a model of another kind, or anchors that are no times of it."""
        times = range(self.config.num_train_timesteps)
        if self.config.prediction_type not in DIFFUSION:
            refuse(self, "prediction_type", f"one of {', '.join(DIFFUSION)}")
        if not all(anchor in times for anchor in self.config.anchors or ()):
            refuse(self, "anchors", f"whole times from 0 to {times[-1]}")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """A grid of `num_inference_steps` (of the anchors, where there are any), or `timesteps`.

        Raises ValueError for neither, for more steps than anchors, or times that are none.
        """
        known = self.config.num_train_timesteps
        if timesteps is None and num_inference_steps is None:
            raise ValueError("FewStepScheduler: give num_inference_steps or timesteps")
        if timesteps is None and self.config.anchors is not None:
            timesteps = choose(list(self.config.anchors), num_inference_steps)  # type: ignore
        if not all(0 <= time < known for time in (() if timesteps is None else timesteps)):
            raise ValueError(f"FewStepScheduler: timesteps = {timesteps}; 0 to {known - 1}")
        count = num_inference_steps if timesteps is None else len(timesteps)
        super().set_timesteps(count, device)  # type: ignore
        if timesteps is not None:
            self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        abar = self.alphas_cumprod[self.timesteps.cpu()].double()
        signal = abar.clamp(min=1e-12)  # finite where the first level has none
        self.sigmas = torch.cat([((1 - abar) / signal).sqrt().float(), torch.zeros(1)])
        self._abar = [*abar.tolist(), float(self.final_alpha_cumprod)]
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step; None where the first step's time tells."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step is this one."""
        self._begin_index = begin_index

    def _init_step_index(self, timestep: Any) -> None:
        found = self._begin_index
        self._step_index = self.timesteps.tolist().index(int(timestep)) if found is None else found

    def _level(self, at: int) -> tuple[float, float]:
        return self._abar[at] ** 0.5, (1 - self._abar[at]) ** 0.5

    def _cleaner(self, at: int, gamma: float) -> tuple[float, float]:
        time = int(np.floor(np.float32(1 - gamma) * int(self.timesteps[at])))
        abar = float(self.alphas_cumprod[time])
        return abar**0.5, (1 - abar) ** 0.5

    def _split(self, out: Tensor, x: Tensor, alpha: float, s: float) -> tuple[Tensor, Tensor]:
        config = self.config
        x0, noise = split(config.prediction_type, out, x, alpha, s)
        if config.thresholding:
            x0 = self._threshold_sample(x0)
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0, noise


class FewStepFlowScheduler(FewStep, FlowMatchEulerDiscreteScheduler):
    """Of flow models: v = e - x_0. Grids, shifts and sigmas are those of the stock scheduler."""

    def check_stock(self) -> None:
        """Raises ValueError for a flow whose time runs the other way, or anchors beyond its own."""
        last = self.config.num_train_timesteps
        if self.config.invert_sigmas:
            refuse(self, "invert_sigmas", "noise has to be at sigma 1")
        if self.config.stochastic_sampling:
            refuse(self, "stochastic_sampling", "that is eta = 0 here")
        if not all(0 < anchor <= last for anchor in self.config.anchors or ()):
            refuse(self, "anchors", f"times above 0, up to {last}")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the stock scheduler's; anchors, where there are any, take the place of its grid, but
        not of `timesteps`."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if self.config.anchors is not None and timesteps is None:
            count = len(self.timesteps)
            times = torch.tensor(choose(list(self.config.anchors), count), dtype=torch.float32)
            self.timesteps = times.to(device)
            self.sigmas = torch.cat([times / self.config.num_train_timesteps, torch.zeros(1)])

    def _level(self, at: int) -> tuple[float, float]:
        sigma = float(self.sigmas[at])
        return 1 - sigma, sigma

    def _cleaner(self, at: int, gamma: float) -> tuple[float, float]:
        sigma = (1 - gamma) * float(self.sigmas[at])
        return 1 - sigma, sigma

    def _split(self, out: Tensor, x: Tensor, alpha: float, s: float) -> tuple[Tensor, Tensor]:
        return split(FLOW, out, x, alpha, s)


def few_step_scheduler(pipe: Any, anchors: tuple[float, ...], eta: float = 1.0) -> FewStep:
    """The sampler of a distilled model, from its pipeline's own scheduler; nothing is clipped."""
    settings: dict[str, Any] = {"anchors": list(anchors), "eta": eta}
    if is_flow(pipe.scheduler):
        return made_for(pipe.scheduler, FewStepFlowScheduler, **settings, stochastic_sampling=False)
    settings |= {"clip_sample": False, "thresholding": False}
    return made_for(pipe.scheduler, FewStepScheduler, **settings)
