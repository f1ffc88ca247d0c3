"""The pictures of a model card: samples beside real ones, nearest neighbours, loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DPI = 110


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """(n, h, w, 3) -> one picture, row by row, with a thin light gap."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, h + 2, w + 2, 3), 255, np.uint8)
    padded[:n, 1:-1, 1:-1] = images
    joined = padded.reshape(rows, columns, h + 2, w + 2, 3).transpose(0, 2, 1, 3, 4)
    return joined.reshape(rows * (h + 2), columns * (w + 2), 3)


def draw_pictures(samples, real, title: str, path: Path, columns: int = 10) -> None:
    """Samples beside real pictures that were asked for the same, both (n, h, w, 3)."""
    figure = Figure(figsize=(13, 13 / 2 * (len(samples) / columns**2) + 0.5), layout="constrained")
    pairs = zip(figure.subplots(1, 2), (samples, real), (title, "real (held-out)"), strict=True)
    for axes, images, name in pairs:
        axes.imshow(grid(images, columns), interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def draw_videos(samples, real, captions: list[str], path: Path, shown: int = 5) -> None:
    """One row a video: `shown` frames of the sample, then of a real video asked for the same."""
    figure = Figure(figsize=(10, 0.62 * len(samples) + 0.4), layout="constrained")
    picked = np.linspace(0, samples.shape[1] - 1, shown).round().astype(int)
    pairs = zip(figure.subplots(1, 2), (samples, real), ("samples", "real (held-out)"), strict=True)
    for axes, videos, name in pairs:
        frames = videos[:, picked].reshape(-1, *videos.shape[2:])
        axes.imshow(grid(frames, shown), interpolation="nearest")
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    height = samples.shape[2] + 2
    figure.axes[0].set_yticks(np.arange(len(captions)) * height + height // 2, captions, fontsize=7)
    figure.axes[0].tick_params(length=0)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def draw_neighbours(samples, neighbours, labels: list[str], path: Path) -> None:
    """One row per sample (n, h, w, 3): it, then its nearest training pictures (n, k, h, w, 3)."""
    figure = Figure(figsize=(5.2, 0.8 * len(samples) + 0.4), layout="constrained")
    axes = figure.subplots()
    rows = np.concatenate([samples[:, None], neighbours], axis=1)
    axes.imshow(grid(rows.reshape(-1, *samples.shape[1:]), rows.shape[1]), interpolation="nearest")
    side = samples.shape[1] + 2
    axes.set_yticks(np.arange(len(rows)) * side + side // 2, labels)
    columns = ["sample"] + [f"nearest {i + 1}" for i in range(neighbours.shape[1])]
    axes.set_xticks(np.arange(len(columns)) * side + side // 2, columns, fontsize=8)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def draw_curves(stages: dict, path: Path) -> None:
    """Loss over steps of every training stage."""
    figure = Figure(figsize=(max(4.5, 3.3 * len(stages)), 3), layout="constrained")
    every = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (name, stage) in zip(every, stages.items(), strict=True):
        if stage["curve"]:
            axes.plot(*zip(*stage["curve"], strict=True), linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
