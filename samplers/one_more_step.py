"""One More Step (Hu et al. 2024): start where training started, not at pure noise.

Stable Diffusion is trained on noisy samples that keep some of their signal even at the last time,
and is asked to begin without any: so pictures come out of middle brightness. One step before the
first puts the signal in that training has there:

    x_T = sqrt(abar) x_0 + sqrt(1 - abar) z

with the noise z, abar of the first step, and a guess at the clean latents x_0. The paper's network
is told z and the prompt; z knows nothing of x_0, so what it learns is the mean of x_0 for a prompt.
That is fitted here directly: one mean, one for each of some clusters of prompts, or a small network
over the text. With ``spread`` the guess is drawn around the mean as the latents of real pictures
with like prompts are, in the directions in which they differ most ("signal leak", Everaert et al.
2024): what no prompt says, such as a background, is not at the mean either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.artifact import Artifact, ArtifactRef, Fingerprint, inputs_digest
from accel.denoiser import denoisers
from accel.method import Attached, Claim, Method
from samplers.distillation import Call
from samplers.host import is_flow, sample_seed

NAMED = ("encode_prompt", "prepare_latents")  # of the pipeline: where text and noise come from
LEAST_SIGNAL = 0.02  # sqrt(abar) below which the first step is noise for any purpose
NEIGHBOURS = 32  # prompts, among whose pictures the spread is drawn
HIDDEN, NETWORK_STEPS, NETWORK_BATCH, NETWORK_LR = 64, 1500, 256, 3e-3

Kind = Literal["mean", "clusters", "network"]


@dataclass(frozen=True)
class OneMoreStep(Method):
    """Put the signal that training has at its last time into the first noise.

    ``artifact`` of ``calibrate``; ``spread``: draw around the mean, 0 to 1 of the real spread;
    ``guidance`` over the mean of the empty prompt; ``official``: noise is scaled as in the authors'
    code, by 1 - abar instead of its root.
    """

    SLOTS = ("initial_latents",)
    PAPER = "arXiv 2311.15744"

    artifact: ArtifactRef
    spread: float = 0.0
    guidance: float = 1.0
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread <= 1:
            raise ValueError(f"OneMoreStep.spread = {self.spread}: 0 to 1")

    def claims(self, pipe: Any) -> frozenset[Claim]:
        check_pipeline(pipe)
        return frozenset({("initial_latents", frozenset({"prepare_latents"}))})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveStep(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveStep)
        live.artifact = Artifact.load(self.artifact)
        live.artifact.check_method(self.name())
        live.artifact.check_model(denoisers(pipe)[0].module)
        live.patch.around(pipe, "encode_prompt", live.encode_prompt)
        live.patch.around(pipe, "prepare_latents", live.prepare_latents)

    @staticmethod
    def calibrate(
        pipe: Any,
        inputs: Sequence[dict[str, Any]],
        pictures: Sequence[Tensor],
        *,
        kind: Kind = "network",
        clusters: int = 16,
        directions: int = 8,
        seed: int = 0,
    ) -> Artifact:
        """Fit the guess from real pictures.

        Args:
            inputs: pipeline calls with ``prompt``, a list.
            pictures: one tensor (n, 3, height, width) in -1..1 for each, a picture a prompt.
                Real ones: a model's own are of middle brightness.
            kind: one mean, one for each of ``clusters`` of prompts (k-means), or a network.
            directions: of the differences that ``spread`` draws from.

        Raises:
            ValueError: not as many pictures as prompts, guided calls, or a pipeline that needs none
                of this.
        """
        check_pipeline(pipe)
        plain = [{"guidance_scale": 1.0, **call} for call in inputs]
        found = [Call.without_guidance(pipe, call) for call in plain]
        texts = torch.cat([_pooled(call.kwargs["encoder_hidden_states"]) for call in found])
        empty = Call.of(pipe, {**plain[0], "prompt": [""]})
        latents = torch.cat([_encoded(pipe, batch) for batch in pictures])
        if len(texts) != len(latents):
            raise ValueError(f"OneMoreStep: {len(texts)} prompts, {len(latents)} pictures")
        generator = torch.Generator().manual_seed(seed)
        tensors = _fitted(kind, texts, latents, clusters, generator)
        tensors["empty"] = _pooled(empty.kwargs["encoder_hidden_states"])
        rest = (latents - guess(tensors, texts)).flatten(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, _, rows = torch.pca_lowrank(rest, q=min(directions, *rest.shape), niter=4)
        tensors["directions"] = rows.T.reshape(-1, *latents.shape[1:]).contiguous()
        tensors["coefficients"] = (rest - rest.mean(dim=0)) @ rows
        tensors["texts"] = texts
        return Artifact(
            method=OneMoreStep.name(),
            fingerprint=Fingerprint.of(denoisers(pipe)[0].module),
            tensors=tensors,
            match="architecture",  # of the latents, not of the network's weights
            inputs_sha256=inputs_digest(list(inputs)),
            seed=seed,
            settings={"kind": kind, "samples": len(latents)},
        )


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline on which this would do nothing, or cannot."""
    name, scheduler = type(pipe).__name__, pipe.scheduler
    if is_flow(scheduler):
        raise ValueError(f"OneMoreStep: {name} holds a flow model, which starts from pure noise")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"OneMoreStep: {type(scheduler).__name__} does not say how much signal its first step "
            "keeps (alphas_cumprod); choose one that does"
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"OneMoreStep: {name} was trained to start from pure noise (rescale_betas_zero_snr)"
        )
    if float(scheduler.alphas_cumprod[-1]) ** 0.5 < LEAST_SIGNAL:
        raise ValueError(
            f"OneMoreStep: {name} keeps {float(scheduler.alphas_cumprod[-1]) ** 0.5:.4f} of the "
            "signal at its last time; there is nothing to put in"
        )
    lacking = [n for n in NAMED if not hasattr(pipe, n)]
    if lacking:
        raise ValueError(f"OneMoreStep: {name} has no {lacking[0]}; give it latents yourself")
    if "image" in inspect.signature(pipe.prepare_latents).parameters:
        raise ValueError(f"OneMoreStep: {name} starts from a picture, not from noise")


