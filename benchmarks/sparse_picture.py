"""Draws what one block of queries attends to under each policy: ``pictures/sparse_masks.png``.

    python -m benchmarks.sparse_picture [--model zoo:digits-wan] [--budgets ARTIFACT]

Rows are policies, columns frames; the block of queries is red, what it keeps is dark. Without a
model the static patterns are drawn. With one, a step is run and the policies that look at q and k
are drawn for one head, below its true attention; with a calibration's artifact, what its budget
for this layer and noise level keeps, too (``bench_sparse_quality`` leaves one in its folder).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accel.method import Method
from sparse_attn._live import LiveSparse, Place, SparseAttention
from sparse_attn.block_map import keep_share
from sparse_attn.geometry import block_scores, in_first_frame, with_sink
from sparse_attn.head_classes import spatial_score, temporal_score
from sparse_attn.radial import radial_score
from sparse_attn.sliding_tile import window_score
from sparse_attn.token_order import Grid, gilbert

PICTURES = Path(__file__).parent / "pictures"
GRID, BLOCKS = (5, 16, 16), (64, 32)
QUERY_BLOCK = 9  # in the middle frame
STATIC = {
    "SlidingTile": window_score(1.0, 1.0, 1.0),
    "Radial": radial_score,
    "HeadClasses, spatial": spatial_score,
    "HeadClasses, temporal": temporal_score,
}
WITH_SINK = ("Radial", "HeadClasses, spatial")


def static_rows(density: float) -> dict[str, Tensor]:
    """Kept blocks of keys of the drawn block of queries, (nk,) by policy."""
    found = {}
    for name, score in STATIC.items():
        scores = block_scores(score, GRID, "gilbert", (0, 0), BLOCKS)
        if name in WITH_SINK:
            scores = with_sink(scores, in_first_frame(GRID, "gilbert", BLOCKS[1]), BLOCKS)
        found[name] = keep_share(scores[None, None], density)[0, 0, QUERY_BLOCK].float()
    return found


def measured_rows(
    model: str, density: float, layer: int, head: int, budgets: Path | None
) -> dict[str, Tensor]:
    """True mass by block, then what the policies that measure keep, at a late step of a run."""
    import accel
    from accel.artifact import ArtifactRef
    from accel.method import attached
    from apps.digits_referee import zoo_inputs
    from sparse_attn.adaptive import importance, select
    from sparse_attn.block_map import blocked
    from sparse_attn.budgets import Budgets
    from sparse_attn.estimators import block_scores as losses
    from sparse_attn.estimators import exact_mass, subblock_mass

    found: dict[str, Tensor] = {}

    def look(q: Tensor, k: Tensor, v: Tensor, place: Place) -> None:
        if (place.layer, place.step, place.branch) != (layer, 3, "cond"):
            return
        first = QUERY_BLOCK * BLOCKS[0]
        rows = torch.arange(first, first + BLOCKS[0])
        mass = exact_mass(q, k, rows, BLOCKS[1])[0, head].mean(0)
        draw = torch.Generator().manual_seed(0)
        places = [
            torch.rand(1, q.shape[1], n, generator=draw).argsort(-1)[..., : n // 4] for n in BLOCKS
        ]
        score = importance(blocked(q, BLOCKS[0]), blocked(k, BLOCKS[1]), *places)
        scores = losses(q, k, v, BLOCKS, True)
        maps = {"SubblockLSE": keep_share(scores, density)}
        if budgets is not None:
            found_budgets = Budgets.load(ArtifactRef.of(budgets), pipe, blocks=BLOCKS, pooled=True)
            spent = found_budgets.at_density(density)
            share, _ = spent.of(place.denoiser, place.layer, place.sigma)
            label = f"SubblockLSE, calibrated, {share:.2f} here"
            maps[label] = keep_share(scores, share, "head")
        maps |= {
            "SubblockLSE, no means": keep_share(subblock_mass(q, k, BLOCKS), density),
            "Adaptive": select(score, 0.95, density, density),
        }
        found["true attention"] = mass / mass.max()
        found.update({n: m[0, head, QUERY_BLOCK].float() for n, m in maps.items()})

    pipe = accel.load(model)
    pipe.set_progress_bar_config(disable=True)
    (call,) = zoo_inputs("WanPipeline", 1, 5)
    with attached(_Show((0.0, 0.0), BLOCKS), pipe) as live, torch.no_grad():
        assert isinstance(live, LiveSparse)
        live.tables = look
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    if not found:
        raise ValueError(f"{model} has no attention numbered {layer} with branches")
    return found


@dataclass(frozen=True)
class _Show(SparseAttention, Method):
    """Attends densely and shows every attention to a function."""

    guard: bool = False

    def nominal(self) -> float:
        return 1.0

    def attends_densely(self) -> bool:
        return False

    def keep(self, q: Tensor, k: Tensor, place: Place, live: LiveSparse) -> Tensor:
        live.tables(q, k, live.values, place)
        nq, nk = (-(-x.shape[2] // n) for x, n in zip((q, k), place.blocks, strict=True))
        return torch.ones(*q.shape[:2], nq, nk, dtype=torch.bool)


def in_space(blocks: Tensor, grid: Grid) -> Tensor:
    """(nk,) of blocks of keys -> (frames, height, width)."""
    tokens = blocks.repeat_interleave(BLOCKS[1])[: grid[0] * grid[1] * grid[2]]
    return tokens[gilbert(grid).back].view(grid)


def draw(rows: dict[str, Tensor], target: Path, density: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    queries = torch.zeros(GRID[0] * GRID[1] * GRID[2])
    queries[QUERY_BLOCK * BLOCKS[0] : (QUERY_BLOCK + 1) * BLOCKS[0]] = 1
    queries = queries[gilbert(GRID).back].view(GRID)
    size = (1.3 * GRID[0] + 2, 1.3 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), GRID[0], figsize=size, squeeze=False)
    for line, (name, blocks) in zip(axes, rows.items(), strict=True):
        kept = in_space(blocks, GRID)
        for frame, ax in enumerate(line):
            picture = 1 - 0.75 * kept[frame][..., None].expand(-1, -1, 3).clone()
            picture[queries[frame] > 0] = torch.tensor([0.85, 0.25, 0.2])
            ax.imshow(picture.numpy(), vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
        label = name.replace(", ", ",\n")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for frame, ax in enumerate(axes[0]):
        ax.set_title(f"frame {frame}", fontsize=9)
    figure.suptitle(
        f"red: a block of queries; dark: what it keeps, density {density:g}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(target, dpi=90, metadata={"Software": None})
    print(f"wrote {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="draw the policies that measure, too")
    parser.add_argument("--budgets", type=Path, help="artifact of a calibration of this model")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PICTURES / "sparse_masks.png")
    args = parser.parse_args()
    rows = static_rows(args.density)
    if args.model:
        rows |= measured_rows(args.model, args.density, args.layer, args.head, args.budgets)
    draw(rows, args.out, args.density)


if __name__ == "__main__":
    main()
