"""digits-judge: says which digit, colour and background a picture shows, with 64 features.

An objective verifier, because DigitWorld knows the truth: trained on the `train` scans, its
accuracy is measured on the `heldout` ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accel.zoo.loop import step_generator
from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, DigitWorld

HEADS = {"digit": len(DIGITS), "colour": len(COLOURS), "background": len(BACKGROUNDS)}


@dataclass(frozen=True)
class JudgeConfig:
    """Widths of the three convolution stages and of the features."""

    widths: tuple[int, int, int] = (24, 48, 96)
    features: int = 64


class Judge(nn.Module):
    """Small convolutional classifier with one linear head per attribute."""

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for width in config.widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.project = nn.Linear(channels * 16, config.features)
        self.heads = nn.ModuleDict({k: nn.Linear(config.features, n) for k, n in HEADS.items()})

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) in -1..1 -> (n, 64)."""
        return F.silu(self.project(self.trunk(images).flatten(1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, 32, 32) in -1..1 -> logits (n, classes) per attribute."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, images: np.ndarray, batch: int = 250) -> dict[str, np.ndarray]:
        """(n, 32, 32, 3) uint8 -> index (n,) of the answer per attribute."""
        parts = [
            {k: v.argmax(1) for k, v in self(to_tensor(images[i : i + batch])).items()}
            for i in range(0, len(images), batch)
        ]
        return {name: torch.cat([p[name] for p in parts]).numpy() for name in HEADS}

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors (half precision)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Reads what `save` wrote; float32, in evaluation mode."""
        config = json.loads((folder / "config.json").read_text())
        judge = cls(JudgeConfig(tuple(config["widths"]), config["features"]))
        judge.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        return judge.eval()


def to_tensor(images: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


class JudgeLoss:
    """Cross entropies of the heads on fresh pictures, some of them noisy, blurred or shifted."""

    def __init__(self, batch: int, seed: int, device: torch.device):
        self.world = DigitWorld("train", seed)
        self.batch, self.seed, self.device = batch, seed, device

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        images, what = self.world.batch(np.arange(step * self.batch, (step + 1) * self.batch))
        x = _roughen(to_tensor(images), step_generator(self.seed, step)).to(self.device)
        logits = model(x)
        truth = {k: torch.from_numpy(getattr(what, k)).to(self.device) for k in HEADS}
        return sum(
            (F.cross_entropy(logits[k], truth[k], label_smoothing=0.02) for k in HEADS),
            start=torch.zeros((), device=self.device),
        )


def _roughen(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation, shear and stretch of the whole picture, blur and noise: what scans lack."""
    n = len(x)
    bend = torch.randn(n, 2, 2, generator=generator) * 0.1
    theta = torch.cat([torch.eye(2) + bend, torch.randn(n, 2, 1, generator=generator) * 0.03], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, torch.rand(n, 1, 1, 1, generator=generator))
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return x + strength * torch.randn(x.shape, generator=generator)


def accuracy(judge: Judge, world: DigitWorld, count: int) -> dict[str, float]:
    """Share of `count` real pictures of `world` judged right, per attribute and for "all"."""
    images, what = world.batch(np.arange(count))
    answers = judge.answers(images)
    right = {name: answers[name] == getattr(what, name) for name in HEADS}
    right["all"] = np.logical_and.reduce(list(right.values()))
    return {name: float(ok.mean()) for name, ok in right.items()}