def first_latents(
    noise: Tensor, clean: Tensor, alpha_bar: float, *, official: bool = False
) -> Tensor:
    """x_T from noise and the guess at clean latents, both (n, c, h, w)."""
    kept = 1 - alpha_bar
    return alpha_bar**0.5 * clean + (kept if official else kept**0.5) * noise


def guess(tensors: dict[str, Tensor], texts: Tensor) -> Tensor:
    """Mean clean latents (n, c, h, w) for pooled texts (n, d), from an artifact's tensors."""
    means = tensors["means"]
    if "centres" in tensors:
        return means[torch.cdist(texts, tensors["centres"]).argmin(dim=1)]
    if "inner.weight" in tensors:
        scaled = (texts - tensors["text_mean"]) / tensors["text_std"]
        hidden = F.silu(F.linear(scaled, tensors["inner.weight"], tensors["inner.bias"]))
        change = F.linear(hidden, tensors["outer.weight"], tensors["outer.bias"])
        return means + change.view(-1, *means.shape[1:])
    return means.expand(len(texts), -1, -1, -1)


def _pooled(states: Tensor) -> Tensor:
    """Text states (n, tokens, d) -> (n, d)."""
    return states.detach().float().mean(dim=1).cpu()


@torch.no_grad()
def _encoded(pipe: Any, pictures: Tensor) -> Tensor:
    vae = pipe.vae
    mean = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean
    return (mean * vae.config.scaling_factor).float().cpu()


