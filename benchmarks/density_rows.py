"""Rows of token density: tokens drawn and averaged, and as much work without what cells add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel.denoiser import Grid, denoisers
from caches.evolution import EvolutionCache
from caches.schedule import COMPUTE, SKIP, Schedule, block_columns
from caches.token_density import Sparse, TokenDensity, cells


@dataclass(frozen=True)
class TokensAnywhere(TokenDensity):
    """Control: as many tokens drawn anywhere; a token gets what its nearest drawn one changed."""

    def sparse(self, grid: Grid, draw: int) -> Sparse:
        count = int(cells(grid, self.side).max()) + 1
        places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
        generator = torch.Generator().manual_seed(draw)
        members = torch.randperm(len(places), generator=generator)[:count].sort().values
        return Sparse(members[:, None], None, torch.cdist(places, places[members]).argmin(1))


def density(
    pipe: Any, steps: int, folder: Path, shares: tuple[float, ...], compared: float
) -> Iterator[tuple[str, partial[Any]]]:
    """A curve over shares of the steps; at one of them means, and the controls."""
    for share in shares:
        yield f"token density, drawn: first {share:.0%} of the steps", partial(TokenDensity, share)
    at = f"first {compared:.0%} of the steps"
    yield f"token density, mean: {at}", partial(TokenDensity, compared, choose="mean")
    yield f"control: tokens drawn anywhere, {at}", partial(TokensAnywhere, compared)
    left_out = partial(without_middle, pipe, steps, folder, TokenDensity(compared))
    yield f"control: middle blocks left out, {at}", left_out


def without_middle(pipe: Any, steps: int, folder: Path, like: TokenDensity) -> EvolutionCache:
    """The blocks that would see fewer tokens do nothing in these steps."""
    (denoiser,) = denoisers(pipe)
    columns = block_columns(denoiser)
    middle = {f"{denoiser.slot}.{block.path}" for block in like.middle(denoiser)}
    sparse = "".join(SKIP if column in middle else COMPUTE for column in columns)
    first = round(like.until * steps)
    rows = (sparse,) * first + (COMPUTE * len(columns),) * (steps - first)
    file = folder / f"without-middle-{first}.safetensors"
    return EvolutionCache.of(Schedule(columns, rows), pipe, file)