def _fitted(
    kind: Kind, texts: Tensor, latents: Tensor, clusters: int, generator: torch.Generator
) -> dict[str, Tensor]:
    mean = latents.mean(dim=0, keepdim=True)
    if kind == "mean":
        return {"means": mean}
    if kind == "clusters":
        centres, nearest = _k_means(texts, clusters, generator)
        means = torch.cat([latents[nearest == k].mean(0, keepdim=True) for k in range(clusters)])
        return {"means": means, "centres": centres}
    std = texts.std(dim=0) + 1e-6
    scaled, target = (texts - texts.mean(dim=0)) / std, (latents - mean).flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        inner, outer = nn.Linear(texts.shape[1], HIDDEN), nn.Linear(HIDDEN, target.shape[1])
    nn.init.zeros_(outer.weight)
    parameters = [*inner.parameters(), *outer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=NETWORK_LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NETWORK_STEPS)
    for _ in range(NETWORK_STEPS):
        rows = torch.randint(len(scaled), (NETWORK_BATCH,), generator=generator)
        loss = (outer(F.silu(inner(scaled[rows]))) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layers = {"inner": inner, "outer": outer}
    weights = {
        f"{layer}.{name}": p.detach()
        for layer, module in layers.items()
        for name, p in module.named_parameters()
    }
    return {"means": mean, "text_mean": texts.mean(dim=0), "text_std": std, **weights}


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (count, d) and the nearest one of each point (n,). No centre is left without."""
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, (), generator=generator))
    found = KMeans(count, n_init=4, random_state=seed).fit(points.numpy())  # type: ignore[arg-type]
    return torch.from_numpy(found.cluster_centers_).float(), torch.from_numpy(found.labels_)


class _LiveStep(Attached):
    artifact: Artifact

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self._texts: Tensor | None = None

    def encode_prompt(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``pipe.encode_prompt``: keeps the text that the guess is for."""
        encoded = call_next(*args, **kwargs)
        self._texts = _pooled(encoded[0] if isinstance(encoded, tuple) else encoded)
        return encoded

    def prepare_latents(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Around ``pipe.prepare_latents``: the stock noise with the signal put in."""
        latents, method = call_next(*args, **kwargs), self.method
        assert isinstance(method, OneMoreStep)
        scheduler = self._pipe().scheduler  # type: ignore[union-attr]
        alpha_bar = float(scheduler.alphas_cumprod[round(float(scheduler.timesteps[0]))])
        self.detail["signal"] = alpha_bar**0.5
        if self._texts is None or alpha_bar**0.5 < LEAST_SIGNAL:
            self.fallback("no text, or no signal at the first step")
            return latents
        self.count("changed")
        scale = float(scheduler.init_noise_sigma)
        noise = latents.float() / scale
        clean = self._clean(noise).to(noise.device)
        x = first_latents(noise, clean, alpha_bar, official=method.official)
        return (scale * x).to(latents.dtype)

    def _clean(self, noise: Tensor) -> Tensor:
        """The guess (n, c, h, w) at clean latents that this noise will become."""
        method, tensors = self.method, self.artifact.tensors
        assert isinstance(method, OneMoreStep)
        assert self._texts is not None
        texts = self._texts.repeat_interleave(len(noise) // len(self._texts), dim=0)
        clean = guess(tensors, texts)
        if method.guidance != 1:
            empty = guess(tensors, tensors["empty"])
            clean = empty + method.guidance * (clean - empty)
        if method.spread:
            count = min(NEIGHBOURS, len(tensors["texts"]))
            near = torch.cdist(texts, tensors["texts"]).topk(count, largest=False).indices
            drawn = [_one(rows, sample_seed(x)) for rows, x in zip(near, noise, strict=True)]
            picked = tensors["coefficients"][drawn]
            leak = torch.einsum("nk,kchw->nchw", picked, tensors["directions"])
            clean = clean + method.spread * leak
        if clean.shape[-2:] != noise.shape[-2:]:
            clean = F.interpolate(clean, noise.shape[-2:], mode="bilinear")
        return clean


def _one(rows: Tensor, seed: int) -> int:
    """One of the rows, for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return int(rows[torch.randint(len(rows), (), generator=generator)])
